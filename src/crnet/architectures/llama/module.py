"""LLaMA's block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crnet.layers.attention import Attention
from crnet.layers.block import Block
from crnet.layers.feedforward import GatedFeedForward
from crnet.layers.norms import RMSNorm
from crnet.specs import Shape


class LlamaBlock(Block):
    """Attention and a gated feed-forward, each behind a norm."""

    def __init__(self, shape: Shape, layer_idx: int, keeps_activation: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(layer_idx, shape.num_heads, shape.num_kv_heads)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = GatedFeedForward(keeps_activation)

    def sublayers(self):
        return self._attend, self._feed_forward

    def _attend(self, x_BTD: Tensor, project: Any, context: Any) -> Tensor:
        return self.self_attn(self.input_layernorm(x_BTD), project, context)

    def _feed_forward(self, x_BTD: Tensor, project: Any, context: Any) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x_BTD), project, context)
