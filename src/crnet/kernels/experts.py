"""Choosing experts for tokens, dealing the tokens out and adding up what comes back.

Backwards are written by hand: autograd would keep fp32 copies of the input, and masks. Rows are
dealt out by a permutation and its inverse, so that no sum hangs on an order of its own.

Shapes: B batch, T tokens, M = B T rows, D model width, E experts, K of them that a token goes
through; S = M K rows, those of one expert behind one another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, weight_ED, num_active, normalises):
        with torch.autocast(x_BTD.device.type, enabled=False):
            logits_ME = _wide(x_BTD).flatten(0, 1) @ _wide(weight_ED).T
        shares_ME = logits_ME.softmax(-1)
        top_MK, chosen_MK = shares_ME.topk(num_active, dim=-1)
        balance = _counts(chosen_MK, x_BTD.shape, shares_ME).mul_(_means(shares_ME, x_BTD.shape))
        ctx.save_for_backward(x_BTD, weight_ED, shares_ME, chosen_MK)
        ctx.mark_non_differentiable(chosen_MK)
        ctx.normalises = normalises
        if normalises:
            top_MK = top_MK / top_MK.sum(-1, keepdim=True)
        return top_MK, chosen_MK, balance.sum() * shares_ME.shape[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, dweights_MK, _, dbalance):
        x_BTD, weight_ED, shares_ME, chosen_MK = ctx.saved_tensors
        batch, length, _ = x_BTD.shape
        dtop_MK = dweights_MK
        if ctx.normalises:
            top_MK = shares_ME.gather(1, chosen_MK)
            total_M1 = top_MK.sum(-1, keepdim=True)
            along_M1 = (dweights_MK * top_MK).sum(-1, keepdim=True) / total_M1
            dtop_MK = (dweights_MK - along_M1) / total_M1
        counts_BE = _counts(chosen_MK, x_BTD.shape, shares_ME)
        dshares_BE = counts_BE * (dbalance * shares_ME.shape[-1] / length)
        dshares_ME = dshares_BE.repeat_interleave(length, 0).scatter_add_(1, chosen_MK, dtop_MK)
        inner_M1 = (dshares_ME * shares_ME).sum(-1, keepdim=True)
        dlogits_ME = shares_ME * (dshares_ME - inner_M1)
        with torch.autocast(x_BTD.device.type, enabled=False):
            dx_MD = dlogits_ME @ _wide(weight_ED)
            dweight_ED = dlogits_ME.T @ _wide(x_BTD).flatten(0, 1)
        dx_BTD = dx_MD.view(batch, length, -1).to(x_BTD.dtype)
        return dx_BTD, dweight_ED.to(weight_ED.dtype), None, None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _counts(chosen_MK: Tensor, shape: torch.Size, like: Tensor) -> Tensor:
    """How often each expert is chosen in each row of the batch, (B, E)."""
    counts_BE = like.new_zeros(shape[0], like.shape[-1])
    chosen = chosen_MK.view(shape[0], -1)
    return counts_BE.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=like.dtype))


def _means(shares_ME: Tensor, shape: torch.Size) -> Tensor:
    return shares_ME.view(shape[0], shape[1], -1).mean(1)


def route(
    x_BTD: Tensor, weight_ED: Tensor, num_active: int, normalises: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts by a softmax over all of them.

    Args:
        x_BTD: what the experts will read.
        weight_ED: the router's rows.
        num_active: K.
        normalises: whether a token's weights add up to 1.
    Returns:
        weights (M, K), fp32; the chosen experts (M, K), int64, the likeliest first; and how uneven
        they are, 0-d: ``T E sum_e f_e P_e``, f the share of a row's tokens that go through an
        expert (it adds up to K) and P its mean share of the softmax, summed over the rows of the
        batch. ``T K`` a row where all are equal.
    Cost: 2 M D E FLOPs forward, twice that backward; keeps x, (M, E) in fp32 and the choice.
    Numerics: in fp32 whatever the dtype of x (fp64 for fp64), under autocast too.
    Source: Qwen3 (arXiv:2505.09388); the balance is that of the Switch Transformer
        (arXiv:2101.03961, eq. 4 to 6) row by row as DeepSeek-V3 has it (arXiv:2412.19437, eq. 17).
    """
    return _Route.apply(x_BTD, weight_ED, num_active, normalises)


@dataclass(frozen=True)
class Dealt:
    """How rows are dealt out."""

    order_S: Tensor
    """Of each dealt row: its place in the choice, token after token."""
    back_S: Tensor
    """The inverse permutation."""
    counts: list[int]
    """Rows of each expert."""


def deal(chosen_MK: Tensor, num_experts: int) -> Dealt:
    """Put the rows of every expert behind one another, its tokens in their order.

    Cost: a sort of M K numbers, and the host waits for the device.
    """
    flat_S = chosen_MK.flatten()
    order_S = flat_S.argsort(stable=True)
    numbers_S = torch.arange(len(flat_S), device=flat_S.device)
    back_S = torch.empty_like(order_S).scatter_(0, order_S, numbers_S)
    return Dealt(order_S, back_S, _rows_of_each(flat_S, num_experts))


def _rows_of_each(flat_S: Tensor, num_experts: int) -> list[int]:
    if type(flat_S) is not Tensor:  # shapes alone: evenly, as ``specs.Expert.rows``
        share, rest = divmod(len(flat_S), num_experts)
        return [share + (idx < rest) for idx in range(num_experts)]
    return torch.bincount(flat_S, minlength=num_experts).tolist()


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, order_S, back_S, num_active):
        ctx.save_for_backward(back_S)
        ctx.num_active = num_active
        return x_MD.index_select(0, order_S // num_active)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_SD):
        (back_S,) = ctx.saved_tensors
        dx_MKD = dx_SD.index_select(0, back_S).unflatten(0, (-1, ctx.num_active))
        return dx_MKD.sum(1), None, None, None


def take(x_MD: Tensor, dealt: Dealt, num_active: int) -> Tensor:
    """Each token's row once for each of its experts, (S, D), in the order of ``dealt``."""
    return _Take.apply(x_MD, dealt.order_S, dealt.back_S, num_active)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_SD, weights_MK, order_S, back_S):
        ctx.save_for_backward(y_SD, weights_MK, order_S, back_S)
        return (_by_token(y_SD, back_S, weights_MK) * _column(weights_MK, y_SD)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MD):
        y_SD, weights_MK, order_S, back_S = ctx.saved_tensors
        dy_M1D = dy_MD.unsqueeze(1)
        dweights_MK = (_by_token(y_SD, back_S, weights_MK) * dy_M1D).sum(-1, dtype=weights_MK.dtype)
        dy_SD = (dy_M1D * _column(weights_MK, y_SD)).flatten(0, 1).index_select(0, order_S)
        return dy_SD, dweights_MK, None, None


def _by_token(y_SD: Tensor, back_S: Tensor, weights_MK: Tensor) -> Tensor:
    return y_SD.index_select(0, back_S).unflatten(0, (-1, weights_MK.shape[1]))


def _column(weights_MK: Tensor, y_SD: Tensor) -> Tensor:
    return weights_MK.to(y_SD.dtype).unsqueeze(-1)


def combine(y_SD: Tensor, weights_MK: Tensor, dealt: Dealt) -> Tensor:
    """What a token's experts gave, weighted and added up, (M, D), dtype of ``y_SD``. Keeps both."""
    return _Combine.apply(y_SD, weights_MK, dealt.order_S, dealt.back_S)
