"""The head and its cross-entropy, without the logits of all rows at once.

The gradients of a chunk of rows are computed while its logits are at hand, in the forward pass, so
that neither logits nor probabilities are kept. Refused: torch's ``linear_cross_entropy`` (2.13),
the same idea; its default chunk of 32 rows takes twice as long as plain logits on a CPU, its best
one still longer than this, and what it keeps and computes hides from hooks and FLOP counters.

Shapes: M rows, C rows of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crnet.kernels import loss_chunks
from crnet.kernels.precision import compute_dtype

SECOND_PASS = (
    "a second backward pass through the loss, whose gradients the first one scaled in place: "
    "retain_graph=True is not supported; run the forward pass again before it"
)

IGNORED = -100
"""Target of a position that carries no loss."""


def linear_cross_entropy(
    x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """Return the sum over rows of ``-log softmax(x W^T)[target]``.

    Args:
        x_MD: the last norm's output.
        weight_VD: the head; cast to the compute dtype.
        target_M: int64; -100 leaves a row out.
        chunk_rows: rows whose logits exist at once; None: ``loss_chunks.chunk_rows``.
    Returns:
        0-d, fp32 (fp64 for fp64).
    Cost: 2 M D V FLOPs forward; with gradients 4 M D V more, in the forward pass.
        Keeps the two gradients (M D + V D items) and no logits. The weight's gradient is scaled in
        place: a second backward pass through it is an error.
    Numerics: products in the compute dtype; softmax and sums over chunks in fp32 or better.
    """
    rows = chunk_rows or loss_chunks.chunk_rows(weight_VD.shape[0], x_MD.device.type)
    # Inside forward the grad mode is always off, and needs_input_grad does not know of no_grad.
    wants = torch.is_grad_enabled()
    return _ChunkedLoss.apply(x_MD, weight_VD, target_M, rows, wants, compute_dtype(x_MD))


class Scores(NamedTuple):
    """What a model says of the targets of some rows."""

    loss_sum: Tensor
    """0-d, nats: that of ``linear_cross_entropy``, to the bit."""
    loss_M: Tensor
    """``-log softmax(x W^T)[target]``, fp32 (fp64 for fp64); 0 where no target counts."""
    is_likeliest_M: Tensor
    """bool: no other token has a larger logit, and none of a lower id as large a one; False where
    no target counts."""


@torch.no_grad()
def target_scores(
    x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, chunk_rows: int | None = None
) -> Scores:
    """Score the targets, without gradients. Arguments: those of ``linear_cross_entropy``.

    Cost: 2 M D V FLOPs, and one more look at the logits of a chunk while they are at hand.
    """
    rows = chunk_rows or loss_chunks.chunk_rows(weight_VD.shape[0], x_MD.device.type)
    dtype, wide = compute_dtype(x_MD), _wide(x_MD)
    x_MD, weight_VD = x_MD.to(dtype), weight_VD.to(dtype)
    loss_sum = torch.zeros((), dtype=wide, device=x_MD.device)
    losses, likeliest = [loss_sum.new_zeros(0)], [target_M.new_zeros(0, dtype=torch.bool)]
    for start in range(0, x_MD.shape[0], rows):
        x_CD, target_C = (each[start : start + rows] for each in (x_MD, target_M))
        logits_CV, loss_C1 = x_CD @ weight_VD.T, loss_sum.new_empty(len(target_C), 1)
        for part in _parts(logits_CV, wide):
            logs_CV = torch.log_softmax(logits_CV[part].to(wide), dim=-1)
            loss_C1[part] = _losses(logs_CV, *_places(target_C[part]))
            likeliest.append(_are_likeliest(logs_CV, target_C[part]))
        loss_sum += loss_C1.sum()
        losses.append(loss_C1.squeeze(1))
    return Scores(loss_sum, torch.cat(losses), torch.cat(likeliest))


def _are_likeliest(logs_CV: Tensor, target_C: Tensor) -> Tensor:
    """Whether each target is what ``argmax`` finds; False at -100. Writes into ``logs_CV``.

    On a CPU ``argmax`` takes as long as the softmax, and ``amax`` a fifth of that: it finds the
    largest of the others, and ``argmax`` decides between equals alone.
    """
    if logs_CV.is_cuda:  # there both are quick, and nobody waits
        return logs_CV.argmax(dim=-1) == target_C
    index_C1 = target_C.clamp_min(0).unsqueeze(1)
    own_C1 = logs_CV.gather(1, index_C1)
    others_C1 = logs_CV.scatter_(1, index_C1, -torch.inf).amax(dim=-1, keepdim=True)
    found = (own_C1 > others_C1).squeeze(1) & (target_C != IGNORED)
    equals = (own_C1 == others_C1).squeeze(1).nonzero().flatten()
    if len(equals):
        logs_EV = logs_CV[equals].scatter_(1, index_C1[equals], own_C1[equals])
        found[equals] = logs_EV.argmax(dim=-1) == target_C[equals]
    return found


def _wide(x_MD: Tensor) -> torch.dtype:
    """Of softmax and sums."""
    return torch.float64 if x_MD.dtype == torch.float64 else torch.float32


def _places(target_C: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's column of the logits, and whether none counts; (C, 1) both."""
    return target_C.clamp_min(0).unsqueeze(1), (target_C == IGNORED).unsqueeze(1)


def _parts(logits_CV: Tensor, wide: torch.dtype) -> list[slice]:
    """Rows whose logits are widened together: on a CPU as many as its cache holds."""
    rows, vocab = logits_CV.shape
    is_narrow = logits_CV.device.type == "cpu" and logits_CV.dtype != wide
    return _slices(rows, loss_chunks.PART_ITEMS // vocab if is_narrow else rows)


def _slices(count: int, size: int) -> list[slice]:
    size = max(size, 1)
    return [slice(start, start + size) for start in range(0, count, size)]


def _losses(logs_CV: Tensor, index_C1: Tensor, ignored_C1: Tensor) -> Tensor:
    """Loss of every row, (C, 1); 0 where none counts."""
    return -logs_CV.gather(1, index_C1).masked_fill_(ignored_C1, 0)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, weight_VD, target_M, chunk_rows, differentiable, dtype):
        wants_x, wants_weight = (differentiable and it for it in ctx.needs_input_grad[:2])
        wide = _wide(x_MD)
        ctx.dtypes = x_MD.dtype, weight_VD.dtype
        x_MD, weight_VD = x_MD.to(dtype), weight_VD.to(dtype)
        loss = torch.zeros((), dtype=wide, device=x_MD.device)
        dx_MD = torch.empty_like(x_MD) if wants_x else None
        new = torch.empty_like if len(x_MD) else torch.zeros_like  # the first chunk writes it
        dweight_VD = new(weight_VD, dtype=wide) if wants_weight else None
        for start in range(0, x_MD.shape[0], chunk_rows):
            x_CD, target_C = (each[start : start + chunk_rows] for each in (x_MD, target_M))
            dx_CD = None if dx_MD is None else dx_MD[start : start + chunk_rows]
            loss += _chunk(x_CD, weight_VD, target_C, dx_CD, dweight_VD, wide, start > 0)
        ctx.save_for_backward(dx_MD, dweight_VD)
        ctx.spent = False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        if ctx.spent:
            raise RuntimeError(SECOND_PASS)
        ctx.spent = True
        dx_MD, dweight_VD = ctx.saved_tensors
        dx_dtype, dweight_dtype = ctx.dtypes
        dx = None if dx_MD is None else dx_MD.mul_(dloss.to(dx_MD.dtype)).to(dx_dtype)
        dweight = None if dweight_VD is None else dweight_VD.mul_(dloss).to(dweight_dtype)
        return dx, dweight, None, None, None, None


def _chunk(
    x_CD: Tensor,
    weight_VD: Tensor,
    target_C: Tensor,
    dx_CD: Tensor | None,
    dweight_VD: Tensor | None,
    wide: torch.dtype,
    adds: bool,
) -> Tensor:
    """Loss of some rows; their gradient into ``dx_CD``, the weight's into ``dweight_VD``, or added
    to it."""
    logits_CV = x_CD @ weight_VD.T
    index_C1, ignored_C1 = _places(target_C)
    loss_C1 = logits_CV.new_empty(index_C1.shape, dtype=wide)
    parts = _parts(logits_CV, wide)
    # Several parts write their slopes over the logits; one alone lets these go at once.
    slope_CV = logits_CV if len(parts) > 1 else None
    for part in parts:
        logs_CV = logits_CV[part].to(wide)
        if slope_CV is None:
            logits_CV = logs_CV
        logs_CV = torch.log_softmax(logs_CV, dim=-1)
        loss_C1[part] = _losses(logs_CV, index_C1[part], ignored_C1[part])
        if dx_CD is None and dweight_VD is None:
            continue
        logs_CV.exp_().scatter_add_(1, index_C1[part], torch.full_like(loss_C1[part], -1))
        if slope_CV is None:
            logits_CV = slope_CV = logs_CV.to(x_CD.dtype)
        else:
            slope_CV[part] = logs_CV
        del logs_CV
    if slope_CV is None:
        return loss_C1.sum()
    # Rows left out are zeroed where they are narrow.
    if dx_CD is not None:
        torch.mm(slope_CV, weight_VD, out=dx_CD).masked_fill_(ignored_C1, 0)
    if dweight_VD is not None:
        _product(dweight_VD, slope_CV.T, x_CD.masked_fill(ignored_C1, 0), adds)
    return loss_C1.sum()


def _product(into_VD: Tensor, left_VC: Tensor, right_CD: Tensor, adds: bool) -> None:
    """Write a product into a tensor, or add it."""
    if into_VD.dtype == left_VC.dtype:
        # Not addmm_: the same product, but torch's FLOP counter does not know it.
        if adds:
            torch.addmm(into_VD, left_VC, right_CD, out=into_VD)
        else:
            torch.mm(left_VC, right_CD, out=into_VD)
        return
    items = loss_chunks.PART_ITEMS if into_VD.device.type == "cpu" else into_VD.numel()
    for part in _slices(len(into_VD), items // into_VD.shape[1]):
        product_VD = left_VC[part] @ right_CD
        if adds:
            into_VD[part] += product_VD
        else:
            into_VD[part] = product_VD
