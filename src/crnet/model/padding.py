"""Feed-forward widths that a GPU's matrix products like, stored beside the declared ones.

A width that is no multiple of 8 (``llama-1b``: 5461) leaves no row of a 16-bit matrix aligned to 16
bytes, and none of Hopper's own products can be taken. Such a width is stored filled up with zeros.
What fills up stays zero: silu(0) 0 = gelu(0) = 0, so the map ``down`` reads 0 there and its rows
get no gradient, and it hands back 0, so the maps before it get none. Only here are the two shapes
known at once: a checkpoint holds declared shapes and does not know of padding.

Refused: a wider model whose extra columns are trained (another model), and padding activations in
every product (a copy each time).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.config.model_spec import ModelSpec
from crnet.optimizers import OptimizerMethod

ALIGNED = 8
"""Items that a row of a 16-bit matrix must be a multiple of."""
WIDTH_MULTIPLE = 64
"""What an unaligned width is filled up to: a whole tile of the products."""

Shapes = Mapping[str, tuple[int, ...]]
"""By full name of a parameter."""


def stored_on(
    spec: ModelSpec, device: torch.device | str, optimizer: OptimizerMethod | None = None
) -> ModelSpec:
    """The model as it is stored on a device: padded on CUDA, where that is exact and of use.

    Args:
        optimizer: that is to train it; None: nobody does.
    """
    exact = spec.pads and spec.adapter is None and (optimizer is None or optimizer.pads)
    odd = spec.shape.intermediate_size % ALIGNED
    is_gpu = torch.device(device).type == "cuda"
    return spec.padded(WIDTH_MULTIPLE) if is_gpu and odd and exact else spec


def pad(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor in the corner of zeros of that shape; itself where it has the shape."""
    if tuple(tensor.shape) == shape:
        return tensor
    wide = tensor.new_zeros(shape)
    wide[tuple(map(slice, tensor.shape))] = tensor
    return wide


def cut(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of ``pad``. What is cut is a copy on the CPU: a view would be saved with its zeros,
    and a copy on the GPU would want room there."""
    if tuple(tensor.shape) == shape:
        return tensor
    part = tensor.detach()[tuple(map(slice, shape))]
    return torch.empty(shape, dtype=tensor.dtype).copy_(part)


def pad_state(state: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """An optimizer's state dict: what has the shape of its parameter is padded as that is."""
    if spec.width_multiple == 1:
        return dict(state)
    wide = spec.wide_shapes
    return reshaped_state(state, _declared(spec), lambda value, name: pad(value, wide[name]))


def cut_state(state: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Inverse of ``pad_state``."""
    if spec.width_multiple == 1:
        return dict(state)
    declared = _declared(spec)
    return reshaped_state(state, spec.wide_shapes, lambda value, name: cut(value, declared[name]))


def _declared(spec: ModelSpec) -> Shapes:
    return {name: tensor.shape for name, tensor in spec.tensors.items()}


def reshaped_state(
    state: Mapping[str, Any], shapes: Shapes, change: Callable[[Tensor, str], Any]
) -> dict[str, Any]:
    """An optimizer's state dict: ``change(value, name)`` for what has the shape of its parameter,
    which ``shapes`` gives by full name."""
    if not state:  # of a rank that does not write
        return {}

    def changed(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            return change(value, name) if tuple(value.shape) == shapes[name] else value
        if isinstance(value, Mapping):
            return {key: changed(item, name) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(changed(item, name) for item in value)
        return value

    name_of = {
        index: name
        for group in state["param_groups"]
        for index, name in zip(group["params"], group["names"], strict=True)
    }
    states = {index: changed(value, name_of[index]) for index, value in state["state"].items()}
    return {**state, "state": states}
