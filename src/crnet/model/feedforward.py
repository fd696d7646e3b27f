"""The gated feed-forward part of a block: down(silu(gate x) * up x)."""

from __future__ import annotations

from torch import Tensor, nn

from crnet.kernels.elementwise import swiglu
from crnet.model.attention import Maps


class FeedForward(nn.Module):
    """LLaMA's SwiGLU feed-forward. Source: arXiv:2509.18993, section 2.2."""

    def __init__(self, linears: dict[str, nn.Module]):
        super().__init__()
        self.gate_proj = linears["gate"]
        self.up_proj = linears["up"]
        self.down_proj = linears["down"]

    def forward(self, x_BTD: Tensor, maps: Maps) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs of gate (B, T, F), up (B, T, F) and down (B, T, D)."""
        gate, up = maps("gate", x_BTD), maps("up", x_BTD)
        dtype = x_BTD.dtype
        return gate, up, maps("down", swiglu(gate.to(dtype), up.to(dtype)))
