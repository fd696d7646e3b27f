"""BLAST's map as one operation.

The bottlenecks of all blocks lie as (R, N, M): then mixing them is one batched product whose inner
loop runs along the rows, and every product with a block reads and writes parts of larger matrices
where they stand. With Z_j = V_j^T X_j^T, W_i = sum_j s_ij Z_j and dY given,

    dU_i^T = W_i dY_i    dW_i = U_i^T dY_i^T    ds_ij = <dW_i, Z_j> along the rows
    dZ_j = sum_i s_ij dW_i    dV_j = X_j^T dZ_j^T    dX_j = dZ_j^T V_j^T

Nothing is kept but x: Z and W, N R wide each, are made once more in the backward pass. Refused:
keeping Z, often wider than the output, for a sixth of a step's products; elementwise sums over
(M, N, R), which took two to three times as long as the batched product on a CPU. There rows are
taken in turns, so that Z, W and their gradients stay in the cache.

Shapes: B batch, T tokens, M = B T rows, D input width, F output width, R rank, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crnet.kernels.carried import rows, unrows
from crnet.kernels.precision import cast
from crnet.linears._maps import LinearMap, wider_factors

ROWS_AT_ONCE = 1024
"""On a CPU."""


class BLASTMap(LinearMap):
    """``y_i = sum_j (x_j A_j * s_ij) B_i``; A (D, R), B (R, F), s (R, N, N).

    The bottlenecks of its blocks are N R wide, often more than the output: the output itself stands
    for them.
    """

    comes_apart = True
    A: nn.Parameter
    B: nn.Parameter
    s: nn.Parameter

    def run(self, x_BTD, carry, known):
        output = _BLAST.apply(*cast(x_BTD, self.A, self.B, self.s), known and known[1])
        return output, output

    def dense_weight(self) -> Tensor:
        a_DR, b_RF, s_RNN = (each.detach().float() for each in (self.A, self.B, self.s))
        parts = _cut(a_DR, s_RNN, 0), _cut(b_RF, s_RNN, 1)
        return torch.cat(
            [
                torch.cat([(a * s_RNN[:, i, j] @ b).T for j, a in enumerate(parts[0])], 1)
                for i, b in enumerate(parts[1])
            ]
        )

    def with_update(self, a_DR, b_RF):
        s_RNN = self.s.detach().float()
        ones = s_RNN.new_ones(a_DR.shape[1], *s_RNN.shape[1:])
        return wider_factors(self.A, self.B, a_DR, b_RF) | {"s": torch.cat([s_RNN, ones])}


def _cut(tensor: Tensor, s_RNN: Tensor, dim: int) -> tuple[Tensor, ...]:
    """A matrix in as many parts along a dimension as there are blocks."""
    return tensor.tensor_split(s_RNN.shape[1], dim)


def _bottlenecks(left_MK: Tensor, right_KR: Tensor, s_RNN: Tensor) -> Tensor:
    """(R, N, M): the products of the N parts of both. Cost: 2 M K R FLOPs."""
    found = left_MK.new_empty(s_RNN.shape[0], s_RNN.shape[1], left_MK.shape[0])
    parts = zip(_cut(left_MK, s_RNN, 1), _cut(right_KR, s_RNN, 0), strict=True)
    for idx, (left, right) in enumerate(parts):
        torch.mm(right.T, left.T, out=found[:, idx])
    return found


def _write_outputs(result_MK: Tensor, latent_RNM: Tensor, right_RK: Tensor, s_RNN: Tensor) -> None:
    """Each part of the bottlenecks by its part of the factor. Cost: 2 M K R FLOPs."""
    parts = zip(_cut(result_MK, s_RNN, 1), _cut(right_RK, s_RNN, 1), strict=True)
    for idx, (output, right) in enumerate(parts):
        torch.mm(latent_RNM[:, idx].T, right, out=output)


def _add_factor(
    sum_RK: Tensor, latent_RNM: Tensor, other_MK: Tensor, s_RNN: Tensor, is_first: bool
) -> None:
    """Each part of the bottlenecks by its part of the other side, summed over rows."""
    parts = zip(_cut(sum_RK, s_RNN, 1), _cut(other_MK, s_RNN, 1), strict=True)
    for idx, (output, other) in enumerate(parts):
        torch.addmm(output, latent_RNM[:, idx], other, beta=1 - is_first, out=output)


def _in_turns(rows_MK: Tensor) -> tuple[Tensor, ...]:
    """The rows, as many at once as leave the bottlenecks in a CPU's cache; on a GPU all of them."""
    return rows_MK.split(ROWS_AT_ONCE) if rows_MK.device.type == "cpu" else (rows_MK,)


class _BLAST(torch.autograd.Function):
    """Keeps x and the weights."""

    @staticmethod
    def forward(ctx, x_BTD, a_DR, b_RF, s_RNN, y_BTF):
        if y_BTF is None:
            x_MD = rows(x_BTD)
            y_MF = x_MD.new_empty(len(x_MD), b_RF.shape[1])
            for x, y in zip(_in_turns(x_MD), _in_turns(y_MF), strict=True):
                w_RNM = torch.bmm(s_RNN, _bottlenecks(x, a_DR, s_RNN))
                _write_outputs(y, w_RNM, b_RF, s_RNN)
            y_BTF = unrows(y_MF, x_BTD)
        ctx.save_for_backward(x_BTD, a_DR, b_RF, s_RNN)
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        x_BTD, a_DR, b_RF, s_RNN = ctx.saved_tensors
        x_MD, dy_MF = rows(x_BTD), rows(dy_BTF)
        wanted = zip((x_MD, a_DR.T, b_RF, s_RNN), ctx.needs_input_grad[:4], strict=True)
        dx_MD, da_RD, db_RF, ds_RNN = found = [
            torch.empty_like(each, memory_format=torch.contiguous_format) if is_wanted else None
            for each, is_wanted in wanted
        ]
        turns = zip(_in_turns(x_MD), _in_turns(dy_MF), strict=True)
        for idx, (x, dy) in enumerate(turns):
            dx = None if dx_MD is None else _in_turns(dx_MD)[idx]
            _add_gradients((dx, da_RD, db_RF, ds_RNN), x, dy, (a_DR, b_RF, s_RNN), idx == 0)
        dx_BTD = None if dx_MD is None else unrows(dx_MD, x_BTD)
        da_DR = None if da_RD is None else da_RD.T
        return dx_BTD, da_DR, *found[2:], None


def _add_gradients(
    found: tuple[Tensor | None, ...],
    x_MD: Tensor,
    dy_MF: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    is_first: bool,
) -> None:
    """Of some rows: dX is written, the gradients of the weights grow, as far as they are wanted."""
    (dx_MD, da_RD, db_RF, ds_RNN), (a_DR, b_RF, s_RNN) = found, weights
    dw_RNM = _bottlenecks(dy_MF, b_RF.T, s_RNN)
    if db_RF is not None or ds_RNN is not None:
        z_RNM = _bottlenecks(x_MD, a_DR, s_RNN)
        if ds_RNN is not None:
            across = z_RNM.transpose(1, 2)
            torch.baddbmm(ds_RNN, dw_RNM, across, beta=1 - is_first, out=ds_RNN)
        if db_RF is not None:
            _add_factor(db_RF, torch.bmm(s_RNN, z_RNM), dy_MF, s_RNN, is_first)
        del z_RNM
    if dx_MD is None and da_RD is None:
        return
    dz_RNM = torch.bmm(s_RNN.transpose(1, 2), dw_RNM)
    if da_RD is not None:
        _add_factor(da_RD, dz_RNM, x_MD, s_RNN, is_first)
    if dx_MD is not None:
        _write_outputs(dx_MD, dz_RNM, a_DR.T, s_RNN)
