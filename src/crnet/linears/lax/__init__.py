"""LaX, latent crossing: bottlenecks of successive blocks are added up.

`z_l = x A + g(z_(l-1))`, `y = z_l B`; the sum is what a block hands on. g is the identity, a
learned number or a layer norm (`--model.lax.gate`). Every block is low rank; the first reads
nothing.

Source: arXiv:2505.21732 and its official code of vision models (K1seki221/Latent_Crossing,
lax_vit.py).

Deviation: initial factors are those of plain low rank; a learned number starts at 1.

Unverified: the gate that its language models have, and its rates: that code is not out yet.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from crnet.linears import Parameterization
from crnet.linears._declarations import TABLE_RANKS, above_zero, factors, factors_work, inner_passes
from crnet.specs import (
    Passes,
    Read,
    Slot,
    Split,
    TensorSpec,
    Traffic,
    Work,
    constant,
    in_each_way,
)


@dataclass(frozen=True, kw_only=True)
class LaXOptions:
    """LaX."""

    gate: Literal["identity", "scalar", "norm"] = "identity"
    """What the bottleneck below goes through: nothing, a learned number that starts at 1, or a
    layer norm with gains and shifts."""
    lr_factor: float = 0.25
    """Learning rate of the factors over the base rate."""


class LaX(Parameterization):
    name = "lax"
    summary = "low rank, bottlenecks of successive blocks added up"
    Options = LaXOptions
    examples = (LaXOptions(gate="scalar"), LaXOptions(gate="norm"))
    pads = True
    published_ranks = TABLE_RANKS

    def problems(self, options: LaXOptions, slots: Sequence[Slot]) -> list[str]:
        found = above_zero(self.name, lr_factor=options.lr_factor)
        columns: dict[str, list[Slot]] = {}
        for slot in slots:
            columns.setdefault(slot.position, []).append(slot)
        differ = [
            f"{position} has {low.rank} in block {low.layer_idx + 1} and {high.rank} in block "
            f"{high.layer_idx + 1}"
            for position, column in columns.items()
            for low, high in itertools.pairwise(column)
            if low.rank != high.rank
        ]
        if differ:
            found.append(
                f"--model.rank: lax adds bottlenecks of neighbouring blocks, which must be equally "
                f"wide, but {'; '.join(differ)}; give every position one rank"
            )
        return found

    def tensors(self, slot: Slot, options: LaXOptions) -> dict[str, TensorSpec]:
        pair = factors(slot, "balanced", options.lr_factor)
        if options.gate == "identity" or not slot.layer_idx:
            return pair
        shape = (1,) if options.gate == "scalar" else (slot.rank,)
        gate = TensorSpec(shape, "gain", constant(1.0), dtype="float32", decays=False)
        if options.gate == "scalar":
            return pair | {"gate": gate}
        return pair | {"gate": gate, "shift": dataclasses.replace(gate, init=constant(0.0))}

    def work(self, slot: Slot, options: LaXOptions, rows: int, item_bytes: int) -> Work:
        work = factors_work(slot, rows, item_bytes)
        if not slot.layer_idx:
            return work
        (shrink, grow), (up, *others) = work.products, work.backward_products
        forward, backward = _gate_passes(options, rows * slot.rank, item_bytes)
        return dataclasses.replace(
            work,
            products=(dataclasses.replace(shrink, accumulates=True), grow),
            backward_products=(dataclasses.replace(up, accumulates=True), *others),
            passes=forward,
            backward_passes=backward,
        )

    def reads(self, slot: Slot, options: LaXOptions) -> Read | None:
        if not slot.layer_idx:
            return None
        return Read("below", slot.rank, of="bottleneck", is_kept=options.gate != "identity")

    def split(self, slot: Slot, options: LaXOptions) -> Split:
        """The bottleneck is whole on every process, and so is what a block hands on of it."""
        return Split("bottleneck")

    def make(self, slot: Slot, options: LaXOptions):
        from crnet.linears.lax.module import LaXMap

        return LaXMap(self.tensors(slot, options))


def _gate_passes(options: LaXOptions, items: int, item_bytes: int) -> tuple[Passes, Passes]:
    """Of the bottleneck below, forward and backward."""
    size = items * item_bytes
    if options.gate == "identity":
        return Passes(), Passes()
    if options.gate == "scalar":  # its product, and both gradients
        found = Traffic(2 * size, 1) + inner_passes(items, item_bytes)
        return in_each_way(2 * size, 1), Passes(found, found, found)
    casts = 0 if item_bytes >= 4 else 2  # to fp32, and back
    wide = casts * (size + 4 * items)
    # The norm, which the backward pass makes once more, and its gradient.
    once = 2 * 4 * items + wide
    return in_each_way(once, 1 + casts), in_each_way(2 * once + 2 * 4 * items, 2 + 2 * casts)


METHODS = [LaX()]
