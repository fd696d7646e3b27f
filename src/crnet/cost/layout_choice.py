"""The layout that a run gets on a fleet, why, and the command that starts it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from crnet.config import defaults
from crnet.config.check import check
from crnet.config.sections import SIZES, ParallelConfig, RunConfig
from crnet.config.serialize import override
from crnet.config.units import GIB
from crnet.cost.fleet import Fleet
from crnet.cost.layout_search import Layout, LayoutSpace, Least, Priced
from crnet.cost.step import step_flops
from crnet.cost.workload import with_linear
from crnet.errors import ConfigError
from crnet.recompute.plan import Policy, RecomputePlan

CLOSE_FRAC = 0.01
"""Of layouts whose steps differ by less from the fastest, the simplest is taken."""
SHOWN = 5
"""Layouts, the best of each."""
MOST_TIMES = 16
"""As many more devices are tried where nothing fits."""


@dataclass(frozen=True)
class Choice:
    """The layout, those it was taken from, and the largest micro-batches."""

    space: LayoutSpace
    layouts: list[Priced]
    """The best of each way to share, the choice first, then by their seconds."""
    num_fitting: int
    largest_micro_batch: dict[Policy, int]
    """Sequences, in the chosen layout; 0: not one fits."""

    @property
    def best(self) -> Priced:
        return self.layouts[0]

    @property
    def config(self) -> RunConfig:
        """The run in its layout."""
        return self.space.config_of(self.best.layout)

    def tokens_per_s(self, priced: Priced) -> float:
        """Of the job, overlapped."""
        config = self.space.base
        tokens = config.train.batch_size * config.data.sequence_length
        return tokens / priced.seconds.overlapped

    def peak_frac(self, priced: Priced) -> float:
        """FLOPs of the model, causal and nothing repeated, over what the devices' peaks allow."""
        work, fleet = self.space.work, self.space.fleet
        flops = step_flops(work, RecomputePlan())
        useful = flops["total"] - flops["attention"] + flops["attention if causal"]
        peak = fleet.size * fleet.device.flops_per_s(work.micro_batch.precision)
        return useful / peak / priced.seconds.overlapped

    def figures(self) -> dict[str, Any]:
        """What ``explain`` shows, as numbers."""
        fleet = self.space.fleet
        return {
            "devices": fleet.size,
            "device": fleet.device.name,
            "node": fleet.node,
            "memory_bytes": fleet.memory_bytes,
            "layouts": [self._row(each) for each in self.layouts],
            "num_fitting": self.num_fitting,
            "reasons": list(self._reasons()),
            "largest_micro_batch": self.largest_micro_batch,
        }

    def _row(self, priced: Priced) -> dict[str, Any]:
        layout, seconds = priced.layout, priced.seconds
        return {
            "parallel": {key: getattr(layout.parallel, key) for key in (*SIZES, "schedule")},
            "micro_batch_size": layout.micro_batch_size,
            "recompute": layout.policy,
            "compile": layout.compiles,
            "peak_bytes": priced.peak_bytes,
            "step_s": seconds.overlapped,
            "step_not_overlapped_s": seconds.apart,
            "tokens_per_s": self.tokens_per_s(priced),
            "peak_frac": self.peak_frac(priced),
            "bubble_frac": seconds.bubble_frac,
        }

    def explain(self) -> str:
        """The layouts in a table, why the first, and the largest micro-batches."""
        fleet = self.space.fleet
        lines = [
            f"{self.space.base.preset}, {self.space.base.model.linear}, on {fleet.size} "
            f"{fleet.device.name}, {fleet.node} a machine, {fleet.memory_bytes / GIB:.1f} GiB of "
            f"each; {self.space.work.micro_batch.precision}",
            f"{'':28}{'micro-':>7}{'':>10}{'GiB of the':>12}{'s a step':>10}{'not over-':>10}"
            f"{'':>12}{'of the':>8}",
            f"{'layout':28}{'batch':>7}{'recompute':>10}{'fullest':>12}{'overlapped':>11}"
            f"{'lapped':>9}{'tokens/s':>12}{'peak':>8}{'bubble':>8}",
        ]
        lines += map(self._line, self.layouts)
        lines += ["", *self._reasons(), "", self._largest()]
        return "\n".join(lines)

    def _line(self, priced: Priced) -> str:
        layout, seconds = priced.layout, priced.seconds
        policy = f"{layout.policy}{'+c' if layout.compiles else ''}"
        return (
            f"{layout.describe():28}{layout.micro_batch_size:>7}{policy:>10}"
            f"{priced.peak_bytes / GIB:>12.1f}{seconds.overlapped:>11.3f}{seconds.apart:>9.3f}"
            f"{self.tokens_per_s(priced):>12,.0f}{self.peak_frac(priced):>8.1%}"
            f"{seconds.bubble_frac:>8.1%}"
        )

    def _reasons(self) -> Iterator[str]:
        layout, seconds = self.best.layout, self.best.seconds
        yield (
            f"{layout.describe()}: of {self.num_fitting} that fit the simplest within "
            f"{CLOSE_FRAC:.0%} of the fastest step; what is not hidden behind computation costs "
            f"up to {seconds.apart / seconds.overlapped - 1:.1%}"
            + ("; +c: --train.compile" if any(it.layout.compiles for it in self.layouts) else "")
        )
        most = self.space.fleet.memory_bytes
        for parallel in self.space.sizes:
            simpler = Layout(parallel, 1, "none", False)
            if simpler.num_kinds < layout.num_kinds or (
                simpler.num_kinds == layout.num_kinds
                and parallel.shard < layout.parallel.shard
                and parallel.pipeline == parallel.tensor == 1
            ):
                least = self.space.least(parallel)
                if least.peak_bytes > most:
                    yield (
                        f"{simpler.describe()} does not fit: {least.peak_bytes / GIB:.1f} GiB at "
                        f"the least, {least.describe()}"
                    )
        if layout.policy != "none":
            kept = dataclasses.replace(layout, policy="none")
            yield (
                f"without recomputation: {self.space.peak(kept) / GIB:.1f} GiB at this micro-batch"
            )

    def _largest(self) -> str:
        texts = [f"{policy} {size}" for policy, size in self.largest_micro_batch.items()]
        return f"largest micro-batch that fits this layout: {', '.join(texts)}"


def choose(config: RunConfig, fleet: Fleet) -> Choice:
    """The fastest layout that fits, or a simpler one that is as good as that.

    Raises:
        ConfigError: the run is wrong; or nothing fits: what comes closest, and what would help.
    Cost: 2 to 4 s for 80 blocks on 1,024 devices.
    """
    space = LayoutSpace(config, fleet)
    if (choice := chosen(space)) is None:
        raise ConfigError(_nothing_fits(space))
    return choice


def chosen(space: LayoutSpace) -> Choice | None:
    """As ``choose``; None where nothing fits."""
    found = list(space.fitting())
    if not found:
        return None
    of_each = [space.price(each.layout, is_simulated=True) for each in _best_of_each(found)]
    by_time = _best_of_each(of_each)
    best = _simplest_of_the_fastest(by_time)
    check(space.config_of(best.layout))
    parallel = best.layout.parallel
    largest: dict[Policy, int] = {
        each: space.largest(parallel, each) or 0 for each in space.policies_of(parallel)
    }
    others = [each for each in by_time if each is not best]
    return Choice(space, [best, *others][:SHOWN], len(found), largest)


def _simplest_of_the_fastest(found: Sequence[Priced]) -> Priced:
    fastest = min(each.seconds.overlapped for each in found)
    close = [it for it in found if it.seconds.overlapped <= (1 + CLOSE_FRAC) * fastest]
    return min(close, key=lambda it: it.layout.simplicity)


def _best_of_each(found: Sequence[Priced]) -> list[Priced]:
    """Of each way to share, the simplest of its fastest; the fastest way first."""
    ways: dict[ParallelConfig, list[Priced]] = {}
    for each in found:
        ways.setdefault(each.layout.parallel, []).append(each)
    best = [_simplest_of_the_fastest(each) for each in ways.values()]
    return sorted(best, key=lambda it: (it.seconds.overlapped, it.layout.simplicity))


def _nothing_fits(space: LayoutSpace) -> str:
    """What comes closest, and what would fit: each of it is tried."""
    fleet, config = space.fleet, space.given
    who = f"{config.preset} ({config.model.linear}) on {fleet.size} {fleet.device.name}"
    if not space.sizes:
        return (
            f"{who}: no sizes of --parallel.* that multiply to {fleet.size} share "
            f"--train.batch-size {config.train.batch_size}; take another batch or fewer devices"
        )
    least = closest(space)
    helps = ", or ".join(_helps(space)) or f"none of {MOST_TIMES} times the devices does"
    return (
        f"{who}: nothing fits the {fleet.memory_bytes / GIB:.1f} GiB that a process may take; "
        f"closest is {least.layout.describe()}, {least.describe()}, "
        f"with {math.ceil(least.peak_bytes / GIB * 10) / 10:.1f} GiB; what would fit: {helps}"
    )


def closest(space: LayoutSpace) -> Least:
    """What takes the least, where there is a legal layout."""
    return min((space.least(each) for each in space.sizes), key=lambda it: it.peak_bytes)


def _helps(space: LayoutSpace) -> Iterator[str]:
    config, fleet = space.given, space.fleet
    times = 2
    while times <= MOST_TIMES:
        more = dataclasses.replace(fleet, size=times * fleet.size)
        more = dataclasses.replace(more, node=min(max(fleet.node, 8), more.size))
        if space.on(more).fits_somehow():
            yield f"{more.size} devices"
            break
        times *= 2
    smaller = override(config, train={"batch_size": fleet.size, "micro_batch_size": None})
    if config.train.batch_size > fleet.size and LayoutSpace(smaller, fleet).fits_somehow():
        yield f"--train.batch-size {fleet.size}, one sequence a process"
    if config.model.linear != defaults.LINEAR:
        other = with_linear(config, defaults.LINEAR)
        if LayoutSpace(other, fleet).fits_somehow():
            yield f"--model.linear {defaults.LINEAR}"
