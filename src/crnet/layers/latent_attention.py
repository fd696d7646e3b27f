"""Multi-head latent attention: keys and values of all heads are made of one narrow latent a token.

    q = q_b(norm(q_a(x))), or q(x)     of every head: a part without a position, a rotated part
    latent, rotary key = kv_a(x)       one of each a token, for all heads
    keys, values = kv_b(norm(latent))  of every head; the rotary key is beside each head's own part

Shapes: B batch, T new tokens, S tokens seen so far and new, D model width, N heads, H width of a
head's query and key, C width of the latent, P width of the rotary key, E width of what queries are
made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crnet.kernels.elementwise import rotate
from crnet.layers.attention import Attention, Context
from crnet.layers.norms import RMSNorm

Tables = tuple[Tensor, Tensor]
"""Cosines and sines."""
NORM_EPS = 1e-6
"""Of the latents' norms, whatever the model's other norms have: as released."""


class LatentAttention(Attention):
    """softmax(q k^T / sqrt(H)) v, and the output map; the cache holds latent and rotary key alone.

    Values that are narrower than keys are filled up with zeros before they are mixed, and what is
    mixed is cut again: fused kernels want one width, and without one T x T weights would be kept.

    Refused: the absorbed form, in which ``kv_b`` is multiplied into queries and outputs so that
    keys and values are never made. It needs ``kv_b`` to be one matrix, and under a carry its output
    depends on the latents of the blocks below too.

    Cost: with a cache a new token makes keys and values of all S tokens again, 2 S C N (H - P +
    width of a value) FLOPs a block where ``kv_b`` is a matrix.
    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1 and appendix C.
    """

    def __init__(
        self,
        layer_idx: int,
        *,
        nope_size: int,
        rope_size: int,
        value_size: int,
        q_latent: int,
        kv_latent: int,
    ):
        """``nope_size``, ``rope_size``: of a head's query and key, without a position and rotated.
        ``q_latent``: 0 where queries are made of the input itself."""
        super().__init__(layer_idx, nope_size + rope_size)
        self.nope_size, self.rope_size, self.value_size = nope_size, rope_size, value_size
        self.kv_latent = kv_latent
        self.q_a_layernorm = RMSNorm(q_latent, NORM_EPS) if q_latent else None
        self.kv_a_layernorm = RMSNorm(kv_latent, NORM_EPS)

    def forward(self, x_BTD: Tensor, project: Any, context: Context) -> Tensor:
        """Return the output of the map ``o``, (B, T, D)."""
        batch, num_new, _ = x_BTD.shape
        dtype = x_BTD.dtype  # a carry of higher precision stays between the blocks
        assert context.rope is not None
        tables = context.rope.cos.to(dtype), context.rope.sin.to(dtype)
        q_BTNH = self._queries(x_BTD, project, tables)
        latent_BTC, key_BT1P = self._latents(x_BTD, project, tables)
        if context.caches is not None:
            cache = context.caches[self.layer_idx]
            latent, key = cache.append(latent_BTC.unsqueeze(1), key_BT1P.transpose(1, 2))
            latent_BTC, key_BT1P = latent.squeeze(1), key.transpose(1, 2)
        k_BSNH, v_BSNH = self._keys_and_values(latent_BTC, key_BT1P, project)
        q_BNTH, k_BNSH, v_BNSH = (each.transpose(1, 2) for each in (q_BTNH, k_BSNH, v_BSNH))
        mixed_BTNH = self.mix(q_BNTH, k_BNSH, v_BNSH, project, context).transpose(1, 2)
        return project("o", mixed_BTNH[..., : self.value_size].reshape(batch, num_new, -1))

    def _queries(self, x_BTD: Tensor, project: Any, tables: Tables) -> Tensor:
        """Of all heads, (B, T, N, H)."""
        position, x_BTE = "q", x_BTD
        if self.q_a_layernorm is not None:
            position, x_BTE = "q_b", self.q_a_layernorm(project("q_a", x_BTD).to(x_BTD.dtype))
        q_BTNH = project(position, x_BTE).to(x_BTD.dtype).unflatten(-1, (-1, self.head_size))
        nope, rotary = q_BTNH.split([self.nope_size, self.rope_size], -1)
        return torch.cat([nope, rotate(rotary, *tables)], -1)

    def _latents(self, x_BTD: Tensor, project: Any, tables: Tables) -> tuple[Tensor, Tensor]:
        """The latent, normed, (B, T, C), and the rotary key, (B, T, 1, P)."""
        both = project("kv_a", x_BTD).to(x_BTD.dtype)
        latent_BTC, key_BTP = both.split([self.kv_latent, self.rope_size], -1)
        return self.kv_a_layernorm(latent_BTC), rotate(key_BTP.unsqueeze(2), *tables)

    def _keys_and_values(
        self, latent_BSC: Tensor, key_BS1P: Tensor, project: Any
    ) -> tuple[Tensor, Tensor]:
        """Of all heads, (B, S, N, H) each, in memory of their own."""
        sizes = [self.nope_size, self.value_size]
        kv = project("kv_b", latent_BSC).to(latent_BSC.dtype).unflatten(-1, (-1, sum(sizes)))
        nope, values = kv.split(sizes, -1)
        rotary = key_BS1P.expand(-1, -1, kv.shape[2], -1)
        filled = nn.functional.pad(values, (0, self.head_size - self.value_size))
        return torch.cat([nope, rotary], -1), filled
