"""Linear warm-up, then a straight line down to min-lr-frac, which the last step has.

Source: Devlin et al. 2019 (arXiv:1810.04805), to a floor of 0; Bergsma et al. 2025
(arXiv:2502.15938) for language models.
"""

from __future__ import annotations

from crnet.schedules import Schedule


class Linear(Schedule):
    name = "linear"
    summary = "linear warm-up, then a straight line down to min-lr-frac at the last step"

    def factor(self, step, options, steps):
        if step <= steps.warmup:
            return step / steps.warmup
        left = (steps.total - step) / (steps.total - steps.warmup)
        return steps.min_lr_frac + (1 - steps.min_lr_frac) * left


METHODS = [Linear()]
