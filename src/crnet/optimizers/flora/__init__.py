"""Flora: Adafactor whose momentum is kept in a random projection.

Adafactor's direction q of a gradient G has second moments of rows and columns alone,
``q = G / sqrt(row col / mean(row))``, with the decay ``1 - t^-0.8``. Of a dense matrix the momentum
is kept as ``C = q P^T`` (m >= n, else ``P q``) with a Gaussian P of variance 1 / rank, so that what
comes back, ``C P``, is right in the mean: ``d = (1 - beta1) q + beta1 C P``. Every
``refresh_every`` steps C moves into another P. A direction of more than unit root mean square is
shrunk to it, and with ``scale_parameter`` the rate is relative to the root mean square of the
weight (at least 1e-3).

Others have Adafactor too, with a momentum of their own shape; so have matrices with a side below
the rank, or one more than 4 times the other. beta2 and eps are not read.

Source: Hao et al. 2024 (arXiv:2402.03293) and the released code; rate 1e-3, beta1 0.9, rank 256 and
1,000 steps between projections for T5-small; nothing is published for LLaMA on C4.
Deviation: which tensors are compressed is decided by role first, where the released code looks at
sizes alone; a projection is seeded by (run's seed, parameter's name, refresh); weight decay is
AdamW's, by the rate that is not relative. Not offered: gradients that are accumulated compressed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from crnet.optimizers import OptimizerMethod
from crnet.specs import TensorSpec

MOST_ASPECT = 4
"""The longer side over the shorter, of what is compressed."""


@dataclass(frozen=True, kw_only=True)
class FloraOptions:
    """Flora."""

    rank: int = 128
    """Rank of the compressed momentum."""
    refresh_every: int = 1000
    """Steps between two projections."""
    scale_parameter: bool = True
    """The rate of a tensor is multiplied with its root mean square."""
    projection: Literal["drawn", "kept"] = "drawn"
    """drawn: anew at every step, which costs no memory; kept: until the next one, which costs no
    time. The numbers are the same."""

    def compresses(self, spec: TensorSpec) -> bool:
        """Whether a tensor's momentum is projected."""
        low, high = min(spec.shape, default=0), max(spec.shape, default=0)
        return spec.role == "matrix" and self.rank <= low and high <= MOST_ASPECT * low


class Flora(OptimizerMethod):
    name = "flora"
    summary = "Adafactor whose momentum is kept in a random projection"
    Options = FloraOptions
    examples = (
        FloraOptions(rank=4, refresh_every=3, scale_parameter=False),
        FloraOptions(rank=3, refresh_every=2, projection="kept"),
    )
    tried_lr = 0.1  # relative to weights of 0.02

    def problems(self, options: FloraOptions) -> list[str]:
        return [
            f"--optimizer.{self.name}.{name.replace('_', '-')} is {getattr(options, name)}; "
            "take 1 or more"
            for name in ("rank", "refresh_every")
            if getattr(options, name) < 1
        ]

    def state_bytes(self, spec: TensorSpec, options: FloraOptions, item_bytes: int) -> int:
        second = sum(spec.shape) if len(spec.shape) == 2 else spec.num_items
        first = spec.num_items
        if options.compresses(spec):
            first = options.rank * max(spec.shape)
            first += options.rank * min(spec.shape) if options.projection == "kept" else 0
        return first * item_bytes + second * max(4, item_bytes)

    def build(self, parameters, options: FloraOptions, settings) -> Any:
        from crnet.optimizers.flora.module import CompressedAdafactor

        return CompressedAdafactor(parameters, options, settings)


METHODS = [Flora()]
