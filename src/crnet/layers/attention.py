"""Causal self-attention with grouped key/value heads, and the tables of the rotary embedding.

Shapes: B batch, T new tokens, S tokens seen so far and new, D model width, N query heads,
K key/value heads, H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crnet.kernels.attention import causal_attention
from crnet.kernels.elementwise import rotate
from crnet.layers.cache import LayerCache, causal_mask
from crnet.layers.norms import RMSNorm

Attend = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""(attention module, queries, keys, values of the new tokens) -> mixed values, (B, N, T, H)."""


@dataclass(frozen=True)
class Rope:
    """Cosines and sines of the rotary embedding, each (T, 1, H/2) or (B, T, 1, H/2), fp32."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Context:
    """What every block needs of these tokens besides their state."""

    rope: Rope | None
    caches: tuple[LayerCache, ...] | None = None
    attend: Attend | None = None
    """In the place of ``caches`` and of the attention here: an engine's own."""
    uneven: Any = None
    """Told by each block how uneven its experts are (``layers.experts.Uneven``); None: nobody
    asks."""


class Attention(nn.Module):
    """softmax(q k^T / sqrt(H)) v, q and k rotated where there are tables; then the output map."""

    def __init__(
        self,
        layer_idx: int,
        head_size: int,
        qk_norm_eps: float | None = None,
        window: int | None = None,
    ):
        """As many heads as the maps are wide: the counts are nowhere told.

        ``qk_norm_eps``: heads of q and k are normed before they are rotated; None: they are not.
        ``window``: tokens that one attends to, itself among them; None: all before it.
        """
        super().__init__()
        self.layer_idx = layer_idx
        self.head_size = head_size
        self.window = window
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_size, qk_norm_eps)
            self.k_norm = RMSNorm(head_size, qk_norm_eps)

    def forward(self, x_BTD: Tensor, project: Any, context: Context) -> Tensor:
        """Return the output of the map ``o``, (B, T, width)."""
        batch, num_new, _ = x_BTD.shape
        dtype = x_BTD.dtype  # a carry of higher precision stays between the blocks
        tables = context.rope and (context.rope.cos.to(dtype), context.rope.sin.to(dtype))
        norms = {"q": self.q_norm, "k": self.k_norm}

        def heads(position: str) -> Tensor:
            y_BTD = project(position, x_BTD).to(dtype)
            y_BTNH = y_BTD.view(batch, num_new, -1, self.head_size)
            if (norm := norms.get(position)) is not None:
                y_BTNH = norm(y_BTNH)
            if tables is not None and position != "v":
                y_BTNH = rotate(y_BTNH, *tables)
            return y_BTNH.transpose(1, 2)

        q_BNTH, k_BKSH, v_BKSH = heads("q"), heads("k"), heads("v")
        if context.caches is not None:
            k_BKSH, v_BKSH = context.caches[self.layer_idx].append(k_BKSH, v_BKSH)
            if num_new == 1 and self.window is not None:
                k_BKSH, v_BKSH = k_BKSH[:, :, -self.window :], v_BKSH[:, :, -self.window :]
        mixed_BNTH = self.mix(q_BNTH, k_BKSH, v_BKSH, project, context)
        return project("o", mixed_BNTH.transpose(1, 2).reshape(batch, num_new, -1))

    def mix(
        self, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, project: Any, context: Context
    ) -> Tensor:
        """Mixed values of the new tokens, (B, N, T, H): here, or by an engine's own attention."""
        mix = functools.partial(_mix, window=self.window)
        if context.attend is not None:
            mix = functools.partial(context.attend, self)
        return project.attend(mix, q_BNTH, k_BKSH, v_BKSH)


def _mix(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, window: int | None) -> Tensor:
    """``window``: that of the tokens, wherever it reaches further back than the keys do."""
    num_new, num_seen = q_BNTH.shape[2], k_BKSH.shape[2]
    window = None if window is None or window >= num_seen else window
    mask, is_causal = None, num_new == num_seen and window is None
    if not is_causal and window is not None and num_new == num_seen:
        mask = _window_mask(num_new, window, q_BNTH.dtype, q_BNTH.device)
    elif not is_causal:  # a mask would rule out the fastest kernels
        mask = causal_mask(num_new, num_seen, q_BNTH.device, window)
    groups = q_BNTH.shape[1] // k_BKSH.shape[1]
    if groups > 1 and q_BNTH.is_cuda and q_BNTH.dtype == torch.float32:
        # torch has no fused kernel for grouped heads in fp32 there: it would keep T x T weights.
        k_BKSH, v_BKSH = (each.repeat_interleave(groups, dim=1) for each in (k_BKSH, v_BKSH))
        groups = 1
    if is_causal and groups == 1:
        return causal_attention(q_BNTH, k_BKSH, v_BKSH)
    return nn.functional.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, mask, is_causal=is_causal, enable_gqa=groups > 1
    )


@functools.lru_cache(maxsize=2)
def _window_mask(length: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a window adds to the scores of a row, (T, T): one for all blocks, and for all steps."""
    with torch.inference_mode(False):
        seen = causal_mask(length, length, device, window)
        assert seen is not None
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~seen, float("-inf"))


@functools.lru_cache(maxsize=8)
def _angles(length: int, head_size: int, theta: float, device: torch.device) -> Rope:
    # Computed, never stored in the model: a buffer would be garbage after a build on meta. Never
    # under inference mode: such tensors could not be kept for a later backward.
    with torch.inference_mode(False):
        return _tables(torch.arange(length, dtype=torch.float32, device=device), head_size, theta)


def _tables(positions: Tensor, head_size: int, theta: float) -> Rope:
    device = positions.device
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    angles = positions[..., None, None].to(torch.float32) * theta**-exponents
    return Rope(angles.cos(), angles.sin())


def rope(
    start: int | Tensor, length: int, head_size: int, theta: float, device: torch.device
) -> Rope:
    """Tables for positions ``start .. start + length``, or for those of each token, (B, T).

    Source: RoFormer (arXiv:2104.09864).
    """
    if isinstance(start, Tensor):
        return _tables(start, head_size, theta)
    room = 1 << max(start + length - 1, 1).bit_length()
    whole = _angles(room, head_size, theta, device)
    return Rope(whole.cos[start : start + length], whole.sin[start : start + length])


def forget_tables() -> None:
    """Drop cached tables and masks: the next ones are made anew."""
    _angles.cache_clear()
    _window_mask.cache_clear()
