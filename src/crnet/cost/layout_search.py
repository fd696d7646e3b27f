"""How a run is spread over devices: the fastest layout that fits, and what crnet plan says of it.

Sizes of ``--parallel.*`` whose product is the number of devices, micro-batches that divide a
process's share of the batch, recomputation, compilation. Which of them go together is asked of
``config.check``, never known here. Closed forms; no tensor and no torch.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from crnet.config import presets
from crnet.config.check import check, parallel_problems, policy_problem
from crnet.config.sections import (
    SIZES,
    STAGES_A_PROCESS,
    ParallelConfig,
    RunConfig,
    num_shares,
    num_stages,
    update_of,
)
from crnet.config.serialize import override
from crnet.cost.clock import Way, clock_of
from crnet.cost.fleet import Fleet
from crnet.cost.layout_memory import Held, Tensors, at_the_peak, held_by
from crnet.cost.layout_seconds import StepSeconds, step_seconds
from crnet.cost.micro_batch import MicroBatch
from crnet.cost.parts import part_of, stored_tensors
from crnet.cost.plan_choice import plan_of
from crnet.cost.stage_clock import Seconds, stage_seconds
from crnet.cost.stages import Stage, cut
from crnet.cost.workload import PLAIN, Workload, micro_batch_of, workload
from crnet.errors import ConfigError
from crnet.recompute.plan import POLICIES, Policy


@dataclass(frozen=True)
class Layout:
    """One way to spread a run."""

    parallel: ParallelConfig
    micro_batch_size: int
    policy: Policy
    compiles: bool

    @property
    def num_kinds(self) -> int:
        """Of sharing."""
        return sum(getattr(self.parallel, key) > 1 for key in SIZES)

    @property
    def simplicity(self) -> tuple[Any, ...]:
        """Less is simpler: fewer kinds of sharing, then less of what waits, then recomputation."""
        sizes = self.parallel
        order = (
            self.num_kinds,
            sizes.pipeline,
            sizes.tensor,
            sizes.shard,
            sizes.schedule != "1f1b",
        )
        return (*order, POLICIES.index(self.policy), self.compiles, -self.micro_batch_size)

    def describe(self) -> str:
        """``data 8 x shard 8``."""
        sizes = self.parallel
        parts = [f"{key} {getattr(sizes, key)}" for key in ("data", "shard", "tensor", "pipeline")]
        named = [part for part in parts if not part.endswith(" 1")]
        ending = " (interleaved)" if sizes.schedule != ParallelConfig.schedule else ""
        return (" x ".join(named) or "alone") + ending


@dataclass(frozen=True)
class Least:
    """What a way to share takes at the least."""

    layout: Layout
    peak_bytes: int

    def describe(self) -> str:
        """``recompute replay, micro-batch 1``."""
        return f"recompute {self.layout.policy}, micro-batch {self.layout.micro_batch_size}"


@dataclass(frozen=True)
class Priced:
    """A layout, the bytes of its fullest process and the seconds of its step."""

    layout: Layout
    peak_bytes: int
    seconds: StepSeconds


class LayoutSpace:
    """What a run can be on a fleet, and what each layout takes.

    What several layouts share is worked out once.
    """

    def __init__(self, config: RunConfig, fleet: Fleet):
        """Raise ``ConfigError``: the run itself is wrong, or says what is to be found."""
        _refuse_fixed(config)
        plain = {**PLAIN, "micro_batch_size": None, "compile": False}
        self.given = config
        self.base = override(config, train=plain)
        check(self.base)
        self.fleet = fleet
        self.work = workload(override(self.base, train={"device": "cuda"}))
        """Of the whole batch in one micro-batch, on one GPU."""
        self._known: dict[Any, Any] = {}

    def config_of(self, layout: Layout) -> RunConfig:
        """The run with this layout."""
        train: dict[str, Any] = {
            "micro_batch_size": layout.micro_batch_size,
            "recompute": layout.policy,
            "compile": layout.compiles,
        }
        if layout.policy == self.given.train.recompute:
            kept = ("recompute_layers", "recompute_attention")
            train |= {key: getattr(self.given.train, key) for key in kept}
        changed = override(self.base, train=train)
        return dataclasses.replace(changed, parallel=layout.parallel)

    @cached_property
    def policies(self) -> tuple[Policy, ...]:
        """That the model can be run under; the one that was asked for.

        ``invert`` is one of them where its outputs travel in fp32, as in ``plan_choice.cheapest``:
        else what it keeps hangs on the gains of every step.
        """
        legal: list[Policy] = [
            each for each in POLICIES if policy_problem(self.work.spec, each) is None
        ]
        asked = self.given.train.recompute
        if asked != presets.get(self.given.preset).train.recompute:
            return tuple(each for each in legal if each == asked)
        is_wide = set(self.work.micro_batch.blocks[-1].items.values()) == {4}
        return tuple(each for each in legal if each != "invert" or is_wide)

    @cached_property
    def sizes(self) -> list[ParallelConfig]:
        """Every legal way to share, whatever the recomputation."""
        legal = (each for each in self._products() if self._goes(each, "none", False))
        return [each for each in legal if self.micro_batches(each)]

    def _products(self) -> Iterator[ParallelConfig]:
        """Sizes that multiply to the number of devices and share the batch evenly."""
        number, batch = self.fleet.size, self.base.train.batch_size
        kept = self.base.parallel.checkpoint
        for tensor in _divisors(min(self.fleet.node, number)):
            for pipeline in _divisors(number // tensor) if number % tensor == 0 else []:
                shares = number // tensor // pipeline
                if batch % shares:
                    continue
                for shard in _divisors(shares):
                    sizes = ParallelConfig(
                        pipeline=pipeline, data=shares // shard, shard=shard, tensor=tensor
                    )
                    for schedule in STAGES_A_PROCESS if pipeline > 1 else ("1f1b",):
                        yield dataclasses.replace(sizes, schedule=schedule, checkpoint=kept)

    def _goes(self, parallel: ParallelConfig, policy: Policy, compiles: bool) -> bool:
        """Whether these kinds of sharing, of recomputation and of compilation go together: asked of
        the smallest sizes of each kind, but for ``tensor``, which hangs on the model's own."""
        two = {key: min(getattr(parallel, key), 2) for key in ("pipeline", "data", "shard")}
        small = dataclasses.replace(parallel, **two)
        if num_stages(parallel) > self.work.spec.num_layers:
            return False
        key = (small, policy, compiles)
        if key not in self._known:
            batch = {"batch_size": 8 * num_shares(small)}
            config = override(self.config_of(Layout(small, 1, policy, compiles)), train=batch)
            self._known[key] = not list(parallel_problems(config))
        return self._known[key]

    def ways(self, parallel: ParallelConfig) -> Iterator[tuple[Policy, bool]]:
        """Recomputation and compilation that go with it."""
        for policy, compiles in itertools.product(self.policies, self._compiles):
            prices_it = not compiles or policy in ("none", "block")
            if prices_it and self._goes(parallel, policy, compiles):
                yield policy, compiles

    def policies_of(self, parallel: ParallelConfig) -> list[Policy]:
        """Recomputation that goes with it."""
        return list(dict.fromkeys(policy for policy, _ in self.ways(parallel)))

    @property
    def _compiles(self) -> tuple[bool, ...]:
        return (True,) if self.given.train.compile else (False, True)

    def micro_batches(self, parallel: ParallelConfig) -> list[int]:
        """Sizes of a micro-batch, ascending: divisors of a process's share, enough of them for a
        pipeline; the one that was asked for."""
        share = self.base.train.batch_size // num_shares(parallel)
        number, found = parallel.pipeline, _divisors(share)
        asked = self.given.train.micro_batch_size
        if asked != presets.get(self.given.preset).train.micro_batch_size:
            found = [size for size in found if size == asked]
        if parallel.schedule != "1f1b":
            return [size for size in found if share // size % number == 0]
        return [size for size in found if share // size >= number]

    def largest(self, parallel: ParallelConfig, policy: Policy) -> int | None:
        """The largest micro-batch that fits; None: not one sequence."""
        sizes = self.micro_batches(parallel)
        # All at once a split stage has no whole gradients (``layout_memory.gathered_at_once``).
        if self.fits(Layout(parallel, sizes[-1], policy, False)):
            return sizes[-1]
        low, high = 0, len(sizes) - 1  # how many of them fit, at least and at most
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.fits(Layout(parallel, sizes[middle - 1], policy, False))
            low, high = (middle, high) if fits else (low, middle - 1)
        return sizes[low - 1] if low else None

    def least(self, parallel: ParallelConfig) -> Least:
        """The least that the fullest process takes: of one sequence, or of the whole share, which
        a split stage adds up without whole gradients."""
        ends = [
            Layout(parallel, size, policy, False)
            for policy in self.policies_of(parallel)
            for size in self._ends(parallel)
        ]
        found = [Least(each, self.peak(each)) for each in ends]
        return min(found, key=lambda each: each.peak_bytes)

    def fits_somehow(self) -> bool:
        """Whether any layout fits."""
        return any(
            self.fits(Layout(parallel, size, policy, False))
            for parallel in self.sizes
            for policy in self.policies_of(parallel)
            for size in self._ends(parallel)
        )

    def _ends(self, parallel: ParallelConfig) -> tuple[int, ...]:
        sizes = self.micro_batches(parallel)
        return tuple(dict.fromkeys((sizes[0], sizes[-1])))

    def on(self, fleet: Fleet) -> LayoutSpace:
        """The same run on more or fewer devices of the kind."""
        other = copy.copy(self)
        other.__dict__.pop("sizes", None)
        other.fleet = fleet
        return other

    def fits(self, layout: Layout) -> bool:
        """Whether a device has memory for it."""
        most = self.fleet.memory_bytes
        without = max(held.total for held in self._held(layout))
        return without <= most and self.peak(layout) <= most

    def peak(self, layout: Layout) -> int:
        """Bytes of the fullest process."""
        moments = self._at_the_peak(layout)
        every = zip(self._held(layout), moments, strict=True)
        return max(held.total + moment for held, moment in every)

    def _at_the_peak(self, layout: Layout) -> list[int]:
        sizes = layout.parallel
        number = self.of(layout).num_micro_batches if sizes.pipeline > 1 else 0
        key = (sizes.pipeline, sizes.schedule, number, sizes.tensor)
        key = ("peak", *key, layout.policy, layout.micro_batch_size)
        if key not in self._known:
            self._known[key] = at_the_peak(self.of(layout), sizes, self._stages(sizes))
        return self._known[key]

    def _held(self, layout: Layout) -> list[Held]:
        work, sizes = self.of(layout), layout.parallel
        replays = sizes.shard > 1 and layout.policy == "replay" and work.plan
        key = ("held", dataclasses.replace(sizes, data=1), work.num_micro_batches > 1, replays)
        if key not in self._known:
            self._known[key] = held_by(
                work, sizes, self._stages(sizes), self._tensors(sizes.tensor)
            )
        return self._known[key]

    def _stages(self, parallel: ParallelConfig) -> tuple[Stage, ...]:
        """Of a pipeline; else all blocks as one."""
        key = ("stages", num_stages(parallel))
        if key not in self._known:
            self._known[key] = cut(self.work.spec, key[1], self.work.micro_batch.length)
        return self._known[key]

    def _tensors(self, num_parts: int) -> Tensors:
        """As a process stores them."""
        key = ("tensors", num_parts)
        if key not in self._known:
            spec = self.work.spec
            parts = spec if num_parts == 1 else spec.in_parts(0, num_parts)
            self._known[key] = stored_tensors(parts)
        return self._known[key]

    def of(self, layout: Layout) -> Workload:
        """What one share of the batch asks of the processes that share it."""
        share = self.base.train.batch_size // num_shares(layout.parallel)
        micro_batch, plan = self._micro_batch(layout)
        return dataclasses.replace(
            self.work,
            micro_batch=micro_batch,
            num_micro_batches=share // layout.micro_batch_size,
            plan=plan,
            update=update_of(self.base.train),
        )

    def _micro_batch(self, layout: Layout) -> tuple[MicroBatch, Any]:
        size, parts = layout.micro_batch_size, layout.parallel.tensor
        key = ("micro-batch", size, parts)
        if key not in self._known:
            train = {"micro_batch_size": size, "device": "cuda"}
            one = micro_batch_of(override(self.base, train=train), self.work.spec)
            self._known[key] = part_of(one, parts)
        micro_batch = self._known[key]
        key = ("plan", size, layout.policy)
        if key not in self._known:
            whole = micro_batch
            if parts > 1:
                alone = dataclasses.replace(layout, parallel=ParallelConfig())
                whole = self._micro_batch(alone)[0]
            self._known[key] = plan_of(whole, self.config_of(layout).train)
        return micro_batch, self._known[key]

    def price(self, layout: Layout, is_simulated: bool = False) -> Priced:
        """What a layout takes; ``is_simulated``: as of ``layout_seconds.step_seconds``."""
        work, held = self.of(layout), self._held(layout)
        sizes, computed = layout.parallel, self._computed(layout)
        stages, tensors = self._stages(sizes), self._tensors(sizes.tensor)
        seconds = step_seconds(
            work, sizes, self.fleet, stages, computed, held, tensors, is_simulated
        )
        return Priced(layout, self.peak(layout), seconds)

    def _computed(self, layout: Layout) -> list[Seconds]:
        sizes = layout.parallel
        key = ("s", sizes.pipeline, sizes.schedule, sizes.tensor, *dataclasses.astuple(layout)[1:])
        if key not in self._known:
            work = self.of(layout)
            clock = clock_of(work.micro_batch, self.fleet.device)
            way: Way = "compiled" if layout.compiles else "eager"
            stages, tensors = self._stages(sizes), self._tensors(sizes.tensor)
            self._known[key] = stage_seconds(clock, work.plan, stages, tensors, way)
        return self._known[key]

    def fitting(self) -> Iterator[Priced]:
        """Every layout worth a look: without a pipeline, larger micro-batches are never slower."""
        for parallel in self.sizes:
            for policy, compiles in self.ways(parallel):
                largest = self.largest(parallel, policy)
                sizes = [each for each in self.micro_batches(parallel) if each <= (largest or 0)]
                for size in sizes if parallel.pipeline > 1 else sizes[-1:]:
                    yield self.price(Layout(parallel, size, policy, compiles))


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _refuse_fixed(config: RunConfig) -> None:
    """What is to be found cannot be given."""
    problems = [
        f"--parallel.{key} {getattr(config.parallel, key)}: crnet plan --devices finds it; "
        "leave it out"
        for key in ("pipeline", "data", "shard", "tensor", "schedule")
        if getattr(config.parallel, key) != getattr(ParallelConfig, key)
    ]
    if config.train.keep_as != "computed":
        problems.append(
            f"--train.keep-as {config.train.keep_as}: crnet plan --devices weighs activations as "
            "they are; leave it out"
        )
    if config.train.recompute == "auto":
        problems.append("--train.recompute auto: crnet plan --devices finds it; leave it out")
    if problems:
        raise ConfigError(problems)
