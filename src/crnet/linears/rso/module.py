"""RSO's map: a frozen matrix and a trained update in a frozen subspace as one operation.

With Z = X P and dY given,

    dB = Z^T dY    dX = dY W + (dY B^T) P^T

Neither needs x, which is not kept.

Shapes: B batch, T tokens, M = B T rows, D input width, F output width, R rank.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable

from crnet.kernels.carried import rows, unrows
from crnet.kernels.precision import cast
from crnet.linears._maps import LinearMap
from crnet.specs import Forget


class RSOMap(LinearMap):
    """``y = x W^T + (x P) B``; ``weight`` W (F, D) and ``P`` (D, R) frozen, B (R, F).

    The output does not follow from ``x P`` alone, and the graph keeps that too: the bottleneck is
    both, side by side.
    """

    comes_apart = True
    weight: nn.Parameter
    P: nn.Parameter
    B: nn.Parameter

    def run(self, x_BTD, carry, known):
        x, weight_FD, p_DR, b_RF = cast(x_BTD, self.weight, self.P, self.B)
        z_MR = rows(known[0][..., self.B.shape[1] :]).contiguous() if known else None
        output = _Subspace.apply(x, weight_FD, p_DR, b_RF, z_MR, known and known[1])
        return output, output

    def down_project(self, x_BTD, carry):
        x, *weights = cast(x_BTD, self.weight, self.P, self.B)
        z_MR, y_MF = _products(rows(x), *weights)
        return unrows(torch.cat((y_MF, z_MR), -1), x)

    def up_project(self, bottleneck, carry):
        return bottleneck[..., : self.B.shape[1]].contiguous()

    @torch.no_grad()
    def run_event(self, event: str, generator: Generator) -> tuple[Forget, ...]:
        """restart: W takes the update in, B is zero, P drawn anew: the function stays as it was.

        Numerics: the sum in fp32 or better, then one rounding to the dtype of W.
        """
        assert event == "restart", event
        self.weight.copy_(self._sum())
        self.B.zero_()
        self.P.copy_(
            torch.empty(self.P.shape).normal_(0, self.P.shape[1] ** -0.5, generator=generator)
        )
        return (Forget("B", restarts=True),)

    def _sum(self) -> Tensor:
        """``W + (P B)^T``, (F, D), in fp32 or better."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight_FD, p_DR, b_RF = (p.detach().to(dtype) for p in (self.weight, self.P, self.B))
        return torch.addmm(weight_FD, b_RF.T, p_DR.T)

    def dense_weight(self) -> Tensor:
        return self._sum().float()


def _products(x_MD: Tensor, weight_FD: Tensor, p_DR: Tensor, b_RF: Tensor) -> tuple[Tensor, Tensor]:
    """Z (M, R) and the output (M, F). Cost: 2 M (D F + R (D + F)) FLOPs."""
    z_MR, y_MF = x_MD @ p_DR, x_MD @ weight_FD.T
    return z_MR, torch.addmm(y_MF, z_MR, b_RF, out=y_MF)


class _Subspace(torch.autograd.Function):
    """Keeps Z and the weights."""

    @staticmethod
    def forward(ctx, x_BTD, weight_FD, p_DR, b_RF, z_MR, y_BTF):
        if y_BTF is None:
            z_MR, y_MF = _products(rows(x_BTD), weight_FD, p_DR, b_RF)
            y_BTF = unrows(y_MF, x_BTD)
        ctx.save_for_backward(z_MR, weight_FD, p_DR, b_RF)
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        z_MR, weight_FD, p_DR, b_RF = ctx.saved_tensors
        dy_MF, (wants_x, _, _, wants_b) = rows(dy_BTF), ctx.needs_input_grad[:4]
        db_RF = z_MR.T @ dy_MF if wants_b else None
        dx_BTD = None
        if wants_x:
            dz_MR, dx_MD = dy_MF @ b_RF.T, dy_MF @ weight_FD
            dx_BTD = unrows(torch.addmm(dx_MD, dz_MR, p_DR.T, out=dx_MD), dy_BTF)
        return dx_BTD, None, None, db_RF, None, None
