"""The dense linear map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crnet.linears import Slot


class FullLinear(nn.Module):
    """``y = x W^T``; ``weight`` has shape (F, D), as ``nn.Linear`` and Hugging Face store it."""

    def __init__(self, slot: Slot, init_std: float):
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(slot.out_size, slot.in_size))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Gaussian of standard deviation ``init_std``."""
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)

    def forward(self, x_BTD: Tensor, carry_BTF: Tensor | None) -> Tensor:
        return nn.functional.linear(x_BTD, self.weight)
