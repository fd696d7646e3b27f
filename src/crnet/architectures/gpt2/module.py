"""GPT-2's block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crnet.layers.attention import Attention
from crnet.layers.block import Block
from crnet.layers.feedforward import FeedForward
from crnet.layers.norms import LayerNorm
from crnet.specs import Shape


class GPT2Block(Block):
    """Attention and a feed-forward, each behind a layer norm."""

    def __init__(self, shape: Shape, layer_idx: int, keeps_activation: bool):
        super().__init__()
        self.input_layernorm = LayerNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(layer_idx, shape.num_heads, shape.num_heads)
        self.post_attention_layernorm = LayerNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = FeedForward(keeps_activation)

    def sublayers(self):
        return self._attend, self._feed_forward

    def _attend(self, x_BTD: Tensor, project: Any, context: Any) -> Tensor:
        return self.self_attn(self.input_layernorm(x_BTD), project, context)

    def _feed_forward(self, x_BTD: Tensor, project: Any, context: Any) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x_BTD), project, context)
