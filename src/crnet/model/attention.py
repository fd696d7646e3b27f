"""Causal self-attention with rotary embedding and grouped key/value heads, and its decoding cache.

Shapes: B batch, T new tokens, S tokens seen so far and new, D model width, N query heads,
K key/value heads, H head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crnet.kernels.elementwise import rotate

Carry = dict[str, Tensor]
"""Position -> an earlier block's output of that map, before rotation or activation."""


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
        self, x_BTD: Tensor, rope: Rope, carry: Carry, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the outputs of the maps q, k, v (before rotation) and o, each (B, T, width)."""
        batch, num_new, _ = x_BTD.shape
        q = self.q_proj(x_BTD, carry.get("q"))
        k = self.k_proj(x_BTD, carry.get("k"))
        v = self.v_proj(x_BTD, carry.get("v"))
        head_size = q.shape[-1] // self.num_heads
        cos, sin = rope.cos.to(q.dtype), rope.sin.to(q.dtype)
        q_BNTH = rotate(q.view(batch, num_new, -1, head_size), cos, sin).transpose(1, 2)
        k_BKSH = rotate(k.view(batch, num_new, -1, head_size), cos, sin).transpose(1, 2)
        v_BKSH = v.view(batch, num_new, -1, head_size).transpose(1, 2)
        mask = None
        if cache is not None:
            k_BKSH, v_BKSH = cache.append(k_BKSH, v_BKSH)
            mask = causal_mask(num_new, k_BKSH.shape[2], q.device)
        mixed_BNTH = nn.functional.scaled_dot_product_attention(
            q_BNTH,
            k_BKSH,
            v_BKSH,
            attn_mask=mask,
            is_causal=cache is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        mixed_BTD = mixed_BNTH.transpose(1, 2).reshape(batch, num_new, -1)
        return q, k, v, self.o_proj(mixed_BTD, carry.get("o"))


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
