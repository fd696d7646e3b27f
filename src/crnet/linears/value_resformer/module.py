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

from crnet.kernels.carried import inner, rows
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
        y_MF = rows(known[1]) if known else None
        gains = self.lambda1, self.lambda2
        y_MF = _MixedValue.apply(rows(x), weight_FD, rows(carry_BTF), *gains, y_MF)
        output = y_MF.view(*x.shape[:-1], -1)
        return output, output

    def dense_weight(self) -> Tensor:
        return self.lambda2.detach().float() * self.weight.detach().float()


class _MixedValue(torch.autograd.Function):
    """Keeps x, the weight, the carry, and both lambdas in their own dtype."""

    @staticmethod
    def forward(ctx, x_MD, weight_FD, carry_MF, lambda1, lambda2, y_MF):
        if y_MF is None:
            y_MF = nn.functional.linear(x_MD, weight_FD).mul_(lambda2.to(x_MD.dtype))
            y_MF.addcmul_(carry_MF, lambda1.to(x_MD.dtype))
        ctx.save_for_backward(x_MD, weight_FD, carry_MF, lambda1, lambda2)
        return y_MF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MF):
        x_MD, weight_FD, carry_MF, lambda1, lambda2 = ctx.saved_tensors
        wants_x, wants_weight, wants_carry, wants_1, wants_2 = ctx.needs_input_grad[:5]
        gain1, gain2 = lambda1.to(dy_MF.dtype), lambda2.to(dy_MF.dtype)
        dcarry_MF = dy_MF * gain1 if wants_carry else None
        dlambda1 = inner(dy_MF, carry_MF).to(lambda1.dtype).view(1) if wants_1 else None
        dx_MD = (dy_MF @ weight_FD).mul_(gain2) if wants_x else None
        dweight_FD = dlambda2 = None
        if wants_weight or wants_2:
            dweight_FD = dy_MF.T @ x_MD
            if wants_2:
                dlambda2 = inner(dweight_FD, weight_FD).to(lambda2.dtype).view(1)
            dweight_FD = dweight_FD.mul_(gain2) if wants_weight else None
        return dx_MD, dweight_FD, dcarry_MF, dlambda1, dlambda2, None
