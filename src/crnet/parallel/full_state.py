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
from torch import distributed as dist

from crnet import optimizers
from crnet.parallel.owners import Owned, has_state, owner_of
from crnet.parallel.whole import is_split, split_like


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter whole, by name, on the CPU of rank 0; nothing on other ranks."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: dict[str, Any] = get_model_state_dict(model, options=options)
    # A tied head is in a state dict, and is no parameter of its own.
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with whole tensors, on the CPU of rank 0; empty on other ranks.

    It is that of one process: what one rank alone has the state of is brought to rank 0, a
    tensor at a time.
    """
    keeps = dist.get_rank() == 0

    def whole(value: Any) -> Any:
        if isinstance(value, Tensor):
            full: Any = value.full_tensor() if is_split(value) else value  # type: ignore[attr-defined]
            return full.cpu() if keeps else None
        if isinstance(value, dict):
            return {key: whole(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(whole, value))
        return value

    found, states = optimizer.state_dict(), {}
    for index, parameter in enumerate(_parameters(optimizer)):  # as torch numbers them
        state = found["state"].get(index)
        if isinstance(optimizer, Owned):
            state = _from_owner(optimizer, parameter, state)
        if state:
            states[index] = whole(state)
    return {**found, "state": states} if keeps else {}


def _from_owner(optimizer: Owned, parameter: Tensor, state: Any) -> Any:
    """On rank 0 the state of a tensor that has an owner, None elsewhere; ``state`` of another."""
    owner, group = optimizer.owner_of(parameter), optimizer.group
    if owner is None:
        return state
    ranks = dist.get_process_group_ranks(group)
    source, rank = ranks[owner], dist.get_rank()
    if 0 not in ranks:  # another copy has the same
        return None
    if source == 0:
        return state if rank == 0 else None
    box: list[Any] = [None]
    if rank == source:
        dist.send_object_list([_on_cpu(state)], dst=0, group=group)
    elif rank == 0:
        dist.recv_object_list(box, src=source, group=group)
    return box[0]


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_on_cpu, value))
    return value.cpu() if isinstance(value, Tensor) else value


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give every rank its share of a whole state, which every rank has read.

    What one rank alone steps goes to it, whole. Of the rest, what has the shape of its parameter is
    split as the parameter is; what has another is on every rank.
    """
    parameters = _parameters(optimizer)
    indices = [each for group in state["param_groups"] for each in group["params"]]
    shared: dict[Any, Any] = dict(state["state"])
    for parameter, index in zip(parameters, indices, strict=True):
        if index not in shared or not is_split(parameter):
            continue
        if owner_of(optimizer, parameter) is None:
            shared[index] = {name: _part(parameter, value) for name, value in shared[index].items()}
        elif not has_state(optimizer, parameter):
            del shared[index]
    optimizers.load_state(optimizer, {**state, "state": shared})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]


def _part(parameter: Any, value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.dim() or value.shape != parameter.shape:
        return value
    return split_like(parameter, value)
