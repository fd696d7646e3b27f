"""Bytes and kernels of a micro-batch, counted operation by operation on tensors without memory.

Shapes, order and dtypes are those of a run; nothing is computed and nothing allocated, so a model
of any size is counted in seconds. An operation that only looks at its argument is no kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crnet.cost.micro_batch import MicroBatch
from crnet.layers import attention
from crnet.model.build import set_dtype
from crnet.model.language_model import LanguageModel
from crnet.specs import Traffic

_FREE = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze"),
    *("detach", "alias", "permute", "as_strided", "squeeze", "unbind", "device"),
    *("split", "split_with_sizes"),
    *("empty", "empty_like", "new_empty", "empty_strided", "lift_fresh", "is_pinned"),
}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_WRITTEN = ("out", "grad_input")
"""Keywords of what an operation writes."""
_TABLES = {"arange", "neg", "pow", "cos", "sin", "div"}
"""Of the rotary tables: once a run."""


class Count(TorchDispatchMode):
    """Counts while it is on.

    Attributes:
        passes: bytes and kernels that are neither products nor attention.
        products: kernels and bytes of products.
    """

    def __init__(self):
        super().__init__()
        self.passes, self.products = Traffic(), Traffic()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in _FREE or name in _TABLES or "attention" in name:
            return out
        read = {key: value for key, value in kwargs.items() if key not in _WRITTEN}
        if kwargs.get("beta") == 0:  # what it adds to is not read
            args = args[1:]
        moved = Traffic(_moved(name, _tensors((args, read)), _tensors(out)), 1)
        if name in _PRODUCTS:
            self.products += moved
        else:
            self.passes += moved
        return out


def _moved(name: str, read: list[Tensor], written: list[Tensor]) -> int:
    """Bytes read and written; of a lookup and a scattered sum, what the index names."""
    if name == "copy_":
        read = read[1:]
    if name in ("index_add_", "scatter_add_"):
        *_, index, values = read
        return 3 * _size(values) + _size(index)
    if name in ("embedding", "index_select"):
        return 2 * _size(written[0]) + _size(read[-1])
    return sum(map(_size, read)) + sum(map(_size, written))


def _size(tensor: Tensor) -> int:
    items = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        items *= size if stride else 1  # an expanded item is read once
    return items * tensor.element_size()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _without_tables() -> Iterator[None]:
    """Rotary tables and masks are cached: none with memory comes in, none without goes out."""
    attention.forget_tables()
    try:
        yield
    finally:
        attention.forget_tables()


def without_memory(run: Callable[[LanguageModel, Tensor], Any], micro_batch: MicroBatch) -> Any:
    """``run(model, tokens)`` on tensors that have shapes and no memory.

    The model is as after a first micro-batch: every trained parameter has a gradient. Autocast and
    dtypes are those of the precision.
    """
    dtype = torch.bfloat16 if micro_batch.precision == "bf16" else torch.float32
    with _without_tables(), FakeTensorMode():
        model = LanguageModel(micro_batch.spec)
        set_dtype(model, dtype)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        tokens = torch.zeros(micro_batch.sequences, micro_batch.length, dtype=torch.int64)
        return run(model, tokens)


def traffic(micro_batch: MicroBatch) -> tuple[Traffic, Traffic]:
    """Of a micro-batch forward and backward, nothing recomputed: of passes and of products."""

    def run(model: LanguageModel, tokens: Tensor) -> tuple[Traffic, Traffic]:
        with Count() as count:
            with torch.autocast("cpu", torch.bfloat16, enabled=micro_batch.is_mixed):
                total, _ = model(tokens, tokens)
            total.backward()
        return count.passes, count.products

    return without_memory(run, micro_batch)
