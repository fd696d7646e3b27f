"""Optimizer state as whole tensors, where a model is split over ranks (FSDP2).

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
from torch import Tensor
from torch import distributed as dist

from crnet import optimizers
from crnet.parallel.owners import Owned, has_state, owner_of
from crnet.parallel.whole import is_split, split_like
from crnet.parallel.world import World


def full_optimizer_state(optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """``optimizer.state_dict()`` with whole tensors, on the CPU of the ``keeper``; empty on other
    ranks.

    It is that of one process: what one rank alone has the state of is brought to the keeper, a
    tensor at a time.
    """
    keeper = world.keeper
    keeps = dist.get_rank() == keeper

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
            state = _from_owner(optimizer, parameter, state, keeper)
        if state:
            states[index] = whole(state)
    return {**found, "state": states} if keeps else {}


def _from_owner(optimizer: Owned, parameter: Tensor, state: Any, keeper: int) -> Any:
    """On the keeper the state of a tensor that has an owner, None elsewhere; ``state`` of one that
    has none."""
    owner, group = optimizer.owner_of(parameter), optimizer.group
    if owner is None:
        return state
    ranks = dist.get_process_group_ranks(group)
    source, rank = ranks[owner], dist.get_rank()
    if keeper not in ranks:  # another copy has the same
        return None
    if source == keeper:
        return state if rank == keeper else None
    box: list[Any] = [None]
    if rank == source:
        dist.send_object_list([_on_cpu(state)], dst=keeper, group=group)
    elif rank == keeper:
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
