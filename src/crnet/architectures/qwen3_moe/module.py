"""Qwen-3's block with experts."""

from __future__ import annotations

from typing import Any

from crnet.layers.attention import Attention
from crnet.layers.experts import Experts
from crnet.layers.norms import RMSNorm
from crnet.layers.pre_norm import PreNormBlock
from crnet.specs import Shape


class Qwen3MoeBlock(PreNormBlock):
    """Attention with normed heads and a layer of experts, each behind a norm."""

    def __init__(self, shape: Shape, options: Any, layer_idx: int, keeps_activation: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(layer_idx, shape.head_size, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = Experts(
            layer_idx,
            shape.hidden_size,
            options.num_experts,
            options.num_active,
            normalises=options.normalises,
            keeps_activation=keeps_activation,
        )
