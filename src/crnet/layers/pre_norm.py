"""A block of two sublayers, each behind a norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from crnet.layers.block import Block


class PreNormBlock(Block):
    """Attention, then a feed-forward; a family sets the four modules."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def sublayers(self):
        return self._attend, self._feed_forward

    def _attend(self, x_BTD: Tensor, project: Any, context: Any) -> Tensor:
        return self.self_attn(self.input_layernorm(x_BTD), project, context)

    def _feed_forward(self, x_BTD: Tensor, project: Any, context: Any) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x_BTD), project, context)
