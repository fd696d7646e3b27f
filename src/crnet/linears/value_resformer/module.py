"""The map of values that mixes in the first block's.

Autograd would keep the product x W^T for the gradient of lambda2. It is not needed: with
G = dY^T X, which the gradient of W needs anyway, ``dlambda2 = <dY, X W^T> = <G, W>``; and

    dX = lambda2 dY W    dW = lambda2 G    dcarry = lambda1 dY    dlambda1 = <dY, carry>

Shapes: B batch, T tokens, M = B T rows, D input width, F output width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crnet.kernels.carried import inner, rows, rows_times, unrows
from crnet.kernels.precision import cast
from crnet.linears._maps import LinearMap


class MixedValueMap(LinearMap):
    """``y = lambda1 carry + lambda2 x W^T``; ``weight`` (F, D), both lambdas (1,)."""

    comes_apart = True
    weight: nn.Parameter
    lambda1: nn.Parameter
    lambda2: nn.Parameter

    def run(self, x_BTD, carry, known):
        assert carry is not None, "values above the first block read those of the first"
        x, weight_FD, carry_BTF = cast(x_BTD, self.weight, carry)
        gains, y_BTF = (self.lambda1, self.lambda2), known and known[1]
        output = _MixedValue.apply(x, weight_FD, carry_BTF, *gains, y_BTF)
        return output, output

    def dense_weight(self) -> Tensor:
        return self.lambda2.detach().float() * self.weight.detach().float()


class _MixedValue(torch.autograd.Function):
    """Keeps x, the weight, the carry, and both lambdas in their own dtype."""

    @staticmethod
    def forward(ctx, x_BTD, weight_FD, carry_BTF, lambda1, lambda2, y_BTF):
        if y_BTF is None:
            y_BTF = rows_times(x_BTD, weight_FD.T).mul_(lambda2.to(x_BTD.dtype))
            y_BTF.addcmul_(carry_BTF, lambda1.to(x_BTD.dtype))
        ctx.save_for_backward(x_BTD, weight_FD, carry_BTF, lambda1, lambda2)
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        x_BTD, weight_FD, carry_BTF, lambda1, lambda2 = ctx.saved_tensors
        dy_MF, carry_MF = rows(dy_BTF), rows(carry_BTF)
        wants_x, wants_weight, wants_carry, wants_1, wants_2 = ctx.needs_input_grad[:5]
        gain1, gain2 = lambda1.to(dy_MF.dtype), lambda2.to(dy_MF.dtype)
        dcarry_BTF = unrows(dy_MF * gain1, x_BTD) if wants_carry else None
        dlambda1 = inner(dy_MF, carry_MF).to(lambda1.dtype).view(1) if wants_1 else None
        dx_BTD = rows_times(dy_BTF, weight_FD).mul_(gain2) if wants_x else None
        dweight_FD = dlambda2 = None
        if wants_weight or wants_2:
            dweight_FD = dy_MF.T @ rows(x_BTD)
            if wants_2:
                dlambda2 = inner(dweight_FD, weight_FD).to(lambda2.dtype).view(1)
            dweight_FD = dweight_FD.mul_(gain2) if wants_weight else None
        return dx_BTD, dweight_FD, dcarry_BTF, dlambda1, dlambda2, None
