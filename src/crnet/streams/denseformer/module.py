"""DenseFormer's sums, with a backward written by hand.

Autograd on the plain formula (``naive_mix``) keeps no more, but makes a product as large as the
stream for the gradient of every weight. Here it is a dot.

Shapes: B batch, T tokens, D model width, S outputs beside the block's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crnet.streams._add import Add


class _Mix(torch.autograd.Function):
    """Keeps the outputs and the weights."""

    @staticmethod
    def forward(ctx, own_1, others_S, *outputs):
        ctx.save_for_backward(own_1, others_S, *outputs)
        *below, own_BTD = outputs
        wide = _wide(own_BTD)
        x_BTD = own_BTD.to(wide) * own_1.to(wide)
        for idx, output_BTD in enumerate(below):
            x_BTD.addcmul_(output_BTD.to(wide), others_S[idx].to(wide))
        return x_BTD.to(own_BTD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_BTD):
        own_1, others_S, *outputs = ctx.saved_tensors
        wide = _wide(dx_BTD)
        dx, weights = dx_BTD.to(wide), [own_1[0]] if others_S is None else [*others_S, own_1[0]]
        slopes, gradients = [], []
        for idx, (output_BTD, weight) in enumerate(zip(outputs, weights, strict=True)):
            output = output_BTD.to(wide)
            slopes.append(torch.dot(dx.flatten(), output.flatten()))
            wanted = ctx.needs_input_grad[2 + idx]
            gradients.append((dx * weight.to(wide)).to(output_BTD.dtype) if wanted else None)
        *others, own = slopes
        dothers_S = None if others_S is None else torch.stack(others).to(others_S.dtype)
        return own.view(1).to(own_1.dtype), dothers_S, *gradients


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def mix(outputs: Sequence[Tensor], own_1: Tensor, others_S: Tensor | None) -> Tensor:
    """Return ``own X_i + sum_j others_j X_j``.

    Args:
        outputs: the X_j (B, T, D), the block's own at the end, of one dtype.
        own_1: weight of the block's own.
        others_S: weights of the others; None: there are none.
    Returns:
        (B, T, D), dtype of the outputs.
    Cost: keeps the outputs; forward two, backward three passes over each.
    Numerics: in fp32 (fp64 for fp64), rounded once. With weights 1 and 0 the block's own, bit for
        bit.
    Source: arXiv:2402.02622.
    """
    return _Mix.apply(own_1, others_S, *outputs)


def naive_mix(outputs: Sequence[Tensor], own_1: Tensor, others_S: Tensor | None) -> Tensor:
    """``mix`` as the formula reads, for tests."""
    *below, own_BTD = outputs
    x_BTD = own_1 * own_BTD
    for idx, output_BTD in enumerate(below):
        assert others_S is not None
        x_BTD = x_BTD + others_S[idx] * output_BTD
    return x_BTD


class Outputs(Add):
    """Adds to the stream; behind a block's last sublayer mixes outputs. The state is the stream and
    the outputs that later sums read, not mixed."""

    own: nn.Parameter | None
    others: nn.Parameter | None

    def __init__(self, around: Any):
        """``around``: where it stands (``Around``, beside the declaration)."""
        super().__init__()
        below = around.held(around.output - 1)
        every, sources = [*below, around.output], around.sources
        self.is_lowest = around.is_first and around.output == 1
        self.holds_embedding, self.is_last = bool(below), around.is_last
        self.reads = [every.index(each) for each in sources]
        self.keeps = [every.index(each) for each in around.held(around.output)]
        sizes = {"own": 1 if sources else 0, "others": len(sources) - 1}
        for name, size in sizes.items():
            made = nn.Parameter(torch.empty(size)) if size > 0 else None
            self.register_parameter(name, made)

    def write(self, state: tuple[Tensor, ...], y_BTD: Tensor) -> tuple[Tensor, ...]:
        """The stream with the sublayer's output in it, mixed where a sum is due; the outputs."""
        x_BTD, *held = state
        if self.is_lowest and self.holds_embedding:
            held = [x_BTD]
        (x_BTD,) = super().write((x_BTD,), y_BTD)
        if not self.is_last:
            return (x_BTD, *held)
        every = [*held, x_BTD]
        if self.own is not None:
            x_BTD = mix([every[idx] for idx in self.reads], self.own, self.others)
        return (x_BTD, *(every[idx] for idx in self.keeps))
