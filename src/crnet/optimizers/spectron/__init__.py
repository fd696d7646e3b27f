"""Spectron: both factors of a map take orthogonalised steps, shorter where the factors are large.

Of a map ``A B``, M the momentum of a factor's gradient: ``O`` is M with singular values brought
near 1 by five Newton-Schulz iterations, and

    A <- A - lr O_A / (|A| + |B| + 1),     B <- B - lr O_B / (|A| + |B| + 1)

|.| is the largest singular value, so that the step of ``A B`` has none much above ``lr``. It is
followed by one power iteration a step, from the vector of the step before. AdamW for what is no
pair. The step hangs on how a product is divided between its factors.

Source: "Stabilizing Native Low-Rank LLM Pretraining" 2026 (arXiv:2602.12429); iterations and
coefficients are Jordan's (2024).
Unverified: the decay of the momentum.
Refused: models without pairs.
Cost: 4 R^2 (m + n) + 68 R^3 FLOPs a pair (m, R), (R, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crnet.optimizers import OptimizerMethod
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class SpectronOptions:
    """Spectron."""

    momentum: float = 0.95
    """Decay of the momentum."""
    adam_lr_factor: float = 1.0
    """Rate of what AdamW trains over the base rate: a step here has a singular value of the rate,
    and AdamW's has items of it."""


class Spectron(OptimizerMethod):
    name = "spectron"
    summary = "orthogonalised steps of both factors, over the norms of the factors"
    Options = SpectronOptions
    examples = (SpectronOptions(momentum=0.5, adam_lr_factor=0.5),)
    steps_pairs = True
    tried_lr = 0.4

    def problems(self, options: SpectronOptions) -> list[str]:
        flag, found = "--optimizer.spectron", []
        if not 0 <= options.momentum < 1:
            found.append(f"{flag}.momentum is {options.momentum}; it must lie in [0, 1)")
        if not options.adam_lr_factor > 0:
            found.append(
                f"{flag}.adam-lr-factor is {options.adam_lr_factor}; it must be above zero"
            )
        return found

    def state_bytes(self, spec: TensorSpec, options: SpectronOptions, item_bytes: int) -> int:
        if spec.partner is None:
            return 2 * spec.num_items * item_bytes + 4  # AdamW's two moments and step counter
        rank = spec.shape[1 if spec.role == "factor_in" else 0]
        return spec.num_items * item_bytes + rank * max(4, item_bytes)

    def whole(self, spec: TensorSpec, options: SpectronOptions) -> bool:
        return spec.partner is not None

    def build(self, parameters, options: SpectronOptions, settings) -> Any:
        from crnet.optimizers.spectron.module import SpectronAndAdamW

        return SpectronAndAdamW(parameters, options, settings)


METHODS = [Spectron()]
