"""Optimizers that orthogonalise the steps of both factors of a map; AdamW for what is no pair.

What their declarations share. No torch here: ``module`` computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crnet.optimizers import OptimizerMethod
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class PairedOptions:
    """Options that all methods have."""

    momentum: float = 0.95
    """Decay of the momentum."""
    adam_lr_factor: float = 1.0
    """Rate of what AdamW trains over the base rate: a step here has a singular value of the rate,
    and AdamW's has items of it."""


class PairedMethod(OptimizerMethod):
    """A method states its options and its further state, and builds its own optimizer."""

    steps_pairs = True
    tried_lr = 0.4

    def problems(self, options: Any) -> list[str]:
        flag, found = f"--optimizer.{self.name}", []
        if not 0 <= options.momentum < 1:
            found.append(f"{flag}.momentum is {options.momentum}; it must lie in [0, 1)")
        if not options.adam_lr_factor > 0:
            found.append(
                f"{flag}.adam-lr-factor is {options.adam_lr_factor}; it must be above zero"
            )
        return found

    def state_bytes(self, spec: TensorSpec, options: Any, item_bytes: int) -> int:
        if spec.partner is None:
            return 2 * spec.num_items * item_bytes + 4  # AdamW's two moments and step counter
        return spec.num_items * item_bytes  # the momentum

    def whole(self, spec: TensorSpec, options: Any) -> bool:
        return spec.partner is not None
