"""Low-rank maps as one operation each, with a backward written by hand.

CR-Net's map (eq. 6) is a product that accumulates onto the scaled carry. The plain formula
(``naive.carried_lowrank``) writes gain * carry, (x A) B and their sum as three tensors of the full
output width. Here the scaled carry is written once and the second product accumulates onto it; the
backward, with dY given, is

    dZ = dY B^T       dB = Z^T dY       dA = X^T dZ       dX = dZ A^T
    dcarry = gain dY  dgain = <dY, carry>

and besides its inputs it keeps Z = X A alone. Refused: ``addmm(beta=gain)``, the same passes over
memory, but the gain must then be a Python number, that is, a wait for the GPU; and working through
the rows in chunks that fit the cache, which measured no faster (LOG.md).

Shapes: B batch, T tokens, M = B T rows, D input width, F output width, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crnet.kernels.precision import cast


class _CarriedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, a_DR, b_RF, carry_MF, gain_1):
        z_MR = x_MD @ a_DR
        y_MF = carry_MF * gain_1
        # Not addmm_: the same product, but torch's FLOP counter does not know it.
        torch.addmm(y_MF, z_MR, b_RF, out=y_MF)
        ctx.save_for_backward(x_MD, z_MR, a_DR, b_RF, carry_MF, gain_1)
        return y_MF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MF):
        x_MD, z_MR, a_DR, b_RF, carry_MF, gain_1 = ctx.saved_tensors
        wants_x, wants_a, wants_b, wants_carry, wants_gain = ctx.needs_input_grad
        # The elementwise passes come first, while dY is still in the cache from its producer.
        dcarry_MF = dy_MF * gain_1 if wants_carry else None
        dgain_1 = inner(dy_MF, carry_MF).to(gain_1.dtype).view(1) if wants_gain else None
        dz_MR = dy_MF @ b_RF.T if wants_x or wants_a else None
        db_RF = z_MR.T @ dy_MF if wants_b else None
        da_DR = x_MD.T @ dz_MR if wants_a else None
        dx_MD = dz_MR @ a_DR.T if wants_x else None
        return dx_MD, da_DR, db_RF, dcarry_MF, dgain_1


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Sum of the elementwise product, 0-d, accumulated in fp32 or better."""
    if left.dtype in (torch.float32, torch.float64):
        return torch.dot(left.reshape(-1), right.reshape(-1))
    return (left * right).sum(dtype=torch.float32)


def carried_lowrank(
    x_BTD: Tensor, a_DR: Tensor, b_RF: Tensor, carry_BTF: Tensor, gain_1: Tensor
) -> Tensor:
    """Return ``gain * carry + (x A) B``.

    Args:
        x_BTD: input of the map.
        a_DR, b_RF: the factors; cast to the compute dtype.
        carry_BTF: the same map's output one block below.
        gain_1: ``sign(beta) (|beta| + eps)``, shape (1,); cast to the compute dtype.
    Returns:
        (B, T, F) in the compute dtype (autocast's where it is on, else that of ``x_BTD``).
    Raises:
        ValueError: the widths disagree (the message gives the shapes).
    Cost: 2 M R (D + F) FLOPs forward, twice that backward; keeps Z (M R items) besides its inputs.
    Numerics: one rounding of gain * carry, one of the accumulated product.
    Source: arXiv:2509.18993, eq. 6.
    """
    wanted = (*x_BTD.shape[:-1], b_RF.shape[-1])
    if (
        x_BTD.shape[-1] != a_DR.shape[0]
        or a_DR.shape[1] != b_RF.shape[0]
        or (carry_BTF.shape != wanted)
    ):
        raise ValueError(
            f"the widths disagree: x {tuple(x_BTD.shape)}, A {tuple(a_DR.shape)}, "
            f"B {tuple(b_RF.shape)}, carry {tuple(carry_BTF.shape)} (wanted {wanted})"
        )
    x, a_DR, b_RF, carry, gain_1 = cast(x_BTD, a_DR, b_RF, carry_BTF, gain_1)
    y_MF = _CarriedLowRank.apply(
        x.reshape(-1, x.shape[-1]), a_DR, b_RF, carry.reshape(-1, carry.shape[-1]), gain_1
    )
    return y_MF.view(*x.shape[:-1], -1)
