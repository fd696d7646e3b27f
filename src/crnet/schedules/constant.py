"""Linear warm-up, then the peak rate to the end: a finished run goes on into more steps.

Source: Haegele et al. 2024 (arXiv:2405.18392), who end it by a decay: ``wsd`` here.
"""

from __future__ import annotations

from crnet.schedules import Schedule


class Constant(Schedule):
    name = "constant"
    summary = "linear warm-up, then the peak to the end"
    falls = False

    def factor(self, step, options, steps):
        return min(step / steps.warmup, 1.0)


METHODS = [Constant()]
