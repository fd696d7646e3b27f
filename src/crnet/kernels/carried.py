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

Recomputation takes the map apart: ``up_project`` is its second half, ``carry_from`` undoes it, and
a caller who knows Z and Y already gets the same node of the graph from them (``known``). Several
processes take it in parts: Z and dZ are where they add up what each has (``sums``).

Shapes: B batch, T tokens, M = B T rows, D input width, F output width, R rank.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crnet.kernels import carried_cuda
from crnet.kernels.partial import PartialSum
from crnet.kernels.precision import cast, compute_dtype, scaled

DOT_ITEMS = 1 << 30
"""Most items that one ``torch.dot`` gets."""

Known = tuple[Tensor, Tensor]
"""(Z, Y) of a map whose forward has been computed before."""


class _LowRank(torch.autograd.Function):
    """``(x A) B`` and, with a carry, ``gain * carry`` below it. Saves x, Z, A, B, carry, gain."""

    @staticmethod
    def forward(ctx, x_BTD, a_DR, b_RF, carry_BTF, gain_1, z_MR, y_BTF, sums):
        if y_BTF is None:
            z_MR = rows(x_BTD) @ a_DR
            if sums is not None:
                z_MR = sums.forward(z_MR)
            carry_MF = None if carry_BTF is None else rows(carry_BTF)
            y_BTF = unrows(_up_project(z_MR, b_RF, carry_MF, gain_1), x_BTD)
        ctx.sums = sums
        ctx.save_for_backward(x_BTD, z_MR, a_DR, b_RF, carry_BTF, gain_1)
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        x_BTD, z_MR, a_DR, b_RF, carry_BTF, gain_1 = ctx.saved_tensors
        wants_x, wants_a, wants_b, wants_carry, wants_gain = ctx.needs_input_grad[:5]
        x_MD, dy_MF = rows(x_BTD), rows(dy_BTF)
        # The elementwise passes come first, while dY is still in the cache from its producer.
        dcarry_MF, dgain = _carry_gradients(dy_MF, carry_BTF, gain_1, wants_carry, wants_gain)
        dcarry_BTF = None if dcarry_MF is None else unrows(dcarry_MF, x_BTD)
        dgain_1 = None if dgain is None else dgain.to(gain_1.dtype).view(1)
        dy_MF = dy_MF.to(x_MD.dtype)
        dx_BTD = da_DR = None
        if wants_x or wants_a:
            dz_MR = dy_MF @ b_RF.T
            if ctx.sums is not None:
                dz_MR = ctx.sums.backward(dz_MR)
            da_DR = x_MD.T @ dz_MR if wants_a else None
            dx_BTD = unrows(dz_MR @ a_DR.T, x_BTD) if wants_x else None
        db_RF = z_MR.T @ dy_MF if wants_b else None
        return dx_BTD, da_DR, db_RF, dcarry_BTF, dgain_1, None, None, None


def _carry_gradients(
    dy_MF: Tensor,
    carry_BTF: Tensor | None,
    gain_1: Tensor | None,
    wants_carry: bool,
    wants_gain: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``gain dY`` and ``<dY, carry>``, as far as wanted."""
    if carry_BTF is None or gain_1 is None:
        return None, None
    carry_MF = rows(carry_BTF)
    if wants_carry and wants_gain and carried_cuda.takes_gradients(dy_MF):
        return carried_cuda.carry_gradients(dy_MF, carry_MF, gain_1)
    dcarry_MF = scaled(dy_MF, gain_1) if wants_carry else None
    return dcarry_MF, inner(dy_MF, carry_MF) if wants_gain else None


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Sum of the elementwise product, 0-d, accumulated in fp32 or better."""
    if left.dtype in (torch.float32, torch.float64):
        # torch.dot counts its items in 32 bits.
        parts = zip(
            left.reshape(-1).split(DOT_ITEMS), right.reshape(-1).split(DOT_ITEMS), strict=True
        )
        return functools.reduce(torch.add, (torch.dot(one, other) for one, other in parts))
    return (left * right).sum(dtype=torch.float32)


def _up_project(
    z_MR: Tensor, b_RF: Tensor, carry_MF: Tensor | None, gain_1: Tensor | None
) -> Tensor:
    if carry_MF is None or gain_1 is None:
        return z_MR @ b_RF
    if carried_cuda.takes(z_MR):
        return carried_cuda.up_project(z_MR, b_RF, carry_MF, gain_1)
    y_MF = scaled(carry_MF, gain_1)
    if y_MF.dtype == z_MR.dtype:
        # Not addmm_: the same product, but torch's FLOP counter does not know it.
        return torch.addmm(y_MF, z_MR, b_RF, out=y_MF)
    return y_MF.add_(z_MR @ b_RF)


def carried_lowrank(
    x_BTD: Tensor,
    a_DR: Tensor,
    b_RF: Tensor,
    carry_BTF: Tensor,
    gain_1: Tensor,
    *,
    carry_dtype: torch.dtype | None = None,
    known: Known | None = None,
    sums: PartialSum | None = None,
) -> Tensor:
    """Return ``gain * carry + (x A) B``.

    Args:
        x_BTD: input of the map.
        a_DR, b_RF: the factors; cast to the compute dtype.
        carry_BTF: the same map's output one block below; cast to ``carry_dtype``.
        gain_1: ``sign(beta) (|beta| + eps)``, shape (1,); in fp32 it is multiplied in fp32.
        carry_dtype: of the sum and the result; None: the compute dtype (autocast's where it is on,
            else that of ``x_BTD``).
        known: Z and the result, where a recomputation has them: only the graph is made.
        sums: where this is a part of the map: over Z, or dZ, of the other parts.
    Returns:
        (B, T, F) in ``carry_dtype``.
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
    dtype = carry_dtype or compute_dtype(x_BTD)
    return _apply(x_BTD, a_DR, b_RF, carry_BTF.to(dtype), gain_1, known, sums)


def low_rank(
    x_BTD: Tensor,
    a_DR: Tensor,
    b_RF: Tensor,
    known: Known | None = None,
    sums: PartialSum | None = None,
) -> Tensor:
    """Return ``(x A) B``: ``carried_lowrank`` without a carry."""
    return _apply(x_BTD, a_DR, b_RF, None, None, known, sums)


def _apply(x_BTD, a_DR, b_RF, carry_BTF, gain_1, known: Known | None, sums) -> Tensor:
    x, a_DR, b_RF = cast(x_BTD, a_DR, b_RF)
    z_MR, y_BTF = (rows(known[0]), known[1]) if known else (None, None)
    return _LowRank.apply(x, a_DR, b_RF, carry_BTF, gain_1, z_MR, y_BTF, sums)


def rows(x_BTD: Tensor) -> Tensor:
    """(M, D)."""
    return x_BTD.reshape(-1, x_BTD.shape[-1])


def unrows(y_MF: Tensor, x_BTD: Tensor) -> Tensor:
    """(B, T, F) of a new (M, F), its rows those of ``x_BTD``: for operations with a backward by
    hand, which take and return tensors of the block's shape.

    No view: where gradients meet, autograd adds the second to the first in place, unless the first
    is a view; then it takes new memory for the sum.
    """
    return torch.ops.aten._unsafe_view.default(y_MF, [*x_BTD.shape[:-1], y_MF.shape[-1]])


def up_project(
    z_BTR: Tensor,
    b_RF: Tensor,
    carry_BTF: Tensor | None = None,
    gain_1: Tensor | None = None,
    carry_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``gain * carry + Z B``, the second half of a map, bit for bit as its forward has it.

    Args:
        z_BTR: ``X A`` in the compute dtype; decides the dtype of the product.
        b_RF: cast to that dtype.
        carry_BTF, gain_1: as in ``carried_lowrank``; without them ``Z B``.
    Returns: (B, T, F). Differentiable by nobody: call it without gradients.
    Cost: 2 M R F FLOPs.
    """
    dtype = carry_dtype or z_BTR.dtype
    carry_MF = None if carry_BTF is None else rows(carry_BTF.to(dtype))
    y_MF = _up_project(rows(z_BTR), b_RF.to(z_BTR.dtype), carry_MF, gain_1)
    return y_MF.view(*z_BTR.shape[:-1], -1)


def carry_from(y_BTF: Tensor, z_BTR: Tensor, b_RF: Tensor, gain_1: Tensor) -> Tensor:
    """Return the output of the layer below, ``Y_{l-1} = (Y_l - Z_l B_l) / gain_l``.

    Args:
        y_BTF: ``Y_l``; its dtype is that of the arithmetic and the result. Not modified.
        z_BTR: ``X_l A_l``, as the forward pass computed it.
        b_RF: ``B_l``; cast to the dtype of ``z_BTR``.
        gain_1: of layer l, not zero.
    Returns: (B, T, F).
    Cost: 2 M R F FLOPs; allocates M F items.
    Numerics: rounding grows like the product of 1/|gain| over the layers crossed; the bound is
        ``recompute.plan.invert_error``.
    Source: arXiv:2509.18993, eq. 7.
    """
    y_MF, z_MR, b_RF = rows(y_BTF), rows(z_BTR), b_RF.to(z_BTR.dtype)
    if carried_cuda.takes(z_MR):
        carry_MF = carried_cuda.without_product(y_MF, z_MR, b_RF)
    elif y_MF.dtype == z_MR.dtype:
        carry_MF = torch.addmm(y_MF, z_MR, b_RF, alpha=-1)
    else:
        carry_MF = y_MF - z_MR @ b_RF
    return carry_MF.div_(gain_1).view_as(y_BTF)


class _Dense(torch.autograd.Function):
    """``x W^T`` whose value is known: autograd's own backward, without the product."""

    @staticmethod
    def forward(ctx, x_BTD, weight_FD, y_BTF):
        ctx.save_for_backward(x_BTD, weight_FD)
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        x_BTD, weight_FD = ctx.saved_tensors
        dx_BTD = rows_times(dy_BTF, weight_FD) if ctx.needs_input_grad[0] else None
        dweight_FD = rows(dy_BTF).T @ rows(x_BTD) if ctx.needs_input_grad[1] else None
        return dx_BTD, dweight_FD, None


def rows_times(x_BTD: Tensor, weight_DF: Tensor) -> Tensor:
    """``x W``, (B, T, F), in the dtype of both. Differentiable by nobody."""
    return unrows(rows(x_BTD) @ weight_DF, x_BTD)


def known_dense(x_BTD: Tensor, weight_FD: Tensor, y_BTF: Tensor) -> Tensor:
    """``x W^T`` given its value ``y_BTF``: makes the graph alone. Keeps x."""
    return _Dense.apply(*cast(x_BTD, weight_FD), y_BTF)
