"""Models that differ in their ranks alone, and what each of them takes.

A search asks for hundreds of them. Parameters, state and FLOPs are sums over slots: what a slot
adds is worked out once for each of its ranks, by the functions that the whole sums are made of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Literal

from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import RunConfig, update_of
from crnet.config.serialize import override
from crnet.cost.flops import block_flops, dense_block_flops
from crnet.cost.micro_batch import MicroBatch
from crnet.cost.peak import peak_bytes
from crnet.cost.plan_choice import plan_of
from crnet.cost.workload import (
    Workload,
    micro_batch_of,
    num_micro_batches,
    resolved,
    state_bytes,
)
from crnet.errors import ConfigError
from crnet.recompute.plan import RecomputePlan
from crnet.specs import Slot, TensorSpec

Kind = Literal["parameters", "state", "memory", "flops", "activations"]
"""``flops``: forward, of the blocks, over those of full rank."""

Ranks = tuple[tuple[int, ...], ...]
"""Of the blocks that a schedule speaks of, bottom first; one a position, in the model's order."""


def use(work: Workload, kind: Kind) -> float:
    """What a run takes: items, bytes or a share."""
    if kind == "parameters":
        return work.num_parameters()
    if kind == "state":
        return sum(work.state_bytes.values())
    if kind == "flops":
        one = one_row(work.spec, work.micro_batch.length)
        return block_flops(one, RecomputePlan())["forward"] / dense_block_flops(one)
    activations = peak_bytes(work.micro_batch, work.plan)
    return activations + (use(work, "state") if kind == "memory" else 0)


def one_row(spec: ModelSpec, length: int) -> MicroBatch:
    """Of which the share of FLOPs is told."""
    return MicroBatch(spec, 1, length)


class RankSpace:
    """What a configuration can be with other ranks, all multiples of one number."""

    def __init__(self, config: RunConfig, multiple: int):
        """Raises ``ConfigError``: no block has ranks, or a map is narrower than ``multiple``."""
        self.config = resolved(override(config, model={"rank": "1"}))
        self.multiple = multiple
        self.spec = spec = model_spec(self.config.model)
        """With every rank 1."""
        sizes = {
            each.kind: min(each.in_size, each.out_size)
            for each in spec.positions
            if not each.is_operator
        }
        self.positions = tuple(sizes)
        """By kind: all experts of a block have one rank."""
        options = spec.linear_options
        self.scheduled = [
            idx
            for idx in range(spec.num_layers)
            if spec.linear.has_ranks and spec.linear.fixed_rank(idx, options) is None
        ]
        """Blocks that a schedule speaks of."""
        if not self.scheduled:
            raise ConfigError(
                f"--model.linear {spec.linear.name}: no block of this model has ranks to plan"
            )
        widths = [*sizes.values()]
        self.caps = [width // max(multiple, 1) * multiple for width in widths]
        """Largest rank of each position."""
        if min(self.caps) < 1:
            raise ConfigError(f"--multiple is {multiple}; take 1 to {min(widths)}")
        self._slots: dict[tuple[int, tuple[int, ...]], tuple[Slot, ...]] = {}
        self._added: dict[tuple[Kind, int, tuple[int, ...]], int] = {}
        self._rest: dict[Kind, int] = {}

    @property
    def num_blocks(self) -> int:
        """That have ranks."""
        return len(self.scheduled)

    def raised(self, ranks: Ranks, idx: int) -> Ranks:
        """One block's ranks, by one multiple each, as far as its maps are wide."""
        block = tuple(
            min(rank + self.multiple, cap) for rank, cap in zip(ranks[idx], self.caps, strict=True)
        )
        return (*ranks[:idx], block, *ranks[idx + 1 :])

    def workload(self, ranks: Ranks) -> Workload:
        """Raises ``ConfigError`` where no plan fits ``train.activation_budget_gib``."""
        spec, train = self._spec(ranks), self.config.train
        micro_batch = micro_batch_of(self.config, spec)
        return Workload(
            self.config.preset,
            spec,
            micro_batch,
            num_micro_batches(train),
            self.config.optimizer,
            plan_of(micro_batch, train),
            update_of(train),
            train.steps,
        )

    def use(self, ranks: Ranks, kind: Kind) -> float:
        """What a model with these ranks takes; infinite where its activation budget has no plan."""
        if kind not in ("memory", "activations"):
            return self._sum(ranks, kind)
        try:
            activations = use(self.workload(ranks), "activations")
        except ConfigError:
            return math.inf
        return activations + (self._sum(ranks, "state") if kind == "memory" else 0)

    def of_slots(self, slots: Iterable[Slot], kind: Kind) -> float:
        """What these maps add."""
        return self._amount(slots, kind) / self._unit(kind)

    def _sum(self, ranks: Ranks, kind: Kind) -> float:
        if kind not in self._rest:
            scheduled = [self.spec.slots[idx] for idx in self.scheduled]
            added = sum(self._amount(block, kind) for block in scheduled)
            self._rest[kind] = self._whole(kind) - added
        added = sum(self._of_block(idx, block, kind) for idx, block in enumerate(ranks))
        return (self._rest[kind] + added) / self._unit(kind)

    def _of_block(self, idx: int, ranks: tuple[int, ...], kind: Kind) -> int:
        key = kind, idx, ranks
        if key not in self._added:
            self._added[key] = self._amount(self._block(idx, ranks), kind)
        return self._added[key]

    def _amount(self, slots: Iterable[Slot], kind: Kind) -> int:
        """What maps add to ``_whole``."""
        spec = self.spec
        if kind == "flops":
            options, rows = spec.linear_options, self._one.rows
            works = (
                spec.linear.of(slot).work(slot, options, slot.rows(rows), self._one.compute_bytes)
                for slot in slots
            )
            return sum(work.forward_flops for work in works)
        return self._of_tensors(
            [t for slot in slots for t in spec.map_tensors(slot).values()], kind
        )

    def _whole(self, kind: Kind) -> int:
        if kind == "flops":
            return block_flops(self._one, RecomputePlan())["forward"]
        return self._of_tensors(self.spec.tensors.values(), kind)

    def _of_tensors(self, tensors: Collection[TensorSpec], kind: Kind) -> int:
        if kind == "parameters":
            return sum(tensor.num_items for tensor in tensors)
        train, optimizer = self.config.train, self.config.optimizer
        sizes = state_bytes(tensors, optimizer, update_of(train), num_micro_batches(train))
        return sum(sizes.values())

    def _unit(self, kind: Kind) -> int:
        return self._dense if kind == "flops" else 1

    @cached_property
    def _one(self) -> MicroBatch:
        return one_row(self.spec, self.config.data.sequence_length)

    @cached_property
    def _dense(self) -> int:
        return dense_block_flops(self._one)

    def _spec(self, ranks: Ranks) -> ModelSpec:
        slots = list(self.spec.slots)
        for idx, block in enumerate(ranks):
            slots[self.scheduled[idx]] = self._block(idx, block)
        return dataclasses.replace(self.spec, slots=tuple(slots))

    def _block(self, idx: int, ranks: tuple[int, ...]) -> tuple[Slot, ...]:
        key = idx, ranks
        if key not in self._slots:
            block = self.spec.slots[self.scheduled[idx]]
            of_kind = dict(zip(self.positions, ranks, strict=True))
            self._slots[key] = tuple(
                dataclasses.replace(slot, rank=of_kind.get(slot.kind, 0)) for slot in block
            )
        return self._slots[key]
