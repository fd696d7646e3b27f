"""Linear warm-up, then half a cosine (appendix E.2.1 of arXiv:2509.18993; GaLore's protocol)."""

from __future__ import annotations

import math

from crnet.schedules import Schedule


class Cosine(Schedule):
    name = "cosine"
    summary = "linear warm-up, then a cosine down to min-lr-frac at the last step"

    def factor(self, step, options, steps):
        if step <= steps.warmup:
            return step / steps.warmup
        done = (step - steps.warmup) / (steps.total - steps.warmup)
        floor = steps.min_lr_frac
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


METHODS = [Cosine()]
