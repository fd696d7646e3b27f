"""DLR: CoLA's map whose bottleneck also reaches the output repeated, without a weight.

``y = z B + (alpha / sqrt(K)) Expand_K(z)``, ``z = silu(x A)``, ``K = ceil(F / R)``: Expand_K
repeats each item of the bottleneck K times, one behind the other, and is cut off at the width F of
the output. It is linear in z, so that ``y = z B*`` with ``B* = B + (alpha / sqrt(K)) E``, E
constant: computed so here too, in training, without a pass over the output and with CoLA's bytes. A
trained model is CoLA's with B* in the place of B.

Source: arXiv:2606.28932 and its official code at 202b969 (the layer, its initial values, the fold).
Deviation: of the code's choices that are off by default (random copies, a trained alpha, no
1 / sqrt(K)) there is none; so is its scale of the bottleneck, which is 1 by default.
Unverified: learning rate, weight decay and steps (the code that was read trains nothing), and
whether the published runs keep the feed-forward's own activation; here it stays, as the code's
wrapper leaves it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from crnet.linears import Parameterization
from crnet.linears._declarations import (
    TABLE_RANKS,
    above_zero,
    activated_work,
    by_both_widths,
    factors_work,
)
from crnet.specs import Slot, TensorSpec, Work, in_each_way


@dataclass(frozen=True, kw_only=True)
class DLROptions:
    """DLR."""

    alpha: float = 1.0
    """Strength of the repeated bottleneck, over sqrt(K) (published: 1); 0: there is none."""
    activation: Literal["silu", "none"] = "silu"
    """Of the bottleneck (published: silu). none: every map is a matrix, and exports as one."""
    lr_factor: float = 1.0
    """Learning rate of the factors over the base rate (unverified; CoLA's)."""


class DLR(Parameterization):
    name = "dlr"
    summary = "CoLA whose bottleneck also reaches the output repeated, folded into B"
    Options = DLROptions
    examples = (DLROptions(activation="none", alpha=0.5), DLROptions(alpha=0.0))
    published_ranks = TABLE_RANKS

    def problems(self, options: DLROptions, slots) -> list[str]:
        found = above_zero(self.name, lr_factor=options.lr_factor)
        if options.alpha < 0:
            found.append(f"--model.dlr.alpha is {options.alpha}; take 0 or more")
        return found

    def tensors(self, slot: Slot, options: DLROptions) -> dict[str, TensorSpec]:
        return by_both_widths(slot, options.lr_factor)

    def work(self, slot: Slot, options: DLROptions, rows: int, item_bytes: int) -> Work:
        declare = factors_work if options.activation == "none" else activated_work
        work = declare(slot, rows, item_bytes)
        if not options.alpha:
            return work
        # B is copied, and the constant added where it is not 0.
        copies = -(-slot.out_size // slot.rank)
        size = slot.rank * slot.out_size * item_bytes
        moved, kernels = 2 * size + 2 * slot.out_size * item_bytes, 2 + bool(slot.out_size % copies)
        added = in_each_way(moved, kernels)
        return dataclasses.replace(
            work,
            transient_bytes=work.transient_bytes + size,
            passes=work.passes + added,
            backward_passes=work.backward_passes + added,
        )

    def split(self, slot: Slot, options: DLROptions) -> str:
        return (
            "which item of the bottleneck a column repeats hangs on its place in the whole output"
        )

    def make(self, slot: Slot, options: DLROptions):
        from crnet.linears._activated import ActivatedMap

        is_active = options.activation != "none"
        return ActivatedMap(self.tensors(slot, options), is_active=is_active, alpha=options.alpha)


METHODS = [DLR()]
