"""CR-Net's linear map: the block below, scaled, plus a low-rank increment."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crnet.kernels.carried import carried_lowrank, expand, shrink
from crnet.kernels.precision import cast
from crnet.linears import Slot
from crnet.linears.crnet import CRNetOptions
from crnet.linears.lowrank.module import init_factors

EPS = 1e-6
"""Keeps the gain away from zero (eq. 6)."""


class CRNetLinear(nn.Module):
    """``y = gain * carry + (x A) B``; A (D, R), B (R, F), beta (1,)."""

    def __init__(self, slot: Slot, options: CRNetOptions, init_std: float):
        super().__init__()
        self.options = options
        self.init_std = init_std
        self.carry_dtype = torch.float32 if options.carry_dtype == "fp32" else None
        self.A = nn.Parameter(torch.empty(slot.in_size, slot.rank))
        self.B = nn.Parameter(torch.empty(slot.rank, slot.out_size))
        self.beta = nn.Parameter(torch.empty(1), requires_grad=options.learnable_beta)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """beta at ``beta_init``; factors by ``options.init`` (the choice's evidence: LOG.md)."""
        init_factors(self.A, self.B, self.options.init, self.init_std, generator)
        nn.init.constant_(self.beta, self.options.beta_init)

    def forward(self, x_BTD: Tensor, carry_BTF: Tensor | None) -> Tensor:
        return self.recall(x_BTD, carry_BTF, None)

    def recall(
        self, x_BTD: Tensor, carry_BTF: Tensor | None, known: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        assert carry_BTF is not None, "CR-Net's map above the first block needs a carry"
        return carried_lowrank(
            x_BTD,
            self.A,
            self.B,
            carry_BTF,
            gain(self.beta),
            carry_dtype=self.carry_dtype,
            known=known,
        )

    def reduce(self, x_BTD: Tensor) -> Tensor:
        x_BTD, a_DR = cast(x_BTD, self.A)
        return x_BTD @ a_DR

    def expand(self, z_BTR: Tensor, carry_BTF: Tensor | None) -> Tensor:
        return expand(z_BTR, self.B, carry_BTF, gain(self.beta), self.carry_dtype)

    def shrink(self, y_BTF: Tensor, z_BTR: Tensor) -> Tensor:
        """Eq. 7: the output below, from this one and its bottleneck."""
        return shrink(y_BTF, z_BTR, self.B, gain(self.beta))

    def gain(self) -> Tensor:
        return gain(self.beta.detach())


def gain(beta: Tensor) -> Tensor:
    """``sign(beta) (|beta| + eps)``, shape of ``beta``. Source: eq. 6.

    Written as ``beta + eps sign(beta)``, which is the same number and whose derivative is taken to
    be 1 everywhere: a beta of exactly 0 could otherwise never leave it.
    """
    return beta + EPS * torch.sign(beta.detach())
