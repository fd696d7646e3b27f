"""Optimizers of a model that is split over processes: whole matrices for those that need them.

A method says of each tensor whether it needs it whole (``OptimizerMethod.whole``). What it does not
is stepped where it lies, each process its part. Every other tensor has one owner
(``optimizers._sharing.owners``). Owners work side by side, in rounds of one tensor each, or of two
factors that are stepped at once:

    parts of gradient and weight -> their owner | the method's own step, on a stand-in | parts back

An owner keeps the state of its tensors and no other process does. Refused: to gather every matrix
on every process, which computes each step as often as there are processes and keeps every state as
often; and to keep whole weights with their owner, a second copy of the model. Random numbers come
from the run's seed, the full name and the step, so it does not matter who owns what.

Copies that are split (``data`` x ``shard``) have an owner each, which do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from crnet.optimizers import OptimizerMethod, Settings, _torch
from crnet.optimizers import _low_precision as low_precision
from crnet.optimizers._low_precision import Bf16Update
from crnet.optimizers._sharing import owners, part_of, stepped_at_once
from crnet.parallel.whole import is_split
from crnet.specs import TensorSpec

Parameters = Mapping[str, tuple[TensorSpec, Tensor]]
"""Trained ones, by full name."""


def build(
    method: OptimizerMethod,
    parameters: Parameters,
    options: Any,
    settings: Settings,
    update: Bf16Update | None,
) -> Optimizer:
    """The method's optimizer of the trained parameters, whole or split over processes.

    Args, Raises: ``low_precision.build``.
    """

    def of(given: Parameters) -> Optimizer:
        return low_precision.build(method, given, options, settings, update)

    split = {name: each for name, each in parameters.items() if is_split(each[1])}
    if not split:
        return of(parameters)
    group = _group(next(iter(split.values()))[1])
    specs = {name: spec for name, (spec, _) in split.items()}
    owner_of = owners(method, options, specs, dist.get_world_size(group))
    if not owner_of:
        return of(parameters)
    assert update is None, "a split model has fp32 weights (config.check)"
    at_once = stepped_at_once(method, {name: specs[name] for name in owner_of})
    return Owned(of, parameters, owner_of, at_once, group)


@dataclass
class _Whole:
    """A parameter that is needed whole, and its stand-in, which has memory in its round alone."""

    parameter: Any
    """This process's part, a DTensor."""
    stand_in: nn.Parameter
    owner: int
    sizes: list[int]
    """Items of each rank's part."""


class Owned(_torch.Optimizer):
    """A method's optimizer behind stand-ins for what it needs whole.

    Groups and state are the method's, with the model's parameters in them. The state of a tensor
    that is needed whole is whole, and with its owner alone.

    Args:
        build: makes the method's optimizer of its parameters by full name.
        parameters: the trained ones, by full name, split over processes.
        owner_of: rank in ``group`` of the owner of each tensor that is needed whole.
        at_once: full names of those tensors, each alone or with what is stepped at once with it.
        group: the processes that split the model.
    Cost of a step: a whole matrix is sent three times (gradient, weight, new weight), each part to
    one process; an owner allocates gradient, weight and one copy of the largest matrix, or pair,
    that it has, beside what the method's step takes.
    """

    def __init__(
        self,
        build: Callable[[Parameters], Optimizer],
        parameters: Parameters,
        owner_of: Mapping[str, int],
        at_once: Sequence[tuple[str, ...]],
        group: Any,
    ):
        self.group = group
        self._rank, size = dist.get_rank(group), dist.get_world_size(group)
        whole = {}
        for name, owner in owner_of.items():
            spec, part = parameters[name]
            parameter: Any = part
            sizes = [part_of(spec, rank, size).num_items for rank in range(size)]
            stand_in = nn.Parameter(_without_memory(parameter))
            whole[name] = _Whole(parameter, stand_in, owner, sizes)
            assert parameter.to_local().numel() == sizes[self._rank], name
        self._inner = build(
            {
                name: (spec, whole[name].stand_in if name in whole else parameter)
                for name, (spec, parameter) in parameters.items()
            }
        )
        stands_for = {each.stand_in: each.parameter for each in whole.values()}
        groups = [
            {**group, "params": [stands_for.get(each, each) for each in group["params"]]}
            for group in self._inner.param_groups
        ]
        super().__init__(groups, {})
        self._whole = {each.parameter: each for each in whole.values()}
        units = [[whole[name] for name in unit] for unit in at_once]
        self._rounds = list(_rounds(units, size))
        for parameter in self._parameters():
            self._take_back(parameter)

    def owner_of(self, parameter: Tensor) -> int | None:
        """Rank in ``group`` of the process that has a parameter's state; None: each its part."""
        found = self._whole.get(parameter)
        return None if found is None else found.owner

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient. Every process of the group takes it."""
        loss = _torch.loss_of(closure)
        for own, group in zip(self.param_groups, self._inner.param_groups, strict=True):
            group.update({key: value for key, value in own.items() if key != "params"})
        in_parts = [each for each in self._parameters() if each not in self._whole]
        for parameter in in_parts:
            self._lend(parameter)
        self._inner.step()
        for parameter in in_parts:
            self._take_back(parameter)
        gradients = [each.grad for each in in_parts]
        for parameter in in_parts:  # its step is done
            parameter.grad = None
        for each in self._rounds:
            due = [[one for one in unit if one.parameter.grad is not None] for unit in each]
            self._step_whole([unit for unit in due if unit])
        for parameter, gradient in zip(in_parts, gradients, strict=True):
            parameter.grad = gradient
        for own, group in zip(self.param_groups, self._inner.param_groups, strict=True):
            own.update({key: value for key, value in group.items() if key != "params"})
        return loss

    def _parameters(self) -> list[Tensor]:
        return [each for group in self.param_groups for each in group["params"]]

    def _step_whole(self, units: Sequence[Sequence[_Whole]]) -> None:
        """One round: at most one unit of each owner, whose tensors are sent one after another."""
        if not units:
            return
        turns = [
            [unit[idx] for unit in units if idx < len(unit)] for idx in range(max(map(len, units)))
        ]
        mine = [self._fetch(due) for due in turns]
        held = [(each, value) for each, value in mine if each is not None]
        for each, _ in held:
            self._lend(each.parameter)
        if held:
            self._inner.step()
        for each, _ in held:
            self._take_back(each.parameter)
            each.stand_in.grad = None
        for due, (each, value) in zip(turns, mine, strict=True):
            if each is not None:
                value = each.stand_in.detach().reshape(-1)
                each.stand_in.data = _without_memory(each.parameter)
            self._from_owners(due, value)

    def _fetch(self, due: Sequence[_Whole]) -> tuple[_Whole | None, Tensor]:
        """Bring one tensor of each owner to it. Returns: that of this process, whose stand-in then
        has value and gradient; its items, or none."""
        mine = next((each for each in due if each.owner == self._rank), None)
        gradient = self._to_owners(due, [each.parameter.grad for each in due])
        value = self._to_owners(due, [each.parameter for each in due])
        if mine is not None:
            shape = mine.parameter.shape
            mine.stand_in.data, mine.stand_in.grad = value.view(shape), gradient.view(shape)
        return mine, value

    def _to_owners(self, due: Sequence[_Whole], tensors: Sequence[Any]) -> Tensor:
        """Bring the parts of one tensor for each of these to its owner.

        Returns: the items of the tensor of which this process is the owner, in their order.
        """
        parts = torch.cat([each.to_local().reshape(-1) for each in tensors])
        sent, received = self._sizes(due)
        whole = parts.new_empty(sum(received))
        dist.all_to_all_single(whole, parts, received, sent, group=self.group)
        return whole

    def _from_owners(self, due: Sequence[_Whole], value: Tensor) -> None:
        """Inverse of ``_to_owners``, into the parameters."""
        received, sent = self._sizes(due)
        parts = value.new_empty(sum(received))
        dist.all_to_all_single(parts, value.contiguous(), received, sent, group=self.group)
        sizes = [each.sizes[self._rank] for each in due]
        for each, part in zip(due, parts.split(sizes), strict=True):
            local = each.parameter.to_local()
            local.copy_(part.view(local.shape))

    def _sizes(self, due: Sequence[_Whole]) -> tuple[list[int], list[int]]:
        """Items that go to each owner from here, and that come here from each rank."""
        ranks = range(dist.get_world_size(self.group))
        sizes = {each.owner: each.sizes for each in due}
        sent = [sizes[rank][self._rank] if rank in sizes else 0 for rank in ranks]
        return sent, sizes.get(self._rank, [0 for _ in ranks])

    def _lend(self, parameter: Tensor) -> None:
        """Give the method's optimizer the state of a parameter."""
        if state := self.state.get(parameter):
            self._inner.state[self._key(parameter)] = state

    def _take_back(self, parameter: Tensor) -> None:
        """Inverse of ``_lend``."""
        state = self._inner.state.pop(self._key(parameter), None)
        if state and self.owner_of(parameter) in (None, self._rank):
            self.state[parameter] = state

    def _key(self, parameter: Tensor) -> Tensor:
        found = self._whole.get(parameter)
        return parameter if found is None else found.stand_in


def owner_of(optimizer: Optimizer, parameter: Tensor) -> int | None:
    """Rank, among the processes that split a parameter, of the one that has its state, whole; None:
    each has its part of it, or all of it."""
    return optimizer.owner_of(parameter) if isinstance(optimizer, Owned) else None


def has_state(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Whether this process is to have a parameter's state, or a part of it."""
    owner = owner_of(optimizer, parameter)
    return owner is None or owner == dist.get_rank(optimizer.group)  # type: ignore[attr-defined]


def _rounds(units: Iterable[list[_Whole]], num_ranks: int) -> Iterator[list[list[_Whole]]]:
    """The owners' units, at most one of each owner at a time, the owners in order."""
    of_rank: list[list[list[_Whole]]] = [[] for _ in range(num_ranks)]
    for unit in units:
        of_rank[unit[0].owner].append(unit)
    for idx in range(max(map(len, of_rank))):
        yield [mine[idx] for mine in of_rank if idx < len(mine)]


def _group(parameter: Any) -> Any:
    """The processes that split a parameter: of a mesh of copies, those of one copy.

    Raises:
        AssertionError: it is split by another dimension than rows, or by two.
    """
    split = [idx for idx, each in enumerate(parameter.placements) if not each.is_replicate()]
    assert len(split) == 1, parameter.placements
    assert parameter.placements[split[0]].is_shard(0), parameter.placements
    return parameter.device_mesh.get_group(split[0])


def _without_memory(parameter: Tensor) -> Tensor:
    """Of the parameter's whole shape, dtype and device; not to be read."""
    empty = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
    return empty.expand(parameter.shape)
