"""Whole tensors of a model that is split over processes, for what cannot be done by parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_split(tensor: Any) -> bool:
    """Whether a tensor is one process's part of a larger one."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Tensor:
    """The whole of a tensor that may be split."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def split_like(parameter: Any, value: Tensor) -> Any:
    """This process's part of a whole value that every process has; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


@contextlib.contextmanager
@torch.no_grad()
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Meanwhile a module's own parameters are whole, the same on every process, and may be
    changed; afterwards each process has its part of what they then are.

    Cost: the module's parameters once over the wires, and in memory.
    """
    found: list[tuple[str, Any]] = [
        (name, parameter)
        for name, parameter in module.named_parameters(recurse=False)
        if is_split(parameter)
    ]
    for name, parameter in found:
        module._parameters[name] = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
    try:
        yield
        for name, parameter in found:
            whole = module._parameters[name]
            assert whole is not None
            parameter.copy_(split_like(parameter, whole.detach()))
    finally:
        for name, parameter in found:
            module._parameters[name] = parameter
