"""Whole weights of a model that processes have in parts (tensor parallel, FSDP2, both), and the
optimizer's state where they compute in parts.

A checkpoint looks the same whatever the number of processes that wrote it (``full_state`` does it
for the state under FSDP2 alone). Every process calls these functions; each is a collective of those
that have parts of the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from crnet.config.model_spec import ModelSpec
from crnet.model.language_model import LanguageModel
from crnet.model.padding import reshaped_state
from crnet.parallel.whole import whole
from crnet.parallel.world import World


def whole_weights(model: LanguageModel, world: World) -> dict[str, Tensor]:
    """Every parameter whole, by name, as it is stored, on the CPU of the process with the first
    part and the first rows; nothing on others. Cost: the split tensors once over the wires, one at
    a time."""
    found, keeps = {}, _keeps(world)
    for name, parameter in model.named_parameters():
        value = _whole(parameter.detach(), name, model.spec, world)
        if keeps:
            found[name] = value.cpu()
    return found


def whole_state(state: Mapping[str, Any], spec: ModelSpec, world: World) -> dict[str, Any]:
    """An optimizer's state dict with whole tensors, as ``whole_weights``; empty on other processes.

    What has the shape of its parameter was split as that is; the rest every process has alike.
    """

    keeps = _keeps(world)

    def gather(value: Tensor, name: str) -> Tensor | None:
        found = _whole(value, name, spec, world)
        return found.cpu() if keeps else None

    found = reshaped_state(state, spec.stored_shapes, gather)
    return found if keeps else {}


def _keeps(world: World) -> bool:
    return world.part[0] == 0 and dist.get_rank() == world.keeper


def _whole(value: Tensor, name: str, spec: ModelSpec, world: World) -> Tensor:
    value, dim = whole(value), spec.split_dims.get(name)
    if dim is None:
        return value
    value = value.contiguous()
    parts = [torch.empty_like(value) for _ in range(spec.num_parts)]
    dist.all_gather(parts, value, group=world.parts)
    return torch.cat(parts, dim)
