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

from crnet.kernels.carried import inner, rows
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
        x, a_DR, b_RF, carry_MR = self._cast(x_BTD, carry)
        z_MR, y_MF = (rows(tensor) for tensor in known) if known else (None, None)
        y_MF, z_MR = _Crossing.apply(rows(x), a_DR, b_RF, carry_MR, self.gate, z_MR, y_MF)
        return tuple(tensor.view(*x.shape[:-1], -1) for tensor in (y_MF, z_MR))

    def down_project(self, x_BTD, carry):
        x, a_DR, _, carry_MR = self._cast(x_BTD, carry)
        return latent(rows(x), a_DR, carry_MR, self.gate).view(*x.shape[:-1], -1)

    def _cast(self, x_BTD: Tensor, carry: Tensor | None) -> tuple[Any, Any, Any, Any]:
        x, a_DR, b_RF = cast(x_BTD, self.A, self.B)
        return x, a_DR, b_RF, None if carry is None else rows(carry.to(x.dtype))


def latent(x_MD: Tensor, a_DR: Tensor, carry_MR: Tensor | None, gate_1: Tensor | None) -> Tensor:
    """Return ``x A + gate carry``, (M, R); without a gate ``x A + carry``. No gradients.

    Args:
        carry_MR: the bottleneck below, dtype of x; None in the first block.
        gate_1: (1,), cast to the dtype of x.
    Cost: 2 M D R FLOPs.
    Source: arXiv:2505.21732.
    """
    if carry_MR is None:
        return x_MD @ a_DR
    if gate_1 is None:
        return torch.addmm(carry_MR, x_MD, a_DR)
    z_MR = carry_MR * gate_1.to(carry_MR.dtype)
    return torch.addmm(z_MR, x_MD, a_DR, out=z_MR)


class _Crossing(torch.autograd.Function):
    """Keeps x, Z and the factors; with a gate also the gate and the carry."""

    @staticmethod
    def forward(ctx, x_MD, a_DR, b_RF, carry_MR, gate_1, z_MR, y_MF):
        if y_MF is None:
            z_MR = latent(x_MD, a_DR, carry_MR, gate_1)
            y_MF = z_MR @ b_RF
        kept = (carry_MR, gate_1) if gate_1 is not None else (None, None)
        ctx.save_for_backward(x_MD, z_MR, a_DR, b_RF, *kept)
        return y_MF, z_MR

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MF, dabove_MR):
        x_MD, z_MR, a_DR, b_RF, carry_MR, gate_1 = ctx.saved_tensors
        wants_x, wants_a, wants_b, wants_carry, wants_gate = ctx.needs_input_grad[:5]
        db_RF = z_MR.T @ dy_MF if wants_b else None
        dz_MR = torch.addmm(dabove_MR, dy_MF, b_RF.T)
        da_DR = x_MD.T @ dz_MR if wants_a else None
        dx_MD = dz_MR @ a_DR.T if wants_x else None
        dgate_1 = inner(dz_MR, carry_MR).to(gate_1.dtype).view(1) if wants_gate else None
        dcarry_MR = None
        if wants_carry:
            dcarry_MR = dz_MR if gate_1 is None else dz_MR * gate_1.to(dz_MR.dtype)
        return dx_MD, da_DR, db_RF, dcarry_MR, dgate_1, None, None
