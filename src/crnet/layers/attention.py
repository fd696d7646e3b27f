"""Causal self-attention with grouped key/value heads, and the tables of the rotary embedding.

Shapes: B batch, T new tokens, S tokens seen so far and new, D model width, N query heads,
K key/value heads, H head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crnet.kernels.elementwise import rotate
from crnet.layers.cache import LayerCache, causal_mask


@dataclass(frozen=True)
class Rope:
    """Cosines and sines of the rotary embedding, each (T, 1, H/2), fp32."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Context:
    """What every block needs of these tokens besides their state."""

    rope: Rope | None
    caches: tuple[LayerCache, ...] | None = None


class Attention(nn.Module):
    """softmax(q k^T / sqrt(H)) v, q and k rotated where there are tables; then the output map."""

    def __init__(self, layer_idx: int, head_size: int):
        """As many heads as the maps are wide: the counts are nowhere told."""
        super().__init__()
        self.layer_idx = layer_idx
        self.head_size = head_size

    def forward(self, x_BTD: Tensor, project: Any, context: Context) -> Tensor:
        """Return the output of the map ``o``, (B, T, width)."""
        batch, num_new, _ = x_BTD.shape
        dtype = x_BTD.dtype  # a carry of higher precision stays between the blocks
        tables = context.rope and (context.rope.cos.to(dtype), context.rope.sin.to(dtype))

        def heads(position: str) -> Tensor:
            y_BTD = project(position, x_BTD).to(dtype)
            y_BTNH = y_BTD.view(batch, num_new, -1, self.head_size)
            if tables is not None and position != "v":
                y_BTNH = rotate(y_BTNH, *tables)
            return y_BTNH.transpose(1, 2)

        q_BNTH, k_BKSH, v_BKSH = heads("q"), heads("k"), heads("v")
        mask, is_causal = None, True
        if context.caches is not None:
            cache = context.caches[self.layer_idx]
            is_causal = cache.length == 0  # a mask would rule out the fastest kernels
            k_BKSH, v_BKSH = cache.append(k_BKSH, v_BKSH)
            if not is_causal:
                mask = causal_mask(num_new, k_BKSH.shape[2], q_BNTH.device)
        mix = functools.partial(_mix, mask=mask, is_causal=is_causal)
        mixed_BNTH = project.attend(mix, q_BNTH, k_BKSH, v_BKSH)
        return project("o", mixed_BNTH.transpose(1, 2).reshape(batch, num_new, -1))


def _mix(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Tensor | None, is_causal: bool
) -> Tensor:
    groups = q_BNTH.shape[1] // k_BKSH.shape[1]
    if groups > 1 and q_BNTH.is_cuda and q_BNTH.dtype == torch.float32:
        # torch has no fused kernel for grouped heads in fp32 there: it would keep T x T weights.
        k_BKSH, v_BKSH = (each.repeat_interleave(groups, dim=1) for each in (k_BKSH, v_BKSH))
        groups = 1
    return nn.functional.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, mask, is_causal=is_causal, enable_gqa=groups > 1
    )


@functools.lru_cache(maxsize=8)
def _angles(length: int, head_size: int, theta: float, device: torch.device) -> Rope:
    # Computed, never stored in the model: a buffer would be garbage after a build on meta. Never
    # under inference mode: such tensors could not be kept for a later backward.
    with torch.inference_mode(False):
        exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
        positions = torch.arange(length, dtype=torch.float32, device=device)
        angles = torch.outer(positions, theta**-exponents)[:, None, :]
        return Rope(angles.cos(), angles.sin())


def rope(start: int, length: int, head_size: int, theta: float, device: torch.device) -> Rope:
    """Tables for positions ``start .. start + length``. Source: RoFormer (arXiv:2104.09864)."""
    room = 1 << max(start + length - 1, 1).bit_length()
    whole = _angles(room, head_size, theta, device)
    return Rope(whole.cos[start : start + length], whole.sin[start : start + length])
