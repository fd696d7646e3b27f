"""Weights and optimizer state as whole tensors, where a model is split over ranks (FSDP2).

A checkpoint looks the same whatever the number of ranks that wrote it, so that any other number can
go on from it. The optimizer's state is gathered tensor by tensor, not by
``torch.distributed.checkpoint``: that takes an optimizer step to learn what a state looks like, and
casts it to the dtype of the parameter.

Every rank calls these functions; each is a collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crnet import optimizers
from crnet.parallel.whole import is_split, split_like


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter whole, by name, on the CPU of rank 0; nothing on other ranks."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: dict[str, Any] = get_model_state_dict(model, options=options)
    # A tied head is in a state dict, and is no parameter of its own.
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with whole tensors, on the CPU of rank 0; empty on other ranks."""
    keeps = torch.distributed.get_rank() == 0

    def whole(value: Any) -> Any:
        if isinstance(value, Tensor):
            full: Any = value.full_tensor() if is_split(value) else value  # type: ignore[attr-defined]
            return full.cpu() if keeps else None
        if isinstance(value, dict):
            return {key: whole(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(whole, value))
        return value

    found = whole(optimizer.state_dict())
    return found if keeps else {}


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give every rank its share of a whole state, which every rank has read.

    What has the shape of its parameter is split as the parameter is; the rest is on every rank.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    indices = [each for group in state["param_groups"] for each in group["params"]]
    shared: dict[Any, Any] = dict(state["state"])
    for parameter, index in zip(parameters, indices, strict=True):
        if index in shared and is_split(parameter):
            shared[index] = {name: _part(parameter, value) for name, value in shared[index].items()}
    optimizers.load_state(optimizer, {**state, "state": shared})


def _part(parameter: Any, value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.dim() or value.shape != parameter.shape:
        return value
    return split_like(parameter, value)
