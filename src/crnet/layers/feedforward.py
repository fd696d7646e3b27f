"""Feed-forward sublayers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from crnet.kernels.elementwise import swiglu


class GatedFeedForward(nn.Module):
    """down(silu(gate x) * up x); without its activation down(gate x * up x).

    Source: Shazeer 2020 (arXiv:2002.05202); arXiv:2509.18993, section 2.2.
    """

    def __init__(self, keeps_activation: bool):
        super().__init__()
        self.keeps_activation = keeps_activation

    def forward(self, x_BTD: Tensor, project: Any, context: Any) -> Tensor:
        """Return the output of the map ``down``, (B, T, D)."""
        gate_BTF = project("gate", x_BTD).to(x_BTD.dtype)
        up_BTF = project("up", x_BTD).to(x_BTD.dtype)
        joined_BTF = swiglu(gate_BTF, up_BTF) if self.keeps_activation else gate_BTF * up_BTF
        return project("down", joined_BTF)


class FeedForward(nn.Module):
    """down(gelu(up x)), the approximation by tanh; without its activation down(up x)."""

    def __init__(self, keeps_activation: bool):
        super().__init__()
        self.keeps_activation = keeps_activation

    def forward(self, x_BTD: Tensor, project: Any, context: Any) -> Tensor:
        """Return the output of the map ``down``, (B, T, D)."""
        up_BTF = project("up", x_BTD).to(x_BTD.dtype)
        if self.keeps_activation:
            up_BTF = nn.functional.gelu(up_BTF, approximate="tanh")
        return project("down", up_BTF)
