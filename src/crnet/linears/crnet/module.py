"""CR-Net's linear map: an earlier block's output, scaled, plus a low-rank increment."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crnet.kernels.carried import carried_lowrank, carry_from, up_project
from crnet.linears._maps import LinearMap, x_times

EPS = 1e-6
"""Keeps the gain away from zero (eq. 6)."""


class CRNetMap(LinearMap):
    """``y = gain * carry + (x A) B``; A (D, R), B (R, F), beta (1,)."""

    comes_apart = True
    A: nn.Parameter
    B: nn.Parameter
    beta: nn.Parameter

    def __init__(self, tensors, carry_dtype: str):
        super().__init__(tensors)
        self.carry_dtype = torch.float32 if carry_dtype == "fp32" else None

    def run(self, x_BTD, carry, known):
        assert carry is not None, "CR-Net's map above the first block needs a carry"
        output = carried_lowrank(
            x_BTD,
            self.A,
            self.B,
            carry,
            gain(self.beta),
            carry_dtype=self.carry_dtype,
            known=known,
            sums=self.sums,
        )
        return output, output

    def down_project(self, x_BTD, carry):
        return x_times(x_BTD, self.A, self.sums)

    def up_project(self, bottleneck, carry):
        return up_project(bottleneck, self.B, carry, gain(self.beta), self.carry_dtype)

    def carry_from(self, output_BTF, bottleneck):
        """Eq. 7: the output below, from this one and its bottleneck."""
        return carry_from(output_BTF, bottleneck, self.B, gain(self.beta))

    def gain(self) -> Tensor:
        return gain(self.beta.detach())

    def dense_weight(self) -> Tensor:
        return (self.A.detach().float() @ self.B.detach().float()).T


def gain(beta: Tensor) -> Tensor:
    """``sign(beta) (|beta| + eps)``, shape of ``beta``. Source: eq. 6.

    Written as ``beta + eps sign(beta)``, which is the same number and whose derivative is taken to
    be 1 everywhere: a beta of exactly 0 could otherwise never leave it.
    """
    return beta + EPS * torch.sign(beta.detach())
