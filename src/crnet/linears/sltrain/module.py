"""SLTrain's map: the dense matrix is built for every product and never kept.

With s the scale, W = s (A B)^T + scatter(values), G = dY^T X the gradient of W,

    dX = dY W    dA = s G^T B^T    dB = s A^T G^T    dvalues = G at the support

The backward pass builds W once more instead of keeping it; W is dropped before G is made. Refused:
``torch.sparse`` products, slower than dense ones at a few percent of items.

Shapes: B batch, T tokens, M = B T rows, D input width, F output width, R rank, S support.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crnet.kernels.carried import rows, rows_times
from crnet.kernels.precision import cast
from crnet.linears._maps import LinearMap


class SLTrainMap(LinearMap):
    """``y = x W^T``; A (D, R), B (R, F), ``values`` (S,), ``index`` (S,) int32."""

    comes_apart = True
    A: nn.Parameter
    B: nn.Parameter
    values: nn.Parameter
    index: nn.Parameter

    def __init__(self, tensors, scale: float):
        super().__init__(tensors)
        self.scale = scale

    def run(self, x_BTD, carry, known):
        x, a_DR, b_RF, values_S = cast(x_BTD, self.A, self.B, self.values)
        y_BTF = known and known[1]
        output = _SLTrain.apply(x, a_DR, b_RF, values_S, self.index, self.scale, y_BTF)
        return output, output

    def dense_weight(self) -> Tensor:
        a_DR, b_RF, values_S = (p.detach().float() for p in (self.A, self.B, self.values))
        return build_weight(a_DR, b_RF, values_S, self.index, self.scale)


def build_weight(
    a_DR: Tensor, b_RF: Tensor, values_S: Tensor, index_S: Tensor, scale: float
) -> Tensor:
    """Return ``scale (A B)^T + scatter(values)``, (F, D), dtype of the factors. No gradients.

    Args:
        values_S, index_S: what is added where; positions in the result read row by row.
    Cost: 2 R D F FLOPs; allocates D F items.
    """
    weight_FD = a_DR.new_empty(b_RF.shape[1], a_DR.shape[0])
    torch.addmm(weight_FD, b_RF.T, a_DR.T, beta=0, alpha=scale, out=weight_FD)
    weight_FD.view(-1).index_add_(0, index_S, values_S)
    return weight_FD


class _SLTrain(torch.autograd.Function):
    """Keeps x, the factors, the values and the index."""

    @staticmethod
    def forward(ctx, x_BTD, a_DR, b_RF, values_S, index_S, scale, y_BTF):
        if y_BTF is None:
            weight_FD = build_weight(a_DR, b_RF, values_S, index_S, scale)
            y_BTF = rows_times(x_BTD, weight_FD.T)
        ctx.save_for_backward(x_BTD, a_DR, b_RF, values_S, index_S)
        ctx.scale = scale
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        x_BTD, a_DR, b_RF, values_S, index_S = ctx.saved_tensors
        wants_x, wants_a, wants_b, wants_values = ctx.needs_input_grad[:4]
        dx_BTD = da_DR = db_RF = dvalues_S = None
        if wants_x:
            weight_FD = build_weight(a_DR, b_RF, values_S, index_S, ctx.scale)
            dx_BTD = rows_times(dy_BTF, weight_FD)
            del weight_FD
        if wants_a or wants_b or wants_values:
            dweight_FD = rows(dy_BTF).T @ rows(x_BTD)
            da_DR = (dweight_FD.T @ b_RF.T).mul_(ctx.scale) if wants_a else None
            db_RF = (a_DR.T @ dweight_FD.T).mul_(ctx.scale) if wants_b else None
            if wants_values:
                dvalues_S = dweight_FD.reshape(-1).index_select(0, index_S)
        return dx_BTD, da_DR, db_RF, dvalues_S, None, None, None
