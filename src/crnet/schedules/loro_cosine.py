"""LORO's cosine: it begins late, and each exact step is followed by a short warm-up.

With u updates done, T steps and a warm-up of w: the cosine is read at ``u - lag``, so that the peak
comes ``lag`` steps after the warm-up. The warm-up rises from the floor to where the half wave that
ends at 0 stands at its end. After each multiple of ``restart-every`` updates the rate rises within
``rewarmup-steps`` from 1e-6 to what it was at the restart; not where the late cosine begins.

Source: LORO, official code at 4da57b6; its 60M run has T 10000, w 1000, restarts every 500, a lag
of 1000. ``--optimizer.loro-adam.exact-every`` is ``restart-every``, or a multiple of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from crnet.schedules import Schedule, Steps, whole

LEAST = 1e-6
"""The rate, over the peak, of the first update after a restart."""


@dataclass(frozen=True, kw_only=True)
class LoroCosineOptions:
    """LORO's cosine."""

    restart_every: int = 500
    """Steps between restarts: those between two exact steps."""
    rewarmup_steps: int = 5
    """Steps of the rise after a restart."""
    lag_steps: int | None = None
    """Steps that the cosine comes late, a multiple of restart-every; none: the one nearest to a
    tenth of the run, as published."""

    def lag(self, steps: Steps) -> int:
        """Whole steps that the cosine comes late."""
        if self.lag_steps is not None:
            return self.lag_steps
        return whole(steps.total / 10 / self.restart_every) * self.restart_every


class LoroCosine(Schedule):
    name = "loro-cosine"
    summary = "a cosine that begins late, with a short warm-up after each exact step (LORO)"
    Options = LoroCosineOptions
    examples = (LoroCosineOptions(restart_every=20, rewarmup_steps=3, lag_steps=20),)

    def problems(self, options: LoroCosineOptions, steps: Steps) -> list[str]:
        flag, every = "--optimizer.loro-cosine", options.restart_every
        if every < 2:
            return [f"{flag}.restart-every {every}: the rate of a restart is 0; take 2 or more"]
        found = []
        if not 1 <= options.rewarmup_steps < every:
            found.append(
                f"{flag}.rewarmup-steps {options.rewarmup_steps}: take 1 or more, and fewer than "
                f"the {every} steps between restarts"
            )
        lag = options.lag(steps)
        if lag < 0 or lag % every:
            found.append(f"{flag}.lag-steps {lag} is no multiple of restart-every {every}")
        elif lag + steps.warmup >= steps.total:
            found.append(
                f"{flag}.lag-steps {lag}: with the warm-up of {steps.warmup} the peak lies behind "
                f"the {steps.total} steps of the run; take fewer"
            )
        return found

    def restarts_every(self, options: LoroCosineOptions) -> int:
        return options.restart_every

    def factor(self, step: int, options: LoroCosineOptions, steps: Steps) -> float:
        done, every, lag = step - 1, options.restart_every, options.lag(steps)
        is_warm = done >= steps.warmup

        def at(update: int) -> float:
            return _cosine(update - lag, steps) if is_warm else _rise(update, lag, steps)

        start, since = done - done % every, done % every
        restarts = start > 0 and not (is_warm and start == lag)
        if restarts and since < options.rewarmup_steps:
            return max(LEAST, since / options.rewarmup_steps * at(start))
        return at(done)


def _half_wave(update: int, steps: Steps) -> float:
    return 0.5 * (1 + math.cos(math.pi * (update - steps.warmup) / (steps.total - steps.warmup)))


def _cosine(update: int, steps: Steps) -> float:
    return steps.min_lr_frac + (1 - steps.min_lr_frac) * _half_wave(update, steps)


def _rise(update: int, lag: int, steps: Steps) -> float:
    floor = steps.min_lr_frac
    return floor + update / steps.warmup * (_half_wave(steps.warmup - lag, steps) - floor)


METHODS = [LoroCosine()]
