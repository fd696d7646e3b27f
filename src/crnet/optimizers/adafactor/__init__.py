"""Adafactor: Adam whose second moment of a matrix is an outer product of a column and a row.

Of a matrix (m, n): ``R``, m numbers, and ``C``, n numbers, are averages of the row means and column
means of ``G^2 + eps1``, with the decay ``1 - t^-0.8`` of step t; ``V = R C / mean(R)``. The step is
``U = G / sqrt(V)``, divided by its RMS where that is above ``clip``; its rate is
``min(lr, 1 / sqrt(t)) max(eps2, RMS(W))``. What is no matrix keeps V whole.

Source: Shazeer and Stern 2018 (arXiv:1804.04235), algorithms 4 to 6. Torch's own is this one, but
for ``eps1``: it bounds R, C and V from below, where the paper adds it to each square. ``beta1`` and
``rate fixed`` are what others train language models with (Zhai et al. 2022, arXiv:2106.04560): a
momentum of steps, and the base rate alone.
Cost: six passes over a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from crnet.optimizers import OptimizerMethod
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class AdafactorOptions:
    """Adafactor."""

    rate: Literal["relative", "fixed"] = "relative"
    """relative: a step is a share of its tensor's own RMS; fixed: the base rate, as Adam's."""
    beta1: float = 0.0
    """Decay of a momentum of steps, an item for each of the tensor; 0: none, and no state."""
    decay_power: float = 0.8
    """The second moment of step t decays by 1 - t^-decay_power."""
    clip: float = 1.0
    """Most that the RMS of a step may be."""
    eps1: float = 1e-30
    """Added to squares of the gradient."""
    eps2: float = 1e-3
    """The least RMS that a relative step is a share of."""


class Adafactor(OptimizerMethod):
    name = "adafactor"
    summary = "Adam whose second moments are a column and a row a matrix"
    Options = AdafactorOptions
    tried_lr = 0.1  # of a tensor's RMS
    examples = (AdafactorOptions(rate="fixed", beta1=0.9),)

    def problems(self, options: AdafactorOptions) -> list[str]:
        flag, found = "--optimizer.adafactor", []
        if not 0 <= options.beta1 < 1:
            found.append(f"{flag}.beta1 is {options.beta1}; it must lie in [0, 1)")
        for name in ("decay_power", "clip", "eps1", "eps2"):
            if not getattr(options, name) > 0:
                word = name.replace("_", "-")
                found.append(f"{flag}.{word} is {getattr(options, name)}; it must be above zero")
        if options.rate == "fixed" and options.eps2 != AdafactorOptions.eps2:
            found.append(f"{flag}.eps2 has no effect with {flag}.rate fixed")
        return found

    def state_bytes(self, spec: TensorSpec, options: AdafactorOptions, item_bytes: int) -> int:
        second = sum(spec.shape) if len(spec.shape) == 2 else spec.num_items
        first = spec.num_items if options.beta1 else 0
        return second * max(4, item_bytes) + first * item_bytes

    def whole(self, spec: TensorSpec, options: AdafactorOptions) -> bool:
        return True  # the RMS of the step

    def build(self, parameters, options: AdafactorOptions, settings) -> Any:
        from crnet.optimizers.adafactor.module import Factored

        return Factored(parameters, options, settings)


METHODS = [Adafactor()]
