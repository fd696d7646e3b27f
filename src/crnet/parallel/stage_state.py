"""Weights and optimizer state of all stages, on the process that writes; and back.

A checkpoint looks the same whatever the number of stages that wrote it. What a process has is sent
tensor by tensor to the first process of its pipeline; the optimizer's state, which torch lists by
number, is put together by the names in its groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from crnet.config.model_spec import ModelSpec
from crnet.parallel.world import World
from crnet.specs import TensorSpec


def weights_of_stages(
    found: Mapping[str, Tensor], spec: ModelSpec, world: World
) -> dict[str, Tensor]:
    """Every stage's weights on rank 0, by name, in the order of the model; elsewhere nothing.

    Args:
        found: this process's.
        spec: of the whole model.
    Cost: all weights but the first stage's cross once; rank 0 holds them on the CPU.
    """
    if world.parallel.pipeline == 1:
        return dict(found)
    parts = _on_first(dict(found), world)
    all_of_them = {name: tensor for part in parts for name, tensor in part.items()}
    return {name: all_of_them[name] for name in spec.tensors if parts}


def state_of_stages(state: Mapping[str, Any], spec: ModelSpec, world: World) -> dict[str, Any]:
    """``optimizer.state_dict()`` of all stages on rank 0, as one process would have it; elsewhere
    nothing. ``spec``: of the whole model. Cost: as ``weights_of_stages``."""
    if world.parallel.pipeline == 1:
        return dict(state)
    parts = _on_first(dict(state), world)
    return merged(parts, spec.tensors) if parts else {}


def merged(
    parts: Sequence[Mapping[str, Any]], declared: Mapping[str, TensorSpec]
) -> dict[str, Any]:
    """State dicts of optimizers of different parameters as one.

    Args:
        parts: their groups carry ``names``.
        declared: every parameter there is, in the order of the model: parameters and groups are
            numbered in it. Parameters of one group have equal settings, and are declared to.
    """
    found: dict[str, tuple[dict[str, Any], Any]] = {}
    for part in parts:
        for group in part["param_groups"]:
            settings = {key: value for key, value in group.items() if key not in _MEMBERS}
            for index, name in zip(group["params"], group["names"], strict=True):
                found[name] = settings, part["state"].get(index)
    groups: list[tuple[Any, list[str]]] = []
    for name, spec in declared.items():
        if name not in found:  # one that is not trained
            continue
        kind = spec.lr_factor, spec.decays, found[name][0]
        members = next((those for each, those in groups if each == kind), None)
        if members is None:
            groups.append((kind, members := []))
        members.append(name)
    order = {name: idx for idx, name in enumerate(name for _, those in groups for name in those)}
    return {
        "state": {order[name]: found[name][1] for name in order if found[name][1] is not None},
        "param_groups": [
            {**settings, "names": those, "params": [order[name] for name in those]}
            for (_, _, settings), those in groups
        ],
    }


_MEMBERS = ("params", "names")


def own_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Of a saved state: that of the parameters which this optimizer has, in its own order.

    Raises:
        LookupError: a parameter is missing there, or the state lists no names.
    """
    wanted = [group["names"] for group in optimizer.param_groups]
    if [group["names"] for group in state["param_groups"]] == wanted:
        return dict(state)
    where = {
        name: (group, index)
        for group in state["param_groups"]
        for name, index in zip(group["names"], group["params"], strict=True)
    }
    states, groups, number = {}, [], 0
    for names in wanted:
        indices = range(number, number + len(names))
        for name, index in zip(names, indices, strict=True):
            if (saved := where[name][1]) in state["state"]:
                states[index] = state["state"][saved]
        groups.append({**where[names[0]][0], "names": names, "params": list(indices)})
        number += len(names)
    return {**state, "state": states, "param_groups": groups}


@dataclass(frozen=True)
class _Sent:
    """Where a tensor stood: it is sent behind the rest."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _on_first(tree: Any, world: World) -> list[Any]:
    """What every process of rank 0's pipeline has, in the order of the stages, on the CPU of rank
    0; nothing on any other process."""
    pipe, cpu = world.pipe, torch.device("cpu")
    if dist.get_rank(world.rows) != 0:  # another copy of the same stages
        return []
    if not world.is_first:
        tensors: list[Tensor] = []
        plan = _apart(tree, tensors)
        dist.send_object_list([plan], group=pipe, group_dst=0, device=cpu)
        for each in tensors:
            dist.send(each.detach().cpu().contiguous(), group=pipe, group_dst=0)
        return []
    found = [_mapped(tree, Tensor, lambda tensor: tensor.detach().cpu())]
    for sender in range(1, world.parallel.pipeline):
        told: list[Any] = [None]
        dist.recv_object_list(told, group=pipe, group_src=sender, device=cpu)

        def receive(sent: _Sent, sender: int = sender) -> Tensor:
            tensor = torch.empty(sent.shape, dtype=sent.dtype)
            dist.recv(tensor, group=pipe, group_src=sender)
            return tensor

        found.append(_mapped(told[0], _Sent, receive))
    return found


def _apart(tree: Any, tensors: list[Tensor]) -> Any:
    def note(tensor: Tensor) -> _Sent:
        tensors.append(tensor)
        return _Sent(tuple(tensor.shape), tensor.dtype)

    return _mapped(tree, Tensor, note)


def _mapped(tree: Any, kind: type, change: Any) -> Any:
    """A tree of dicts and sequences with everything of a kind changed, in the order that it has."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, kind, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(value, kind, change) for value in tree)
    return tree
