"""LORO's parameterization: plain low rank with Xavier factors, their rate scaled by r / h.

``y = (x A) B``, both factors Xavier-normal: standard deviation sqrt(2 / (D + R)) and
sqrt(2 / (F + R)). Between two of its Riemannian steps LORO takes Adam's step on each factor at
r / h of the base rate, r the rank and h the hidden size, also for the maps of the feed-forward.

Source: LORO, official code at 4da57b6, as described in its approximate step and initial values.
This is the parameterization alone: the published method is ``--optimizer.name loro-adam`` with it,
which takes the exact step too, and ``--optimizer.schedule loro-cosine``. A run with AdamW takes
approximate steps only.
Unverified: perplexities but that of 130M; published rates are 0.01 (0.005 at 1B), no weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass

from crnet.linears import Parameterization
from crnet.linears._declarations import TABLE_RANKS, above_zero, factors_work, pair
from crnet.specs import Slot, Split, TensorSpec, Work, normal

WRITES = ("o", "down")
"""Positions whose output is as wide as the model; the input of every other one is."""


@dataclass(frozen=True, kw_only=True)
class LOROOptions:
    """LORO."""

    lr_factor: float | None = None
    """Learning rate of the factors over the base rate; none: rank over hidden size, as published
    (0.25 at 60M, 350M and 1B, 0.333 at 130M)."""


class LORO(Parameterization):
    name = "loro"
    summary = "W = A B with Xavier factors and a rate of r / h (LORO)"
    Options = LOROOptions
    examples = (LOROOptions(lr_factor=0.5),)
    pads = True
    published_ranks = TABLE_RANKS

    def problems(self, options: LOROOptions, slots) -> list[str]:
        return [] if options.lr_factor is None else above_zero("loro", lr_factor=options.lr_factor)

    def tensors(self, slot: Slot, options: LOROOptions) -> dict[str, TensorSpec]:
        lr_factor = options.lr_factor
        if lr_factor is None:
            hidden_size = slot.out_size if slot.position in WRITES else slot.in_size
            lr_factor = slot.rank / hidden_size
        init_a, init_b = (
            normal((2 / (size + slot.rank)) ** 0.5) for size in (slot.in_size, slot.out_size)
        )
        return pair(slot, init_a, init_b, lr_factor)

    def work(self, slot: Slot, options: LOROOptions, rows: int, item_bytes: int) -> Work:
        return factors_work(slot, rows, item_bytes)

    def split(self, slot: Slot, options: LOROOptions) -> Split:
        return Split("bottleneck")

    def make(self, slot: Slot, options: LOROOptions):
        from crnet.linears._maps import LowRankMap

        return LowRankMap(self.tensors(slot, options))


METHODS = [LORO()]
