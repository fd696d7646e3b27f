"""FOSL's map as one operation.

With H = silu(X A), U = (X W_b^T) c, a and b the two scales and dY given,

    dB = a H^T dY    dH = a dY B^T    dZ = dH silu'(Z)    dA = X^T dZ
    dU_j = c_j times the sum of dY over the columns that copy j
    dW_b = b dU^T X    dX = dZ A^T + b dU W_b

Scales stand in the products. Copies are gathered and added up by their index: a product with the
matrix of ones and zeros that says the same took two to nine times as long on a CPU.

Shapes: B batch, T tokens, M = B T rows, D input width, F output width, R rank, S computed outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from crnet.kernels.carried import rows, unrows
from crnet.kernels.precision import cast
from crnet.linears._activated import NOT_LINEAR, scaled_product
from crnet.linears._maps import LinearMap


class FOSLMap(LinearMap):
    """``y = a silu(x A) B + b (x W_b^T c)[index]``; A (D, R), B (R, F), ``base`` W_b (S, D),
    ``scale`` c (S,), ``index`` (F,) int32.

    The output follows from ``x A`` and ``x W_b^T c``: the bottleneck is both, side by side.
    """

    comes_apart = True
    is_active = True
    A: nn.Parameter
    B: nn.Parameter
    base: nn.Parameter
    scale: nn.Parameter
    index: nn.Parameter

    def __init__(self, tensors, of_factors: float, of_copies: float):
        super().__init__(tensors)
        self.scales = (of_factors, of_copies)

    def run(self, x_BTD, carry, known):
        x, a_DR, b_RF, base_SD = cast(x_BTD, self.A, self.B, self.base)
        z_MR = rows(known[0][..., : a_DR.shape[1]]).contiguous() if known else None
        y_BTF = known and known[1]
        how = (self.scale, self.index, self.scales)
        output = _FOSL.apply(x, a_DR, b_RF, base_SD, z_MR, y_BTF, *how)
        return output, output

    def down_project(self, x_BTD, carry):
        x, a_DR, base_SD = cast(x_BTD, self.A, self.base)
        z_MR, u_MS = _inner(rows(x), a_DR, base_SD, self.scale)
        return unrows(torch.cat((z_MR, u_MS), -1), x)

    def up_project(self, bottleneck, carry):
        rank = self.A.shape[1]
        z_MR, u_MS = (rows(each).contiguous() for each in bottleneck.tensor_split([rank], -1))
        y_MF = _output(z_MR, u_MS, self.B.to(bottleneck.dtype), self.index, self.scales)
        return unrows(y_MF, bottleneck)

    def dense_weight(self) -> Tensor:
        raise NotImplementedError(NOT_LINEAR)


def _inner(x_MD: Tensor, a_DR: Tensor, base_SD: Tensor, scale_S: Tensor) -> tuple[Tensor, Tensor]:
    """Z (M, R) and U (M, S)."""
    return x_MD @ a_DR, (x_MD @ base_SD.T).mul_(scale_S)


def _output(
    z_MR: Tensor, u_MS: Tensor, b_RF: Tensor, index_F: Tensor, scales: tuple[float, float]
) -> Tensor:
    """(M, F). Cost: 2 M F R FLOPs and a gather of M F items."""
    of_factors, of_copies = scales
    h_MR, y_MF = silu(z_MR), u_MS.index_select(1, index_F)
    return torch.addmm(y_MF, h_MR, b_RF, beta=of_copies, alpha=of_factors, out=y_MF)


def _added_up(dy_MF: Tensor, index_F: Tensor, width: int) -> Tensor:
    """(M, S): to each computed output, the gradients of its copies.

    Permutation by permutation: each adds to a column once, in a fixed order on any device. By an
    index of 64 bits: one of 32 took five times as long on a CPU.
    """
    first, *others = dy_MF.split(width, 1)
    du_MS = first.clone(memory_format=torch.contiguous_format)
    wide_index = index_F[width:].long()
    for part, columns in zip(wide_index.split(width), others, strict=False):
        du_MS.index_add_(1, part, columns)
    return du_MS


class _FOSL(torch.autograd.Function):
    """Keeps x, Z and the weights."""

    @staticmethod
    def forward(ctx, x_BTD, a_DR, b_RF, base_SD, z_MR, y_BTF, scale_S, index_F, scales):
        if y_BTF is None:
            z_MR, u_MS = _inner(rows(x_BTD), a_DR, base_SD, scale_S)
            y_BTF = unrows(_output(z_MR, u_MS, b_RF, index_F, scales), x_BTD)
        ctx.save_for_backward(x_BTD, z_MR, a_DR, b_RF, base_SD, scale_S, index_F)
        ctx.scales = scales
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        x_BTD, z_MR, a_DR, b_RF, base_SD, scale_S, index_F = ctx.saved_tensors
        wants_x, wants_a, wants_b, wants_base = ctx.needs_input_grad[:4]
        (of_factors, of_copies), x_MD, dy_MF = ctx.scales, rows(x_BTD), rows(dy_BTF)
        da_DR = db_RF = dbase_SD = dx_MD = du_MS = None
        if wants_b:
            db_RF = scaled_product(silu(z_MR).T, dy_MF, of_factors)
        if wants_x or wants_a:
            dh_MR = scaled_product(dy_MF, b_RF.T, of_factors)
            dz_MR = torch.ops.aten.silu_backward(dh_MR, z_MR)
            da_DR = x_MD.T @ dz_MR if wants_a else None
            dx_MD = dz_MR @ a_DR.T if wants_x else None
            del dh_MR, dz_MR
        if wants_x or wants_base:
            du_MS = _added_up(dy_MF, index_F, base_SD.shape[0]).mul_(scale_S)
            dbase_SD = scaled_product(du_MS.T, x_MD, of_copies) if wants_base else None
        if dx_MD is None or du_MS is None:
            return None, da_DR, db_RF, dbase_SD, None, None, None, None, None
        torch.addmm(dx_MD, du_MS, base_SD, alpha=of_copies, out=dx_MD)
        return unrows(dx_MD, x_BTD), da_DR, db_RF, dbase_SD, None, None, None, None, None
