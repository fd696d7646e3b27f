"""The seam of the learning-rate schedules: pure functions of the step. One file is one family."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from crnet.registry import discover, find


@dataclass(frozen=True)
class Steps:
    """What every schedule is told of the run."""

    total: int
    """Optimizer steps."""
    warmup_frac: float
    """Share of them over which the rate rises linearly, to the nearest whole step."""
    min_lr_frac: float
    """Share of the peak rate at which it ends."""

    @property
    def warmup(self) -> int:
        """The step, counted from 1, at which the rate has risen to the peak: some step has the peak
        rate whatever the share, and the first where there is no warm-up."""
        return max(1, whole(self.warmup_frac * self.total))


def whole(steps: float) -> int:
    """The nearest whole number of steps; of two as near, the larger."""
    return math.floor(steps + 0.5)


class Schedule:
    """What a schedule answers; a method states only what differs."""

    name: str
    summary: str
    Options: type | None = None
    """A frozen dataclass; its fields become ``--optimizer.NAME.OPTION``."""
    examples: tuple[Any, ...] = ()
    """More ``Options`` that the contract is checked with (``measure.contract``)."""

    falls: bool = True
    """Whether the last step has ``min_lr_frac``; else that key has no effect, and is refused."""

    def problems(self, options: Any, steps: Steps) -> list[str]:
        """What is wrong with the options, one sentence each, with the mend."""
        return []

    def factor(self, step: int, options: Any, steps: Steps) -> float:
        """The rate of optimizer step ``step``, counted from 1, over the peak rate."""
        raise NotImplementedError

    def restarts_every(self, options: Any) -> int | None:
        """Steps from one restart of the rate to the next, for an optimizer whose moments restart
        too (``OptimizerMethod.restarts_every``). None: there are none."""
        return None

    def last_stable(self, options: Any, steps: Steps) -> int | None:
        """The last step, counted from 1, before a fall that the number of steps alone decides: up
        to it a run of more steps, with a warm-up of as many, is the same run. Its checkpoint is
        kept, and a finished run goes on from there into more steps. None: there is none such."""
        return None


def names() -> list[str]:
    """Every schedule, sorted."""
    return sorted(discover(__name__, Schedule))


def get(name: str) -> Schedule:
    """The schedule of that name. Raises ``ValueError`` if there is none."""
    return find(__name__, name, Schedule)
