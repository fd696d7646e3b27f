"""GPT-2's block."""

from __future__ import annotations

from crnet.layers.attention import Attention
from crnet.layers.feedforward import FeedForward
from crnet.layers.norms import LayerNorm
from crnet.layers.pre_norm import PreNormBlock
from crnet.specs import Shape


class GPT2Block(PreNormBlock):
    """Attention and a feed-forward, each behind a layer norm."""

    def __init__(self, shape: Shape, layer_idx: int, keeps_activation: bool):
        super().__init__()
        self.input_layernorm = LayerNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(layer_idx, shape.head_size)
        self.post_attention_layernorm = LayerNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = FeedForward(keeps_activation)
