"""The plain low-rank map, and the initial values of a pair of factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crnet.kernels.carried import expand, lowrank
from crnet.kernels.precision import cast
from crnet.linears import Slot


class LowRankLinear(nn.Module):
    """``y = (x A) B`` with A of shape (D, R) and B of shape (R, F), the paper's orientation."""

    def __init__(self, slot: Slot, init: str, init_std: float):
        super().__init__()
        self.init = init
        self.init_std = init_std
        self.A = nn.Parameter(torch.empty(slot.in_size, slot.rank))
        self.B = nn.Parameter(torch.empty(slot.rank, slot.out_size))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Factors whose product has standard deviation ``init_std`` (zero for ``zero-b``)."""
        init_factors(self.A, self.B, self.init, self.init_std, generator)

    def forward(self, x_BTD: Tensor, carry_BTF: Tensor | None) -> Tensor:
        return self.recall(x_BTD, carry_BTF, None)

    def recall(
        self, x_BTD: Tensor, carry_BTF: Tensor | None, known: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        return lowrank(x_BTD, self.A, self.B, known)

    def reduce(self, x_BTD: Tensor) -> Tensor:
        x_BTD, a_DR = cast(x_BTD, self.A)
        return x_BTD @ a_DR

    def expand(self, z_BTR: Tensor, carry_BTF: Tensor | None) -> Tensor:
        return expand(z_BTR, self.B)


@torch.no_grad()
def init_factors(
    a_DR: Tensor, b_RF: Tensor, init: str, product_std: float, generator: torch.Generator
) -> None:
    """Fill a pair of factors in place.

    ``balanced``: both Gaussian with equal standard deviation ``(product_std / sqrt(R))^(1/2)``, so
    that an item of A B, a sum of R products, has standard deviation ``product_std``.
    ``zero-b``: A Gaussian of standard deviation ``D^(-1/2)``, B zero: the map starts at zero.
    ``spectral``: the best rank-R approximation of a dense Gaussian matrix of standard deviation
    ``product_std``, its singular values split evenly between the factors. Cost: one SVD.
    """
    rank = a_DR.shape[1]
    if init == "balanced":
        std = (product_std / rank**0.5) ** 0.5
        a_DR.normal_(0, std, generator=generator)
        b_RF.normal_(0, std, generator=generator)
    elif init == "zero-b":
        a_DR.normal_(0, a_DR.shape[0] ** -0.5, generator=generator)
        b_RF.zero_()
    elif init == "spectral":
        dense_DF = torch.empty(a_DR.shape[0], b_RF.shape[1])
        dense_DF.normal_(0, product_std, generator=generator)
        left, values, right = torch.linalg.svd(dense_DF, full_matrices=False)
        root = values[:rank].sqrt()
        a_DR.copy_(left[:, :rank] * root)
        b_RF.copy_(root[:, None] * right[:rank])
    else:
        raise ValueError(f"no initial values are named {init!r}; known: balanced, zero-b, spectral")
