"""Low-rank maps as one operation each, with a backward written by hand.

CR-Net's map (eq. 6) is a product that accumulates onto the scaled carry. The plain formula
(``naive.carried_lowrank``) writes gain * carry, (x A) B and their sum as three tensors of the full
output width. Here the scaled carry is written once and the second product accumulates onto it; the
backward, with dY given, is

    dZ = dY B^T       dB = Z^T dY       dA = X^T dZ       dX = dZ A^T
    dcarry = gain dY  dgain = <dY, carry>

A gain may be one number or one a column (``dgain`` is then a sum over rows). What stands between
the two products, and what the second multiplies with, may be something else (``Inside``).

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
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crnet.kernels import carried_cuda
from crnet.kernels.bottleneck import normed, normed_backward
from crnet.kernels.partial import PartialSum
from crnet.kernels.precision import cast, compute_dtype, scaled

DOT_ITEMS = 1 << 30
"""Most items that one ``torch.dot`` gets."""

Known = tuple[Tensor, Tensor]
"""(Z, Y) of a map whose forward has been computed before."""


@dataclass(frozen=True)
class Inside:
    """What a map has between and beside its two products: ``y = gain * carry + h(Z) f(B)``."""

    norm_eps: float | None = None
    """h is RMSNorm by rows, its gains handed in beside the factors; None: h(Z) = Z."""
    outer: Callable[[Tensor], Tensor] | None = None
    """f: adds a constant to the outer factor, in memory of its own; None: f(B) = B."""

    def latent(self, z_MR: Tensor, weight_R: Tensor | None) -> Tensor:
        """h(Z)."""
        return z_MR if self.norm_eps is None else normed(z_MR, weight_R, self.norm_eps)

    def latent_backward(
        self, dh_MR: Tensor, z_MR: Tensor, weight_R: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of Z and of the norm's gains."""
        if self.norm_eps is None:
            return dh_MR, None
        return normed_backward(dh_MR, z_MR, weight_R, self.norm_eps)

    def factor(self, b_RF: Tensor) -> Tensor:
        """f(B)."""
        return b_RF if self.outer is None else self.outer(b_RF)


NOTHING = Inside()


class _LowRank(torch.autograd.Function):
    """``h(x A) f(B)`` and, with a carry, ``gain * carry`` below it.

    Saves x, Z, A, B, carry, gain and the norm's gains; f(B) and h(Z) are made again.
    """

    @staticmethod
    def forward(ctx, x_BTD, a_DR, b_RF, carry_BTF, gain_1, weight_R, z_MR, y_BTF, sums, inside):
        if y_BTF is None:
            z_MR = rows(x_BTD) @ a_DR
            if sums is not None:
                z_MR = sums.forward(z_MR)
            carry_MF = None if carry_BTF is None else rows(carry_BTF)
            h_MR, outer_RF = inside.latent(z_MR, weight_R), inside.factor(b_RF)
            y_BTF = unrows(_up_project(h_MR, outer_RF, carry_MF, gain_1), x_BTD)
        ctx.sums, ctx.inside = sums, inside
        ctx.save_for_backward(x_BTD, z_MR, a_DR, b_RF, carry_BTF, gain_1, weight_R)
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        x_BTD, z_MR, a_DR, b_RF, carry_BTF, gain_1, weight_R = ctx.saved_tensors
        wants_x, wants_a, wants_b, wants_carry, wants_gain = ctx.needs_input_grad[:5]
        inside: Inside = ctx.inside
        x_MD, dy_MF = rows(x_BTD), rows(dy_BTF)
        # The elementwise passes come first, while dY is still in the cache from its producer.
        dcarry_MF, dgain = _carry_gradients(dy_MF, carry_BTF, gain_1, wants_carry, wants_gain)
        dcarry_BTF = None if dcarry_MF is None else unrows(dcarry_MF, x_BTD)
        dgain_1 = None if dgain is None else dgain.to(gain_1.dtype).view_as(gain_1)
        dy_MF = dy_MF.to(x_MD.dtype)
        dx_BTD = da_DR = dweight_R = None
        if wants_x or wants_a or ctx.needs_input_grad[5]:
            dz_MR = dy_MF @ inside.factor(b_RF).T
            if ctx.sums is not None:
                dz_MR = ctx.sums.backward(dz_MR)
            dz_MR, dweight_R = inside.latent_backward(dz_MR, z_MR, weight_R)
            da_DR = x_MD.T @ dz_MR if wants_a else None
            dx_BTD = unrows(dz_MR @ a_DR.T, x_BTD) if wants_x else None
        db_RF = inside.latent(z_MR, weight_R).T @ dy_MF if wants_b else None
        return dx_BTD, da_DR, db_RF, dcarry_BTF, dgain_1, dweight_R, None, None, None, None


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
    if gain_1.numel() > 1:
        return _wide_carry_gradients(dy_MF, carry_MF, gain_1, wants_carry, wants_gain)
    if wants_carry and wants_gain and carried_cuda.takes_gradients(dy_MF):
        return carried_cuda.carry_gradients(dy_MF, carry_MF, gain_1)
    dcarry_MF = scaled(dy_MF, gain_1) if wants_carry else None
    return dcarry_MF, inner(dy_MF, carry_MF) if wants_gain else None


def _wide_carry_gradients(
    dy_MF: Tensor, carry_MF: Tensor, gain_F: Tensor, wants_carry: bool, wants_gain: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``gain dY`` and the sum over rows of ``dY carry``, of a gain for each column."""
    dgain_F = None
    if wants_gain:
        dtype = torch.promote_types(dy_MF.dtype, torch.float32)
        dgain_F = (dy_MF * carry_MF).sum(0, dtype=dtype)
    return scaled(dy_MF, gain_F) if wants_carry else None, dgain_F


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
    weight_R: Tensor | None = None,
    inside: Inside = NOTHING,
) -> Tensor:
    """Return ``gain * carry + (x A) B``, or ``gain * carry + h(x A) f(B)`` (``inside``).

    Args:
        x_BTD: input of the map.
        a_DR, b_RF: the factors; cast to the compute dtype.
        carry_BTF: the same map's output one block below; cast to ``carry_dtype``.
        gain_1: ``sign(beta) (|beta| + eps)``, shape (1,), or (F,): one a column; in fp32 it is
            multiplied in fp32.
        carry_dtype: of the sum and the result; None: the compute dtype (autocast's where it is on,
            else that of ``x_BTD``).
        known: Z and the result, where a recomputation has them: only the graph is made.
        sums: where this is a part of the map: over Z, or dZ, of the other parts.
        weight_R: the gains of the norm at the bottleneck, where it has any.
        inside: what stands between the products.
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
    more = (weight_R, known, sums, inside)
    return _apply(x_BTD, a_DR, b_RF, carry_BTF.to(dtype), gain_1, *more)


class _CarriedOutput(torch.autograd.Function):
    """``gain * carry + y``. Saves carry and gain."""

    @staticmethod
    def forward(ctx, y_BTF, carry_BTF, gain_1):
        ctx.save_for_backward(carry_BTF, gain_1)
        ctx.dtype = y_BTF.dtype
        return scaled(carry_BTF, gain_1).add_(y_BTF)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        carry_BTF, gain_1 = ctx.saved_tensors
        _, wants_carry, wants_gain = ctx.needs_input_grad
        dy_MF = rows(dy_BTF)
        dcarry_MF, dgain = _carry_gradients(dy_MF, carry_BTF, gain_1, wants_carry, wants_gain)
        dcarry_BTF = None if dcarry_MF is None else unrows(dcarry_MF, dy_BTF)
        dgain_1 = None if dgain is None else dgain.to(gain_1.dtype).view(1)
        return dy_BTF.to(ctx.dtype), dcarry_BTF, dgain_1


def carried_output(
    y_BTF: Tensor, carry_BTF: Tensor, gain_1: Tensor, carry_dtype: torch.dtype | None = None
) -> Tensor:
    """Return ``gain * carry + y``: what an operator of several maps gives, added to its carry.

    Args:
        y_BTF, carry_BTF: of one shape; the carry is cast to ``carry_dtype``.
        gain_1, carry_dtype: as in ``carried_lowrank``.
    Returns: (B, T, F) in ``carry_dtype``.
    Cost: keeps the carry. Source: arXiv:2509.18993, E.3.
    """
    return _CarriedOutput.apply(y_BTF, carry_BTF.to(carry_dtype or y_BTF.dtype), gain_1)


def low_rank(
    x_BTD: Tensor,
    a_DR: Tensor,
    b_RF: Tensor,
    known: Known | None = None,
    sums: PartialSum | None = None,
    weight_R: Tensor | None = None,
    inside: Inside = NOTHING,
) -> Tensor:
    """Return ``(x A) B``: ``carried_lowrank`` without a carry."""
    return _apply(x_BTD, a_DR, b_RF, None, None, weight_R, known, sums, inside)


def _apply(x_BTD, a_DR, b_RF, carry_BTF, gain_1, weight_R, known, sums, inside) -> Tensor:
    x, a_DR, b_RF = cast(x_BTD, a_DR, b_RF)
    z_MR, y_BTF = (rows(known[0]), known[1]) if known else (None, None)
    more = (weight_R, z_MR, y_BTF, sums, inside)
    return _LowRank.apply(x, a_DR, b_RF, carry_BTF, gain_1, *more)


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
    return unrows(y_MF, z_BTR)


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
