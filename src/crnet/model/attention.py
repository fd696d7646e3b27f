"""Causal self-attention with rotary embedding and grouped key/value heads, and its decoding cache.

Shapes: B batch, T new tokens, S tokens seen so far and new, D model width, N query heads,
K key/value heads, H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from crnet.kernels.elementwise import rotate


class Maps(Protocol):
    """How a block carries out its linear maps and the mixing of its tokens."""

    def __call__(self, position: str, x_BTD: Tensor) -> Tensor:
        """Output of the map of that position."""
        ...

    def attend(self, mix: Mix, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
        """``mix(q, k, v)``."""
        ...


Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rotated queries, keys and values -> mixed values, (B, N, T, H)."""


class Attention(nn.Module):
    """softmax(rotate(q) rotate(k)^T / sqrt(H)) v, then the output map."""

    def __init__(self, linears: dict[str, nn.Module], num_heads: int, num_kv_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.q_proj = linears["q"]
        self.k_proj = linears["k"]
        self.v_proj = linears["v"]
        self.o_proj = linears["o"]

    def forward(
        self, x_BTD: Tensor, rope: Rope, maps: Maps, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the outputs of the maps q, k, v (before rotation) and o, each (B, T, width)."""
        batch, num_new, _ = x_BTD.shape
        q, k, v = maps("q", x_BTD), maps("k", x_BTD), maps("v", x_BTD)
        head_size = q.shape[-1] // self.num_heads
        dtype = x_BTD.dtype  # a carry of higher precision stays between the blocks
        cos, sin = rope.cos.to(dtype), rope.sin.to(dtype)
        q_BTNH = q.to(dtype).view(batch, num_new, -1, head_size)
        k_BTKH = k.to(dtype).view(batch, num_new, -1, head_size)
        q_BNTH = rotate(q_BTNH, cos, sin).transpose(1, 2)
        k_BKSH = rotate(k_BTKH, cos, sin).transpose(1, 2)
        v_BKSH = v.to(dtype).view(batch, num_new, -1, head_size).transpose(1, 2)
        mask = None
        if cache is not None:
            k_BKSH, v_BKSH = cache.append(k_BKSH, v_BKSH)
            mask = causal_mask(num_new, k_BKSH.shape[2], q.device)
        mix = functools.partial(
            nn.functional.scaled_dot_product_attention,
            attn_mask=mask,
            is_causal=cache is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        mixed_BNTH = maps.attend(mix, q_BNTH, k_BKSH, v_BKSH)
        mixed_BTD = mixed_BNTH.transpose(1, 2).reshape(batch, num_new, -1)
        return q, k, v, maps("o", mixed_BTD)


def causal_mask(num_new: int, num_seen: int, device: torch.device) -> Tensor | None:
    """True where new token i may look at token j, shape (T, S); None where it may look at all."""
    if num_new == 1:
        return None
    mask = torch.ones(num_new, num_seen, dtype=torch.bool, device=device)
    return mask.tril(num_seen - num_new)


@dataclass(frozen=True)
class Rope:
    """Cosines and sines of the rotary embedding, each (T, 1, H/2), fp32."""

    cos: Tensor
    sin: Tensor


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


class LayerCache:
    """Rotated keys and values of one block, for up to ``capacity`` tokens.

    CR-Net's carry needs no cache: it reaches from block to block of the same token.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys_BKTH: Tensor, values_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens; return the keys and values of all, (B, K, S, H).

        Raises:
            RuntimeError: there is no room left.
        """
        batch, heads, num_new, head_size = keys_BKTH.shape
        if self.length + num_new > self.capacity:
            raise RuntimeError(
                f"the key/value cache holds {self.capacity} tokens; "
                f"{self.length} are in it and {num_new} more came"
            )
        if self._keys is None or self._values is None:
            shape = (batch, heads, self.capacity, head_size)
            self._keys = keys_BKTH.new_empty(shape)
            self._values = values_BKTH.new_empty(shape)
        end = self.length + num_new
        self._keys[:, :, self.length : end] = keys_BKTH
        self._values[:, :, self.length : end] = values_BKTH
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]
