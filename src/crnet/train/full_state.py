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
from crnet.model.language_model import LanguageModel
from crnet.model.padding import pad


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_first_rank() -> bool:
    """Whether this process is the one that writes: the only one, or rank 0."""
    return not is_distributed() or torch.distributed.get_rank() == 0


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter whole, by name, on the CPU of rank 0; nothing on other ranks."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: dict[str, Any] = get_model_state_dict(model, options=options)
    # A tied head is in a state dict, and is no parameter of its own.
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def load_full_weights(model: LanguageModel, weights: Mapping[str, Tensor]) -> None:
    """Give every rank its share of whole weights, which every rank has read and compared."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    stored = model.spec.stored_shapes
    wide: dict[str, Any] = {name: pad(weight, stored[name]) for name, weight in weights.items()}
    # Not strict: a tied head has no weight of its own.
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, wide, options=options)


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with whole tensors, on the CPU of rank 0; empty on other ranks."""
    keeps = is_first_rank()

    def whole(value: Any) -> Any:
        if isinstance(value, Tensor):
            full: Any = value.full_tensor() if _is_sharded(value) else value  # type: ignore[attr-defined]
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
        if index in shared and _is_sharded(parameter):
            shared[index] = {
                name: _shard_like(parameter, value) for name, value in shared[index].items()
            }
    optimizers.load_state(optimizer, {**state, "state": shared})


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def _shard_like(parameter: Any, value: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    if not isinstance(value, Tensor) or not value.dim() or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    # No rank sends: each has the whole, and keeps its own part.
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)
