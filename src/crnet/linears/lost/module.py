"""LOST's map as one operation, and the channels it begins with.

With H = silu(X A), X_I the chosen columns of X, g = gamma and dY given,

    dB = g H^T dY    dH = g dY B^T    dZ = dH silu'(Z)    dA = X^T dZ    dC = (1 - g) dY^T X_I
    dX = dZ A^T, and (1 - g) dY C added to its columns I

Scales stand in the products; the second product of the forward pass accumulates onto the first.

Shapes: B batch, T tokens, M = B T rows, D input width, F output width, R rank, S chosen channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from crnet.kernels.carried import rows, unrows
from crnet.kernels.precision import cast
from crnet.linears._activated import NOT_LINEAR, scaled_product
from crnet.linears._maps import LinearMap, drawn_triples, wider_factors
from crnet.specs import Slot


class LOSTMap(LinearMap):
    """``y = gamma silu(x A) B + (1 - gamma) x_I C^T``; A (D, R), B (R, F), ``columns`` C (F, S),
    ``index`` I (S,) int32.

    The output follows from ``x A`` and ``x_I``: the bottleneck is both, side by side.
    """

    comes_apart = True
    A: nn.Parameter
    B: nn.Parameter
    columns: nn.Parameter
    index: nn.Parameter

    def __init__(self, tensors, gamma: float, is_active: bool):
        super().__init__(tensors)
        self.gamma, self.is_active = gamma, is_active

    def run(self, x_BTD, carry, known):
        x, a_DR, b_RF, c_FS = cast(x_BTD, self.A, self.B, self.columns)
        z_MR = rows(known[0][..., : a_DR.shape[1]]).contiguous() if known else None
        y_BTF = known and known[1]
        how = (self.index, self.gamma, self.is_active)
        output = _LOST.apply(x, a_DR, b_RF, c_FS, z_MR, y_BTF, *how)
        return output, output

    def down_project(self, x_BTD, carry):
        x, a_DR = cast(x_BTD, self.A)
        z_MR, x_MS = _inner(rows(x), a_DR, self.index)
        return unrows(torch.cat((z_MR, x_MS), -1), x)

    def up_project(self, bottleneck, carry):
        rank = self.A.shape[1]
        z_MR, x_MS = (rows(each).contiguous() for each in bottleneck.tensor_split([rank], -1))
        b_RF, c_FS = (each.to(bottleneck.dtype) for each in (self.B, self.columns))
        y_MF = _output(z_MR, x_MS, b_RF, c_FS, self.gamma, self.is_active)
        return unrows(y_MF, bottleneck)

    def dense_weight(self) -> Tensor:
        if self.is_active:
            raise NotImplementedError(NOT_LINEAR)
        a_DR, b_RF, c_FS = (each.detach().float() for each in (self.A, self.B, self.columns))
        weight_FD = scaled_product(b_RF.T, a_DR.T, self.gamma)
        return weight_FD.index_add_(1, self.index, c_FS, alpha=1 - self.gamma)

    def with_update(self, a_DR, b_RF):
        if self.is_active:
            return None  # the activation would be in the update too
        factors = wider_factors(self.A, self.B, a_DR, b_RF / self.gamma)
        return factors | {"columns": self.columns.detach().float(), "index": self.index.detach()}


def _inner(x_MD: Tensor, a_DR: Tensor, index_S: Tensor) -> tuple[Tensor, Tensor]:
    """Z (M, R) and the chosen columns of x (M, S)."""
    return x_MD @ a_DR, x_MD.index_select(1, index_S)


def _output(
    z_MR: Tensor, x_MS: Tensor, b_RF: Tensor, c_FS: Tensor, gamma: float, is_active: bool
) -> Tensor:
    """(M, F). Cost: 2 M F (R + S) FLOPs."""
    h_MR, y_MF = silu(z_MR) if is_active else z_MR, x_MS @ c_FS.T
    return torch.addmm(y_MF, h_MR, b_RF, beta=1 - gamma, alpha=gamma, out=y_MF)


class _LOST(torch.autograd.Function):
    """Keeps x, Z and the weights."""

    @staticmethod
    def forward(ctx, x_BTD, a_DR, b_RF, c_FS, z_MR, y_BTF, index_S, gamma, is_active):
        if y_BTF is None:
            z_MR, x_MS = _inner(rows(x_BTD), a_DR, index_S)
            y_BTF = unrows(_output(z_MR, x_MS, b_RF, c_FS, gamma, is_active), x_BTD)
        ctx.save_for_backward(x_BTD, z_MR, a_DR, b_RF, c_FS, index_S)
        ctx.gamma, ctx.is_active = gamma, is_active
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        x_BTD, z_MR, a_DR, b_RF, c_FS, index_S = ctx.saved_tensors
        wants_x, wants_a, wants_b, wants_c = ctx.needs_input_grad[:4]
        x_MD, dy_MF, gamma = rows(x_BTD), rows(dy_BTF), ctx.gamma
        da_DR = db_RF = dc_FS = dx_BTD = None
        if wants_c:
            # The narrow side first: the product in the other order took twelve times as long.
            dc_FS = scaled_product(x_MD.index_select(1, index_S).T, dy_MF, 1 - gamma).T
        if wants_b:
            h_MR = silu(z_MR) if ctx.is_active else z_MR
            db_RF = scaled_product(h_MR.T, dy_MF, gamma)
            del h_MR
        if wants_x or wants_a:
            dz_MR = scaled_product(dy_MF, b_RF.T, gamma)
            if ctx.is_active:
                dz_MR = torch.ops.aten.silu_backward(dz_MR, z_MR)
            da_DR = x_MD.T @ dz_MR if wants_a else None
            if wants_x:
                dx_MD = dz_MR @ a_DR.T
                dx_MD.index_add_(1, index_S.long(), (c_FS.T @ dy_MF.T).T, alpha=1 - gamma)
                dx_BTD = unrows(dx_MD, x_BTD)
        return dx_BTD, da_DR, db_RF, dc_FS, None, None, None, None, None


def chosen_channels(
    in_size: int,
    rank: int,
    out_size: int,
    std: float,
    seed: int,
    count: int,
    num_triples: int | None = None,
) -> Tensor:
    """The input channels, ascending, int32, whose columns are largest (l2) in a drawn matrix less
    its top singular triples.

    Args:
        num_triples: how many triples behind the top ``rank`` are looked at; None: all.
    Cost: of ``drawn_triples``.
    """
    _, left_DK, values_K, _ = drawn_triples(in_size, out_size, std, seed)
    behind = slice(rank, None if num_triples is None else rank + num_triples)
    # Right vectors are orthonormal: the norm of a column is that of its coordinates.
    norms_D = (left_DK[:, behind] * values_K[behind]).norm(dim=1)
    return norms_D.argsort(descending=True, stable=True)[:count].sort().values.int()


def columns_of(slot: Slot, index_S: Tensor, seed: int) -> Tensor:
    """(F, S): those channels' columns of the drawn matrix."""
    dense_DF, *_ = drawn_triples(slot.in_size, slot.out_size, slot.init_std, seed)
    return dense_DF[index_S].T.contiguous()
