"""The block of multi-head latent attention."""

from __future__ import annotations

from typing import Any

from crnet.layers.feedforward import GatedFeedForward
from crnet.layers.latent_attention import LatentAttention
from crnet.layers.norms import RMSNorm
from crnet.layers.pre_norm import PreNormBlock
from crnet.specs import Shape


class MLABlock(PreNormBlock):
    """Latent attention and a gated feed-forward, each behind a norm."""

    def __init__(self, shape: Shape, sizes: Any, layer_idx: int, keeps_activation: bool):
        """``sizes``: the architecture's ``Sizes``."""
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = LatentAttention(
            layer_idx,
            nope_size=sizes.nope,
            rope_size=sizes.rope,
            value_size=sizes.value,
            q_latent=sizes.q_latent,
            kv_latent=sizes.kv_latent,
        )
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = GatedFeedForward(keeps_activation)
