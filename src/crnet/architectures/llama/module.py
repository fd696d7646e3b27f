"""LLaMA's block."""

from __future__ import annotations

from typing import Any

from crnet.layers.attention import Attention
from crnet.layers.feedforward import GatedFeedForward
from crnet.layers.norms import RMSNorm
from crnet.layers.pre_norm import PreNormBlock
from crnet.specs import Shape


class LlamaBlock(PreNormBlock):
    """Attention and a gated feed-forward, each behind a norm."""

    def __init__(self, shape: Shape, options: Any, layer_idx: int, keeps_activation: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        eps = shape.norm_eps if options.qk_norm else None
        self.self_attn = Attention(layer_idx, shape.head_size, eps, options.window)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = GatedFeedForward(keeps_activation)
