"""CoLA's map, with a backward by hand that keeps one tensor as wide as the bottleneck.

Autograd would keep it twice, before SiLU and after it. Here SiLU is computed once more in the
backward pass; with Z = X A, H = silu(Z) and dY given,

    dH = dY B^T    dB = H^T dY    dZ = dH silu'(Z)    dA = X^T dZ    dX = dZ A^T

Shapes: B batch, T tokens, M = B T rows, D input width, F output width, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from crnet.kernels.carried import rows, unrows, up_project
from crnet.kernels.partial import PartialSum
from crnet.kernels.precision import cast
from crnet.linears._maps import Known, LowRankMap


class CoLAMap(LowRankMap):
    """``y = silu(x A) B``; A (D, R), B (R, F). Its bottleneck is ``x A``, before SiLU."""

    def run(self, x_BTD, carry, known):
        output = activated_lowrank(x_BTD, self.A, self.B, known, self.sums)
        return output, output

    def up_project(self, bottleneck, carry):
        return up_project(silu(bottleneck), self.B)

    def dense_weight(self) -> Tensor:
        raise NotImplementedError("CoLA's map is not linear: no matrix has its values")


def activated_lowrank(
    x_BTD: Tensor,
    a_DR: Tensor,
    b_RF: Tensor,
    known: Known | None = None,
    sums: PartialSum | None = None,
) -> Tensor:
    """Return ``silu(x A) B``, (B, T, F) in the compute dtype.

    Args:
        x_BTD: input of the map.
        a_DR, b_RF: the factors; cast to the compute dtype.
        known: ``x A`` and the result, where a recomputation has them: only the graph is made.
        sums: where this is a part of the map: over ``x A``, or its gradient, of the other parts.
    Cost: 2 M R (D + F) FLOPs forward, twice that backward; keeps ``x A`` (M R items) and x.
    Numerics: SiLU and its slope in fp32 inside, rounded once.
    Source: CoLA, the layer.
    """
    x, a_DR, b_RF = cast(x_BTD, a_DR, b_RF)
    z_MR, y_BTF = (rows(known[0]), known[1]) if known else (None, None)
    return _ActivatedLowRank.apply(x, a_DR, b_RF, z_MR, y_BTF, sums)


class _ActivatedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, a_DR, b_RF, z_MR, y_BTF, sums):
        if y_BTF is None:
            z_MR = rows(x_BTD) @ a_DR
            if sums is not None:
                z_MR = sums.forward(z_MR)
            y_BTF = unrows(silu(z_MR) @ b_RF, x_BTD)
        ctx.save_for_backward(x_BTD, z_MR, a_DR, b_RF)
        ctx.sums = sums
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        x_BTD, z_MR, a_DR, b_RF = ctx.saved_tensors
        dy_MF = rows(dy_BTF)
        wants_x, wants_a, wants_b = ctx.needs_input_grad[:3]
        db_RF = silu(z_MR).T @ dy_MF if wants_b else None
        if not (wants_x or wants_a):
            return None, None, db_RF, None, None, None
        dz_MR = torch.ops.aten.silu_backward(dy_MF @ b_RF.T, z_MR)
        if ctx.sums is not None:
            dz_MR = ctx.sums.backward(dz_MR)
        da_DR = rows(x_BTD).T @ dz_MR if wants_a else None
        dx_BTD = unrows(dz_MR @ a_DR.T, x_BTD) if wants_x else None
        return dx_BTD, da_DR, db_RF, None, None, None
