"""Warm-up, a stable stretch at the peak, a decay over the last steps.

The checkpoint before the decay is kept. A finished run goes on from it into more steps,
``crnet train --resume --train.steps MORE``, to the bit as a run that had them from the start: the
warm-up must have as many steps, so divide ``--optimizer.warmup-frac`` by as much as steps grow.

Source: Hu et al. 2024 (arXiv:2404.06395); the square root is that of Haegele et al. 2024
(arXiv:2405.18392).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from crnet.schedules import Schedule, Steps, whole


@dataclass(frozen=True, kw_only=True)
class WSDOptions:
    """Warm-up, stable, decay."""

    decay_frac: float = 0.2
    """Share of the steps, the last ones, over which the rate falls to min-lr-frac."""
    shape: Literal["linear", "sqrt"] = "linear"
    """Of the fall, x of it done: 1 - x, or 1 - sqrt(x)."""


class WSD(Schedule):
    name = "wsd"
    summary = "linear warm-up, the peak, then a decay down to min-lr-frac over the last steps"
    Options = WSDOptions
    examples = (WSDOptions(decay_frac=0.5, shape="sqrt"),)

    def problems(self, options, steps):
        if not 0 < options.decay_frac <= 1:
            return [
                f"--optimizer.wsd.decay-frac is {options.decay_frac}; "
                "it is a share and must lie in (0, 1]"
            ]
        if steps.warmup_frac + options.decay_frac > 1 + 1e-12:
            return [
                f"--optimizer.wsd.decay-frac {options.decay_frac} and --optimizer.warmup-frac "
                f"{steps.warmup_frac} are more than the whole run; take "
                f"{1 - steps.warmup_frac:g} or less for the decay"
            ]
        return []

    def factor(self, step, options, steps):
        if step <= steps.warmup:
            return step / steps.warmup
        left = (steps.total - step) / _decay(options, steps)
        if left >= 1:
            return 1.0
        height = left if options.shape == "linear" else 1 - math.sqrt(1 - left)
        return steps.min_lr_frac + (1 - steps.min_lr_frac) * height

    def last_stable(self, options, steps):
        return steps.total - _decay(options, steps) if steps.total > steps.warmup else None


def _decay(options: WSDOptions, steps: Steps) -> int:
    """Steps of the fall."""
    return min(max(1, whole(options.decay_frac * steps.total)), steps.total - steps.warmup)


METHODS = [WSD()]
