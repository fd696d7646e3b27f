"""ReLoRA's cosine with restarts: at each the rate falls to zero and rises to the cosine anew.

The released code counts updates from 0: its update t + 1 runs at the rate of ``s = t`` updates
done, and its first one at rate zero. Our step t runs at the rate of ``s = t``; the useless first
update is left out. A merge or a reset that is due after step C then follows a step of rate zero, as
in the released code, where it is due after update C + 1. The last step would be the beginning of
another cycle; it keeps the rate of the cosine.

Source: Lialin et al. 2023 (arXiv:2307.05695) and the released code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from crnet.schedules import Schedule, Steps, whole


@dataclass(frozen=True, kw_only=True)
class JaggedCosineOptions:
    """Cosine with restarts."""

    restart_every: int | None = None
    """Steps between restarts, which divide the run; none: a quarter of it."""
    rewarmup_steps: int | None = None
    """Steps of the rise after a restart; none: a fiftieth of restart-every."""


class JaggedCosine(Schedule):
    name = "jagged-cosine"
    summary = "the cosine, with a fall to zero and a short warm-up at each restart (ReLoRA)"
    Options = JaggedCosineOptions
    examples = (JaggedCosineOptions(restart_every=100, rewarmup_steps=10),)

    def problems(self, options, steps):
        flag = "--optimizer.jagged-cosine"
        every, rise = _cycle(options, steps)
        if every < 2:
            return [f"{flag}.restart-every {every}: the rate of a restart is zero; take 2 or more"]
        if rise < 1:
            return [f"{flag}.rewarmup-steps {rise}: it counts steps; take 1 or more"]
        found = []
        if options.restart_every is not None and steps.total % options.restart_every:
            found.append(
                f"{flag}.restart-every {options.restart_every} does not divide --train.steps "
                f"{steps.total}; take {_nearest_divisor(steps.total, every)}"
            )
        if rise >= every:
            found.append(
                f"{flag}.rewarmup-steps {rise} is no less than the {every} steps between "
                "restarts; take fewer"
            )
        if steps.warmup > every:
            found.append(
                f"{flag}.restart-every {every} lies within the {steps.warmup} steps of the "
                "warm-up; take more, or a smaller --optimizer.warmup-frac"
            )
        return found

    def factor(self, step, options, steps):
        if step <= steps.warmup:
            return step / steps.warmup
        every, rise = _cycle(options, steps)
        cycle, done = divmod(step, every)
        if cycle == 0 or done >= rise or step == steps.total:
            return _cosine(step, steps)
        return done / rise * _cosine(cycle * every + rise, steps)


def _cycle(options: JaggedCosineOptions, steps: Steps) -> tuple[int, int]:
    """Steps between restarts, and steps of the rise after one; whole, whatever the shares."""
    every, rise = options.restart_every, options.rewarmup_steps
    if every is None:
        every = max(2, whole(steps.total / 4))  # at 1 every step would begin a cycle, at rate zero
    return every, max(1, whole(every / 50)) if rise is None else rise


def _cosine(step: float, steps: Steps) -> float:
    floor, done = steps.min_lr_frac, (step - steps.warmup) / (steps.total - steps.warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def _nearest_divisor(total: int, wanted: float) -> int:
    divisors = [number for number in range(1, total + 1) if total % number == 0]
    return min(divisors, key=lambda number: abs(number - wanted))


METHODS = [JaggedCosine()]
