"""The head and its cross-entropy, without the logits of all rows at once.

Both backends compute the gradients of a chunk of rows while its logits are at hand, in the forward
pass, so that neither logits nor probabilities are kept: torch's ``linear_cross_entropy`` (2.13) in
fp32 on any device, and the chunked equivalent below for older releases and for bf16, whose logits
it brings to fp32 before the exponential.

Shapes: M rows, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crnet.kernels.loss_chunks import LOSS_CHUNK_ITEMS
from crnet.kernels.precision import cast

IGNORED = -100
"""Target of a position that carries no loss."""

HAS_TORCH_BACKEND = hasattr(torch.nn, "LinearCrossEntropyOptions")


@contextlib.contextmanager
def chunked_everywhere() -> Iterator[None]:
    """Meanwhile the chunked loss takes every case: the same arithmetic, and what it keeps can be
    seen by autograd's hooks, what it computes by torch's FLOP counter."""
    global HAS_TORCH_BACKEND
    had, HAS_TORCH_BACKEND = HAS_TORCH_BACKEND, False
    try:
        yield
    finally:
        HAS_TORCH_BACKEND = had


def linear_cross_entropy(x_MD: Tensor, weight_VD: Tensor, target_M: Tensor) -> Tensor:
    """Return the sum over rows of ``-log softmax(x W^T)[target]``.

    Args:
        x_MD: the last norm's output.
        weight_VD: the head; cast to the compute dtype.
        target_M: int64; -100 leaves a row out.
    Returns:
        0-d, fp32 (fp64 for fp64).
    Cost: 2 M D V FLOPs forward; with gradients 4 M D V more, in the forward pass.
        Keeps the two gradients (M D + V D items) and no logits.
    Numerics: softmax and sums in fp32 or better.
    """
    x_MD, weight_VD = cast(x_MD, weight_VD)
    if HAS_TORCH_BACKEND and x_MD.dtype == torch.float32 and _torch_wins(x_MD, weight_VD):
        return torch.nn.functional.linear_cross_entropy(
            x_MD, weight_VD, target_M, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
        )
    return chunked_linear_cross_entropy(x_MD, weight_VD, target_M)


def _torch_wins(x_MD: Tensor, weight_VD: Tensor) -> bool:
    # torch's advice (LinearCrossEntropyOptions): below this its chunks are not worth their cost.
    width = x_MD.shape[1]
    return x_MD.shape[0] >= width and weight_VD.shape[0] > width and torch.is_grad_enabled()


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, weight_VD, target_M, chunk_rows, differentiable):
        wants_x, wants_weight = (differentiable and it for it in ctx.needs_input_grad[:2])
        wide = torch.float64 if x_MD.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=wide, device=x_MD.device)
        dx_MD = torch.empty_like(x_MD) if wants_x else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None
        for start in range(0, x_MD.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            target_C, x_CD = target_M[rows], x_MD[rows]
            logits_CV = (x_CD @ weight_VD.T).to(wide)
            loss += torch.nn.functional.cross_entropy(
                logits_CV, target_C, reduction="sum", ignore_index=IGNORED
            )
            if not (wants_x or wants_weight):
                continue
            kept_C1 = (target_C != IGNORED).unsqueeze(1)
            slope_CV = torch.softmax(logits_CV, dim=-1)
            slope_CV.scatter_add_(
                1, target_C.clamp_min(0).unsqueeze(1), torch.full_like(kept_C1, -1, dtype=wide)
            )
            slope_CV = slope_CV.mul_(kept_C1).to(x_MD.dtype)
            if dx_MD is not None:
                torch.mm(slope_CV, weight_VD, out=dx_MD[rows])
            if dweight_VD is not None:
                dweight_VD += slope_CV.T @ x_CD
        ctx.save_for_backward(dx_MD, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx_MD, dweight_VD = ctx.saved_tensors
        dx = None if dx_MD is None else dx_MD * dloss.to(dx_MD.dtype)
        dweight = None if dweight_VD is None else (dweight_VD * dloss).to(ctx.weight_dtype)
        return dx, dweight, None, None, None


def chunked_linear_cross_entropy(
    x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """``linear_cross_entropy`` by chunks of rows, on any torch and dtype; the same result.

    ``chunk_rows``: rows whose logits exist at once; None: what ``LOSS_CHUNK_ITEMS`` allows.
    """
    if chunk_rows is None:
        chunk_rows = max(1, LOSS_CHUNK_ITEMS // weight_VD.shape[0])
    # Inside forward the grad mode is always off, and needs_input_grad does not know of no_grad.
    return _ChunkedLoss.apply(x_MD, weight_VD, target_M, chunk_rows, torch.is_grad_enabled())
