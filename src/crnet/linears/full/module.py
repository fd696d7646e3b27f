"""The dense linear map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crnet.kernels.carried import known_dense
from crnet.kernels.precision import cast
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

    def recall(
        self, x_BTD: Tensor, carry_BTF: Tensor | None, known: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        return known_dense(x_BTD, self.weight, known[1]) if known else self(x_BTD, carry_BTF)

    def reduce(self, x_BTD: Tensor) -> Tensor:
        """The output itself: a dense map has no narrower tensor that it follows from."""
        return nn.functional.linear(*cast(x_BTD, self.weight))

    def expand(self, z_BTF: Tensor, carry_BTF: Tensor | None) -> Tensor:
        return z_BTF
