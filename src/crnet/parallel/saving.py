"""A checkpoint in parts: every process writes the tensors that it has, while training goes on.

The state of an optimizer is taken apart into its tensors, by name of parameter and entry, and what
is left of it, in which each tensor is named. Put together again, it is the state that one process
would have saved, whatever the processes were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from crnet import optimizers
from crnet.model.language_model import LanguageModel
from crnet.parallel.owners import has_state, owner_of
from crnet.parallel.whole import is_split
from crnet.storage import parts
from crnet.storage.checkpoint import IN_STATE, IN_WEIGHTS, Checkpoint
from crnet.storage.parts import PART


def weights_in_parts(model: LanguageModel) -> dict[str, Tensor]:
    """This process's part of every weight, by the name it gets among the parts."""
    return {f"{IN_WEIGHTS}{name}": each.detach() for name, each in model.named_parameters()}


def taken_apart(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``optimizer.state_dict()`` with tensors named, complete on every process; and the tensors
    that this process has, by those names. A collective."""
    entries: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(optimizer.param_groups):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                part = f"{IN_STATE}{name}/{key}"
                tensors[part], value = value, {PART: part}
            entries.setdefault(name, {})[key] = value
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, entries)
    merged = {name: each for found in of_all for name, each in found.items()}
    groups = optimizer.state_dict()["param_groups"]
    index_of = dict(_named(groups))
    state = {index_of[name]: merged[name] for name in index_of if name in merged}
    return {"state": state, "param_groups": groups}, tensors


def put_together(
    optimizer: torch.optim.Optimizer, saved: Checkpoint, state: Mapping[str, Any]
) -> None:
    """Give every process its part of a state in parts; none has the whole of a split tensor.

    ``state``: the optimizer's, with tensors named.
    """
    declared = parts.declared(saved.folder)
    index_of = dict(_named(state["param_groups"]))
    tensors: dict[str, Tensor] = {}
    filled: dict[Any, Any] = {}
    for name, parameter in _named(optimizer.param_groups):
        entries = state["state"].get(index_of[name])
        if entries is None or not has_state(optimizer, parameter):
            continue
        in_parts = is_split(parameter) and owner_of(optimizer, parameter) is None
        filled[index_of[name]] = found = dict(entries)
        for key, value in entries.items():
            if isinstance(value, Mapping) and value.keys() == {PART}:
                shape, dtype = declared[value[PART]]
                tensors[value[PART]] = found[key] = _empty(parameter, shape, dtype, in_parts)
    parts.read_into(saved.folder, tensors)
    optimizers.load_state(optimizer, {**state, "state": filled})


def _empty(parameter: Any, shape: tuple[int, ...], dtype: torch.dtype, in_parts: bool) -> Tensor:
    if in_parts and tuple(parameter.shape) == shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=parameter.device if shape else "cpu")


def _named(groups: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """(full name, member) of an optimizer's groups: parameters, or their numbers in a state."""
    for group in groups:
        yield from zip(group["names"], group["params"], strict=True)
