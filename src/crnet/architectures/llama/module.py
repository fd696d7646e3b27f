"""LLaMA's block."""

from __future__ import annotations

from crnet.layers.attention import Attention
from crnet.layers.feedforward import GatedFeedForward
from crnet.layers.norms import RMSNorm
from crnet.layers.pre_norm import PreNormBlock
from crnet.specs import Shape


class LlamaBlock(PreNormBlock):
    """Attention and a gated feed-forward, each behind a norm."""

    def __init__(self, shape: Shape, layer_idx: int, keeps_activation: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(layer_idx, shape.head_size)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = GatedFeedForward(keeps_activation)
