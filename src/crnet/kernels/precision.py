"""The dtype that products are computed in, for operations with a hand-written backward.

Autocast does not look inside a ``torch.autograd.Function``: what ours get is cast first
(differentiably, so gradients come back in the inputs' own dtypes); the loss casts its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_casts: dict[int, tuple[Tensor, Tensor]] | None = None
"""By identity of a weight: the weight (held, so that no other takes its identity) and its cast."""

_noted: dict[int, Tensor] | None = None
"""By the address of their memory: casts of weights, held, so that no other takes their address."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype autocast would compute a product with ``x`` in; ``x.dtype`` without autocast."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def cast(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """``x`` and weights in ``compute_dtype(x)``, differentiable.

    Cost: none where they are in it already.
    """
    dtype = compute_dtype(x)
    return x.to(dtype), *(_noted_cast(weight, dtype) for weight in weights)


def _noted_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    found = _cast(weight, dtype)
    if torch.compiler.is_compiling() or _noted is None:
        return found
    if isinstance(weight, torch.nn.Parameter):  # a carry is cast here too
        _noted[found.untyped_storage().data_ptr()] = found
    return found


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return _Cast.apply(weight, dtype) if _is_kept(weight, dtype) else weight.to(dtype)


def _is_kept(weight: Tensor, dtype: torch.dtype) -> bool:
    # A compiled block makes its casts itself; a test of ``_casts`` would compile it every step.
    return (
        not torch.compiler.is_compiling()
        and _casts is not None
        and weight.dtype != dtype
        and isinstance(weight, torch.nn.Parameter)
    )


class _Cast(torch.autograd.Function):
    """``weight.to(dtype)`` by ``cast_weight``."""

    @staticmethod
    def forward(ctx, weight, dtype):
        ctx.dtype = weight.dtype
        return cast_weight(weight, dtype).detach()  # another tensor for every graph

    @staticmethod
    @once_differentiable
    def backward(ctx, dweight):
        return dweight.to(ctx.dtype), None


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in a dtype, to be used where no gradient is recorded; inside ``casts_kept`` the same
    tensor for the same parameter."""
    if not _is_kept(weight, dtype):
        return weight.to(dtype)
    assert _casts is not None
    if id(weight) not in _casts:
        _casts[id(weight)] = weight, weight.detach().to(dtype)
    return _casts[id(weight)][1]


@contextlib.contextmanager
def casts_kept() -> Iterator[None]:
    """Meanwhile each weight is cast once, however many micro-batches there are.

    The weights must not change meanwhile. Cost: the casts stay until the end of the context.
    """
    global _casts
    before, _casts = _casts, {}
    try:
        yield
    finally:
        _casts = before


@contextlib.contextmanager
def casts_noted() -> Iterator[dict[int, Tensor]]:
    """Meanwhile the casts that ``cast`` makes of weights are noted, and held; yields the note, by
    the address of their memory."""
    global _noted
    before, _noted = _noted, {}
    try:
        yield _noted
    finally:
        _noted = before


def scaled(tensor: Tensor, gain_1: Tensor) -> Tensor:
    """``gain * tensor`` in the dtype of the tensor, rounded once: a gain in fp32 stays so.

    ``gain_1``: one number, or one a column.
    """
    if tensor.dtype == gain_1.dtype:
        return tensor * gain_1
    if tensor.device.type == "cpu" and gain_1.numel() == 1:
        return tensor * gain_1.view(())  # torch's CPU kernels take a number as it is
    if torch.compiler.is_compiling():
        return (tensor * gain_1).to(tensor.dtype)
    return torch.mul(tensor, gain_1, out=torch.empty_like(tensor))
