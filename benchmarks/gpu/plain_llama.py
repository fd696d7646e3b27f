"""A plain LLaMA in torch's own modules: what a user would write without this package."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from crnet.specs import Shape


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        h, f = shape.hidden_size, shape.intermediate_size
        self.num_heads = shape.num_heads
        self.norms = nn.ModuleList(nn.RMSNorm(h, shape.norm_eps) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(h, h, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(h, f, bias=False) for _ in range(2))
        self.down = nn.Linear(f, h, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.norms[0](x)
        batch, length, width = x.shape
        q, k, v = (
            each(normed).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for each in (self.q, self.k, self.v)
        )
        q, k = (_rotated(each, cos, sin) for each in (q, k))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, width))
        normed = self.norms[1](x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class PlainLlama(nn.Module):
    def __init__(self, shape: Shape, length: int):
        super().__init__()
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.norm_eps)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        size = shape.head_size
        rates = shape.rope_theta ** (-torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(length).float(), rates)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x)).float()
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return loss, None
