"""CoLA: every map is a bottleneck with an activation, ``y = B silu(A x)``.

Also without the feed-forward's own activation, from 350M on (``activation``).

CoLA-M, the published way to keep less, is a policy here: ``--train.recompute replay`` with
``--train.recompute-layers every-1``. Checkpoint, function and gradients are the same. A token and
layer, CoLA-M keeps seven bottlenecks and two tensors of the stream, 2 (7 r + 2 h) bytes in bf16;
replay keeps seven and one, 2 (7 r + h), since it makes the stream behind attention from o's
bottleneck; both repeat the FLOPs of eq. 40 of the CR-Net paper. Fewer layers keep less still, for
more alive at once.

Source: arXiv:2502.10940 and its official code at 91ff0d1.
Deviation: what is kept is the bottleneck before SiLU, not after it; its slope follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crnet.linears import Parameterization
from crnet.linears._declarations import TABLE_RANKS, above_zero, activated_work, by_both_widths
from crnet.specs import Shape, Slot, Split, TensorSpec, Work

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
        return by_both_widths(slot, options.lr_factor)

    def work(self, slot: Slot, options: CoLAOptions, rows: int, item_bytes: int) -> Work:
        return activated_work(slot, rows, item_bytes)

    def split(self, slot: Slot, options: CoLAOptions) -> Split:
        return Split("bottleneck")  # before SiLU: a sum of what SiLU gives would be another map

    def make(self, slot: Slot, options: CoLAOptions):
        from crnet.linears._activated import ActivatedMap

        return ActivatedMap(self.tensors(slot, options))


METHODS = [CoLA()]
