"""CoLA: every map is a bottleneck with an activation, ``y = B silu(A x)``.

Source: CoLA, official code at 91ff0d1. The published CoLA-M keeps the bottlenecks and computes the
rest anew; here that is ``--train.recompute replay``, which every method has.
Deviation: what is kept is the bottleneck before SiLU, not after it; its slope follows from it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from crnet.linears import Parameterization
from crnet.linears._declarations import TABLE_RANKS, above_zero, factors_work, pair
from crnet.specs import Passes, Shape, Slot, Split, TensorSpec, Traffic, Work, normal

SMALLEST_WITHOUT_ACTIVATION = 1024
"""Hidden size from which the published runs drop the feed-forward's own activation (350M)."""


@dataclass(frozen=True, kw_only=True)
class CoLAOptions:
    """CoLA."""

    activation: Literal["auto", "both", "bottleneck"] = "auto"
    """bottleneck: SiLU there alone, the feed-forward's own removed; both: one more in the
    feed-forward. auto: both below hidden size 1024 (60M, 130M), as the published runs have it."""
    lr_factor: float = 1.0
    """Learning rate of the factors over the base rate."""


class CoLA(Parameterization):
    name = "cola"
    summary = "a bottleneck with SiLU in every map"
    Options = CoLAOptions
    examples = (CoLAOptions(activation="bottleneck"),)
    pads = True
    published_ranks = TABLE_RANKS

    def problems(self, options: CoLAOptions, slots) -> list[str]:
        return above_zero(self.name, lr_factor=options.lr_factor)

    def keeps_activation(self, shape: Shape, options: CoLAOptions) -> bool:
        if options.activation == "auto":
            return shape.hidden_size < SMALLEST_WITHOUT_ACTIVATION
        return options.activation == "both"

    def tensors(self, slot: Slot, options: CoLAOptions) -> dict[str, TensorSpec]:
        """Standard deviation R^(-1/4) (D + F)^(-1/4) each: an item of A B has (D + F)^(-1/2)."""
        init = normal((slot.rank * (slot.in_size + slot.out_size)) ** -0.25)
        return pair(slot, init, init, options.lr_factor)

    def work(self, slot: Slot, options: CoLAOptions, rows: int, item_bytes: int) -> Work:
        activated = rows * slot.rank * item_bytes
        silu = Traffic(5 * activated, 2)
        return dataclasses.replace(
            factors_work(slot, rows, item_bytes),
            transient_bytes=activated,
            passes=Passes(Traffic(2 * activated, 1), Traffic(2 * activated, 1)),
            # SiLU once more, and its slope.
            backward_passes=Passes(silu, silu, Traffic(3 * activated, 1)),
        )

    def split(self, slot: Slot, options: CoLAOptions) -> Split:
        return Split("bottleneck")  # before SiLU: a sum of what SiLU gives would be another map

    def make(self, slot: Slot, options: CoLAOptions):
        from crnet.linears.cola.module import CoLAMap

        return CoLAMap(self.tensors(slot, options))


METHODS = [CoLA()]
