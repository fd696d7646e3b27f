"""LaX's map: low rank with a residual at the bottleneck, as one operation with two results.

With Z = X A + g Z', Y = Z B, and dY and the block above's dZ" given,

    dZ = dY B^T + dZ"    dB = Z^T dY    dA = X^T dZ    dX = dZ A^T    dZ' = g dZ    dg = <dZ, Z'>

Shapes: B batch, T tokens, M = B T rows, D input width, F output width, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crnet.kernels.carried import inner, rows, rows_times, unrows
from crnet.kernels.precision import cast
from crnet.linears._maps import LowRankMap


class LaXMap(LowRankMap):
    """``z = x A + gate carry``, ``y = z B``; A (D, R), B (R, F), gate (1,) or none.

    Hands on z, (B, T, R).
    """

    hands = "bottleneck"
    gate: nn.Parameter | None

    def __init__(self, tensors):
        super().__init__(tensors)
        if "gate" not in tensors:
            self.register_parameter("gate", None)

    def run(self, x_BTD, carry, known):
        z_BTR, y_BTF = known or (None, None)
        return _Crossing.apply(*self._cast(x_BTD, carry), self.gate, z_BTR, y_BTF)

    def down_project(self, x_BTD, carry):
        x, a_DR, _, carry_BTR = self._cast(x_BTD, carry)
        return latent(x, a_DR, carry_BTR, self.gate)

    def _cast(self, x_BTD: Tensor, carry: Tensor | None) -> tuple[Any, Any, Any, Any]:
        x, a_DR, b_RF = cast(x_BTD, self.A, self.B)
        return x, a_DR, b_RF, None if carry is None else carry.to(x.dtype)


def latent(x_BTD: Tensor, a_DR: Tensor, carry_BTR: Tensor | None, gate_1: Tensor | None) -> Tensor:
    """Return ``x A + gate carry``, (B, T, R); without a gate ``x A + carry``. No gradients.

    Args:
        carry_BTR: the bottleneck below, dtype of x; None in the first block.
        gate_1: (1,), cast to the dtype of x.
    Cost: 2 M D R FLOPs.
    Source: arXiv:2505.21732.
    """
    x_MD = rows(x_BTD)
    if carry_BTR is None:
        z_MR = x_MD @ a_DR
    elif gate_1 is None:
        z_MR = torch.addmm(rows(carry_BTR), x_MD, a_DR)
    else:
        z_MR = rows(carry_BTR) * gate_1.to(carry_BTR.dtype)
        torch.addmm(z_MR, x_MD, a_DR, out=z_MR)
    return unrows(z_MR, x_BTD)


class _Crossing(torch.autograd.Function):
    """Keeps x, Z and the factors; with a gate also the gate and the carry."""

    @staticmethod
    def forward(ctx, x_BTD, a_DR, b_RF, carry_BTR, gate_1, z_BTR, y_BTF):
        if y_BTF is None:
            z_BTR = latent(x_BTD, a_DR, carry_BTR, gate_1)
            y_BTF = rows_times(z_BTR, b_RF)
        kept = (carry_BTR, gate_1) if gate_1 is not None else (None, None)
        ctx.save_for_backward(x_BTD, z_BTR, a_DR, b_RF, *kept)
        return y_BTF, z_BTR

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF, dabove_BTR):
        x_BTD, z_BTR, a_DR, b_RF, carry_BTR, gate_1 = ctx.saved_tensors
        wants_x, wants_a, wants_b, wants_carry, wants_gate = ctx.needs_input_grad[:5]
        dy_MF = rows(dy_BTF)
        db_RF = rows(z_BTR).T @ dy_MF if wants_b else None
        dz_MR = torch.addmm(rows(dabove_BTR), dy_MF, b_RF.T)
        da_DR = rows(x_BTD).T @ dz_MR if wants_a else None
        dx_BTD = unrows(dz_MR @ a_DR.T, x_BTD) if wants_x else None
        dgate_1 = inner(dz_MR, rows(carry_BTR)).to(gate_1.dtype).view(1) if wants_gate else None
        dcarry_BTR = None
        if wants_carry:
            dcarry_MR = dz_MR if gate_1 is None else dz_MR * gate_1.to(dz_MR.dtype)
            dcarry_BTR = unrows(dcarry_MR, x_BTD)
        return dx_BTD, da_DR, db_RF, dcarry_BTR, dgate_1, None, None
