"""GaLore's step with moments of 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from crnet.optimizers import Settings
from crnet.optimizers._eight_bits.module import EightBits
from crnet.optimizers._subspace.module import SubspaceAdam
from crnet.specs import TensorSpec


class Galore8bitAdam(SubspaceAdam):
    """State of a tensor, where it has ``options.min_items``: ``step``; ``exp_avg``, ``exp_avg_sq``
    and their maxima (``EightBits``); ``projection`` of a dense matrix. Of others: as of
    ``SubspaceAdam``.

    Raises:
        ConfigError: bitsandbytes is missing.
    """

    corrects_inside = True

    def __init__(
        self,
        parameters: Mapping[str, tuple[TensorSpec, Tensor]],
        options: Any,
        settings: Settings,
        name: str,
    ):
        self.eight_bits = EightBits(name)
        super().__init__(parameters, options, settings)
        self._narrow = {
            parameter for spec, parameter in parameters.values() if options.moments_of(spec)
        }

    def _adam(self, parameter, target, gradient, state, rate, lost) -> None:
        if parameter not in self._narrow:
            super()._adam(parameter, target, gradient, state, rate, lost)
            return
        self.eight_bits.adam_(
            target,
            gradient,
            state,
            rate=rate,
            decay=lost / rate if rate else 0.0,
            betas=(self.settings.beta1, self.settings.beta2),
            eps=self.settings.eps,
            step=state["step"],
        )
