"""A pair of factors with an activation between them, its backward by hand.

Autograd would keep the bottleneck twice, before SiLU and after it. Here SiLU is computed once more
in the backward pass; with Z = X A, H = silu(Z) and dY given,

    dH = dY B^T    dB = H^T dY    dZ = dH silu'(Z)    dA = X^T dZ    dX = dZ A^T

Where the bottleneck is repeated along the output too (``_maps.duplicated``), B stands for the sum
of B and that constant: it is made for each product and never kept.

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
from crnet.linears._maps import Known, LowRankMap, duplicated, wider_factors

NOT_LINEAR = "the map has an activation inside and is not linear: no matrix has its values"


class ActivatedMap(LowRankMap):
    """``y = silu(x A) (B + alpha / sqrt(K) E)``; A (D, R), B (R, F), E constant. Its bottleneck is
    ``x A``, before SiLU.

    Args:
        tensors: as declared.
        is_active: whether there is a SiLU.
        alpha: of E; 0: none.
    """

    def __init__(self, tensors, *, is_active: bool = True, alpha: float = 0.0):
        super().__init__(tensors)
        self.is_active = is_active
        self.alpha = alpha

    def run(self, x_BTD, carry, known):
        active, alpha = self.is_active, self.alpha
        output = activated_lowrank(
            x_BTD, self.A, self.B, known, self.sums, is_active=active, alpha=alpha
        )
        return output, output

    def up_project(self, bottleneck, carry):
        hidden = silu(bottleneck) if self.is_active else bottleneck
        return up_project(hidden, duplicated(self.B.to(bottleneck.dtype), self.alpha))

    def dense_weight(self) -> Tensor:
        if self.is_active:
            raise NotImplementedError(NOT_LINEAR)
        return (self.A.detach().float() @ self._whole_b()).T

    def with_update(self, a_DR, b_RF):
        if self.is_active:
            return None  # the activation would be in the update too
        factors = wider_factors(self.A, self._whole_b(), a_DR, b_RF)
        # Of the larger rank the constant is another one.
        return factors | {"B": duplicated(factors["B"], -self.alpha)}

    def _whole_b(self) -> Tensor:
        return duplicated(self.B.detach().float(), self.alpha)


def activated_lowrank(
    x_BTD: Tensor,
    a_DR: Tensor,
    b_RF: Tensor,
    known: Known | None = None,
    sums: PartialSum | None = None,
    *,
    is_active: bool = True,
    alpha: float = 0.0,
) -> Tensor:
    """Return ``silu(x A) (B + alpha / sqrt(K) E)``, (B, T, F) in the compute dtype.

    Args:
        x_BTD: input of the map.
        a_DR, b_RF: the factors; cast to the compute dtype.
        known: ``x A`` and the result, where a recomputation has them: only the graph is made.
        sums: where this is a part of the map: over ``x A``, or its gradient, of the other parts.
        is_active: False: without SiLU.
        alpha, E, K: as in ``_maps.duplicated``.
    Cost: 2 M R (D + F) FLOPs forward, twice that backward; keeps ``x A`` (M R items) and x.
    Numerics: SiLU and its slope in fp32 inside, rounded once.
    Source: CoLA, the layer; arXiv:2606.28932, the repeated bottleneck.
    """
    x, a_DR, b_RF = cast(x_BTD, a_DR, b_RF)
    z_MR, y_BTF = (rows(known[0]), known[1]) if known else (None, None)
    return _ActivatedLowRank.apply(x, a_DR, b_RF, z_MR, y_BTF, sums, is_active, alpha)


class _ActivatedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, a_DR, b_RF, z_MR, y_BTF, sums, is_active, alpha):
        if y_BTF is None:
            z_MR = rows(x_BTD) @ a_DR
            if sums is not None:
                z_MR = sums.forward(z_MR)
            h_MR = silu(z_MR) if is_active else z_MR
            y_BTF = unrows(h_MR @ duplicated(b_RF, alpha), x_BTD)
        ctx.save_for_backward(x_BTD, z_MR, a_DR, b_RF)
        ctx.sums, ctx.is_active, ctx.alpha = sums, is_active, alpha
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        x_BTD, z_MR, a_DR, b_RF = ctx.saved_tensors
        dy_MF = rows(dy_BTF)
        wants_x, wants_a, wants_b = ctx.needs_input_grad[:3]
        h_MR = silu(z_MR) if ctx.is_active else z_MR
        db_RF = h_MR.T @ dy_MF if wants_b else None
        if not (wants_x or wants_a):
            return None, None, db_RF, None, None, None, None, None
        dz_MR = dy_MF @ duplicated(b_RF, ctx.alpha).T
        if ctx.is_active:
            dz_MR = torch.ops.aten.silu_backward(dz_MR, z_MR)
        if ctx.sums is not None:
            dz_MR = ctx.sums.backward(dz_MR)
        da_DR = rows(x_BTD).T @ dz_MR if wants_a else None
        dx_BTD = unrows(dz_MR @ a_DR.T, x_BTD) if wants_x else None
        return dx_BTD, da_DR, db_RF, None, None, None, None, None


def scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale left @ right`` without a pass for the scale. Differentiable by nobody."""
    result = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(result, left, right, beta=0, alpha=scale, out=result)
