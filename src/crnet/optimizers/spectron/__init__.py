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

from crnet.optimizers._paired import PairedMethod, PairedOptions
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class SpectronOptions(PairedOptions):
    """Spectron."""


class Spectron(PairedMethod):
    name = "spectron"
    summary = "orthogonalised steps of both factors, over the norms of the factors"
    Options = SpectronOptions
    examples = (SpectronOptions(momentum=0.5, adam_lr_factor=0.5),)

    def state_bytes(self, spec: TensorSpec, options: SpectronOptions, item_bytes: int) -> int:
        vector = 0
        if spec.partner is not None:
            vector = spec.shape[1 if spec.role == "factor_in" else 0] * max(4, item_bytes)
        return super().state_bytes(spec, options, item_bytes) + vector

    def build(self, parameters, options: SpectronOptions, settings) -> Any:
        from crnet.optimizers.spectron.module import SpectronAndAdamW

        return SpectronAndAdamW(parameters, options, settings)


METHODS = [Spectron()]
