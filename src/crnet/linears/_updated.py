"""A matrix and a pair of factors as one operation.

    y = share x W^T + scale (x A) B

One operation, so that a caller who knows the result gets the same node of the graph from it. With
Z = X A and dY given,

    dZ = scale dY B^T    dB = scale Z^T dY    dA = X^T dZ    dX = share dY W + dZ A^T

and, where W is trained, dW = share dY^T X.

Shapes: B batch, T tokens, M = B T rows, D input width, F output width, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crnet.kernels.carried import rows, unrows
from crnet.kernels.partial import left
from crnet.kernels.precision import cast
from crnet.linears._maps import LinearMap


class UpdatedMap(LinearMap):
    """``y = share x W^T + scale (x A) B``; ``weight`` W (F, D), A (D, R), B (R, F).

    The output does not follow from ``x A`` alone, and the graph keeps ``x A`` too: the bottleneck
    is both, side by side. Of a map in parts, split by rows, ``x A`` is one process's summand.
    """

    comes_apart = True
    weight: nn.Parameter
    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, tensors, scale: float, share: float = 1.0):
        super().__init__(tensors)
        self.scale, self.matrix_share = scale, share

    def run(self, x_BTD, carry, known):
        x, weight_FD, a_DR, b_RF = self._cast(x_BTD)
        z_MR = rows(known[0][..., self.B.shape[1] :]).contiguous() if known else None
        y_BTF = known and known[1]
        numbers = self.matrix_share, self.scale
        output = _Updated.apply(x, weight_FD, a_DR, b_RF, *numbers, z_MR, y_BTF)
        if self.sums and not known:
            output = left(output, self.sums.group)
        return output, output

    def down_project(self, x_BTD, carry):
        x, weight_FD, a_DR, b_RF = self._cast(x_BTD)
        numbers = self.matrix_share, self.scale
        z_MR, y_MF = _products(rows(x), weight_FD, a_DR, b_RF, *numbers)
        if self.sums:
            y_MF = self.sums.forward(y_MF)
        return unrows(torch.cat((y_MF, z_MR), -1), x)

    def up_project(self, bottleneck, carry):
        return bottleneck[..., : self.B.shape[1]].contiguous()

    def matrix(self) -> Tensor:
        """W, (F, D)."""
        return self.weight

    def _cast(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        return cast(x_BTD, self.matrix(), self.A, self.B)

    def merged(self) -> Tensor:
        """``share W + scale (A B)^T``, (F, D), in fp32 or better."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        weight_FD, a_DR, b_RF = (p.detach().to(dtype) for p in (self.matrix(), self.A, self.B))
        share, scale = self.matrix_share, self.scale
        return torch.addmm(weight_FD, b_RF.T, a_DR.T, beta=share, alpha=scale)

    def dense_weight(self) -> Tensor:
        return self.merged().float()


def _products(
    x_MD: Tensor, weight_FD: Tensor, a_DR: Tensor, b_RF: Tensor, share: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Z (M, R) and the output (M, F). Cost: 2 M (D F + R (D + F)) FLOPs."""
    z_MR, y_MF = x_MD @ a_DR, x_MD @ weight_FD.T
    return z_MR, torch.addmm(y_MF, z_MR, b_RF, beta=share, alpha=scale, out=y_MF)


class _Updated(torch.autograd.Function):
    """Keeps x, Z and the weights."""

    @staticmethod
    def forward(ctx, x_BTD, weight_FD, a_DR, b_RF, share, scale, z_MR, y_BTF):
        if y_BTF is None:
            z_MR, y_MF = _products(rows(x_BTD), weight_FD, a_DR, b_RF, share, scale)
            y_BTF = unrows(y_MF, x_BTD)
        ctx.save_for_backward(x_BTD, z_MR, weight_FD, a_DR, b_RF)
        ctx.share, ctx.scale = share, scale
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        x_BTD, z_MR, weight_FD, a_DR, b_RF = ctx.saved_tensors
        x_MD, dy_MF = rows(x_BTD), rows(dy_BTF)
        wants_x, wants_weight, wants_a, wants_b = ctx.needs_input_grad[:4]
        db_RF = (z_MR.T @ dy_MF).mul_(ctx.scale) if wants_b else None
        dz_MR = (dy_MF @ b_RF.T).mul_(ctx.scale)
        dweight_FD = dy_MF.T @ x_MD if wants_weight else None
        if dweight_FD is not None and ctx.share != 1:
            dweight_FD.mul_(ctx.share)
        da_DR = x_MD.T @ dz_MR if wants_a else None
        dx_MD = dy_MF @ weight_FD if wants_x else None
        if dx_MD is not None:
            torch.addmm(dx_MD, dz_MR, a_DR.T, beta=ctx.share, out=dx_MD)
        dx_BTD = None if dx_MD is None else unrows(dx_MD, x_BTD)
        return dx_BTD, dweight_FD, da_DR, db_RF, None, None, None, None
