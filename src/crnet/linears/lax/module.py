"""LaX's map: low rank with a residual at the bottleneck, as one operation with two results.

With Z = X A + g(Z'), Y = Z B, and dY and the block above's dZ" given,

    dZ = dY B^T + dZ"    dB = Z^T dY    dA = X^T dZ    dX = dZ A^T

and of g a number: dZ' = g dZ, dg = <dZ, Z'>; of g a layer norm, its gradients, the norm made anew
from Z'. Of a map in parts x A, or dY B^T, is a summand, and all else at the bottleneck is whole.

Shapes: B batch, T tokens, M = B T rows, D input width, F output width, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crnet.kernels.carried import inner, rows, rows_times, unrows
from crnet.kernels.partial import PartialSum
from crnet.kernels.precision import cast
from crnet.linears._maps import LowRankMap

EPS = 1e-5
"""Of the layer norm: torch's default, which the official code takes."""


class LaXMap(LowRankMap):
    """``z = x A + gate(carry)``, ``y = z B``; A (D, R), B (R, F). The gate is a learned number
    ``gate`` (1,), a layer norm of ``gate`` and ``shift`` (R,), or nothing.

    Hands on z, (B, T, R).
    """

    hands = "bottleneck"
    gate: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(self, tensors):
        super().__init__(tensors)
        for name in {"gate", "shift"} - tensors.keys():
            self.register_parameter(name, None)

    def run(self, x_BTD, carry, known):
        z_BTR, y_BTF = known or (None, None)
        gate = self.gate, self.shift
        return _Crossing.apply(*self._cast(x_BTD, carry), *gate, z_BTR, y_BTF, self.sums)

    def down_project(self, x_BTD, carry):
        x, a_DR, _, carry_BTR = self._cast(x_BTD, carry)
        return latent(x, a_DR, carry_BTR, self.gate, self.shift, self.sums)

    def with_update(self, a_DR, b_RF):
        return None  # the bottleneck that it hands on would be wider

    def _cast(self, x_BTD: Tensor, carry: Tensor | None) -> tuple[Any, Any, Any, Any]:
        x, a_DR, b_RF = cast(x_BTD, self.A, self.B)
        return x, a_DR, b_RF, None if carry is None else carry.to(x.dtype)


def latent(
    x_BTD: Tensor,
    a_DR: Tensor,
    carry_BTR: Tensor | None,
    gate: Tensor | None,
    shift_R: Tensor | None,
    sums: PartialSum | None = None,
) -> Tensor:
    """Return ``x A + gate(carry)``, (B, T, R); without a gate ``x A + carry``. No gradients.

    Args:
        carry_BTR: the bottleneck below, dtype of x; None in the first block.
        gate: (1,), cast to the dtype of x; with ``shift_R`` the gains of a layer norm, (R,), which
            is computed in fp32 (fp64 for fp64) and rounded once.
        sums: of a map in parts.
    Cost: 2 M D R FLOPs.
    Source: arXiv:2505.21732.
    """
    x_MD = rows(x_BTD)
    if carry_BTR is None:
        added_MR = None
    elif gate is None:
        added_MR = rows(carry_BTR)
    elif shift_R is None:
        added_MR = rows(carry_BTR) * gate.to(carry_BTR.dtype)
    else:
        added_MR = _normed(rows(carry_BTR), gate, shift_R)[0].to(x_MD.dtype)
    if sums is not None or added_MR is None:
        z_MR = x_MD @ a_DR
        z_MR = z_MR if sums is None else sums.forward(z_MR)
        z_MR = z_MR if added_MR is None else z_MR.add_(added_MR)
    else:
        z_MR = torch.addmm(added_MR, x_MD, a_DR, out=None if gate is None else added_MR)
    return unrows(z_MR, x_BTD)


def _normed(carry_MR: Tensor, gate_R: Tensor, shift_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer norm, its means and inverse deviations."""
    wide = torch.promote_types(carry_MR.dtype, torch.float32)
    carry, gate, shift = (each.to(wide) for each in (carry_MR, gate_R, shift_R))
    return torch.native_layer_norm(carry, gate.shape, gate, shift, EPS)


def _norm_gradients(
    dz_MR: Tensor, carry_MR: Tensor, gate_R: Tensor, shift_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``_normed``: those of the carry, the gains and the shifts."""
    _, means, inverses = _normed(carry_MR, gate_R, shift_R)
    wide = means.dtype
    dz, carry, gate, shift = (each.to(wide) for each in (dz_MR, carry_MR, gate_R, shift_R))
    found = torch.ops.aten.native_layer_norm_backward(
        dz, carry, gate.shape, means, inverses, gate, shift, [True, True, True]
    )
    return found[0].to(carry_MR.dtype), found[1].to(gate_R.dtype), found[2].to(shift_R.dtype)


class _Crossing(torch.autograd.Function):
    """Keeps x, Z and the factors; with a gate also the gate and the carry."""

    @staticmethod
    def forward(ctx, x_BTD, a_DR, b_RF, carry_BTR, gate, shift_R, z_BTR, y_BTF, sums):
        if y_BTF is None:
            z_BTR = latent(x_BTD, a_DR, carry_BTR, gate, shift_R, sums)
            y_BTF = rows_times(z_BTR, b_RF)
        kept = (None, None, None) if gate is None else (carry_BTR, gate, shift_R)
        ctx.save_for_backward(x_BTD, z_BTR, a_DR, b_RF, *kept)
        ctx.sums = sums
        return y_BTF, z_BTR

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF, dabove_BTR):
        x_BTD, z_BTR, a_DR, b_RF, carry_BTR, gate, shift_R = ctx.saved_tensors
        wants_x, wants_a, wants_b, wants_carry, wants_gate, _ = ctx.needs_input_grad[:6]
        dy_MF = rows(dy_BTF)
        db_RF = rows(z_BTR).T @ dy_MF if wants_b else None
        if ctx.sums is None:
            dz_MR = torch.addmm(rows(dabove_BTR), dy_MF, b_RF.T)
        else:
            dz_MR = ctx.sums.backward(dy_MF @ b_RF.T).add_(rows(dabove_BTR))
        da_DR = rows(x_BTD).T @ dz_MR if wants_a else None
        dx_BTD = unrows(dz_MR @ a_DR.T, x_BTD) if wants_x else None
        dcarry_MR = dz_MR if wants_carry else None
        dgate = dshift_R = None
        if gate is not None and shift_R is not None:
            found = _norm_gradients(dz_MR, rows(carry_BTR), gate, shift_R)
            dcarry_MR, dgate, dshift_R = found
        elif gate is not None:
            if wants_gate:
                dgate = inner(dz_MR, rows(carry_BTR)).to(gate.dtype).view(1)
            dcarry_MR = dz_MR * gate.to(dz_MR.dtype) if wants_carry else None
        dcarry_BTR = None if dcarry_MR is None else unrows(dcarry_MR, x_BTD)
        return dx_BTD, da_DR, db_RF, dcarry_BTR, dgate, dshift_R, None, None, None
