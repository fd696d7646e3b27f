"""LaX, latent crossing: bottlenecks of successive blocks are added up.

``z_l = x A + g z_(l-1)``, ``y = z_l B``; the sum is what a block hands on. Every block is low rank,
and the first reads nothing. Source: arXiv:2505.21732 and the official code of vision models.
Deviation: its gate by a layer norm is left out; initial factors are those of plain low rank.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from crnet.linears import Parameterization
from crnet.linears._declarations import TABLE_RANKS, above_zero, factors, factors_work, inner_passes
from crnet.specs import Passes, Read, Slot, TensorSpec, Traffic, Work, constant, in_each_way


@dataclass(frozen=True, kw_only=True)
class LaXOptions:
    """LaX."""

    gate: Literal["identity", "scalar"] = "identity"
    """What the bottleneck below is multiplied with: 1, or a learned number that starts at 1."""
    lr_factor: float = 0.25
    """Learning rate of the factors over the base rate."""


class LaX(Parameterization):
    name = "lax"
    summary = "low rank, bottlenecks of successive blocks added up"
    Options = LaXOptions
    examples = (LaXOptions(gate="scalar"),)
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
        return pair | {
            "gate": TensorSpec((1,), "gain", constant(1.0), dtype="float32", decays=False)
        }

    def work(self, slot: Slot, options: LaXOptions, rows: int, item_bytes: int) -> Work:
        work = factors_work(slot, rows, item_bytes)
        if not slot.layer_idx:
            return work
        (shrink, grow), (up, *others) = work.products, work.backward_products
        size = rows * slot.rank * item_bytes
        extra = Passes()
        backward = Passes()
        if options.gate == "scalar":  # its product with the bottleneck below, and both gradients
            extra = in_each_way(2 * size, 1)
            found = Traffic(2 * size, 1) + inner_passes(rows * slot.rank, item_bytes)
            backward = Passes(found, found, found)
        return dataclasses.replace(
            work,
            products=(dataclasses.replace(shrink, accumulates=True), grow),
            backward_products=(dataclasses.replace(up, accumulates=True), *others),
            passes=extra,
            backward_passes=backward,
        )

    def reads(self, slot: Slot, options: LaXOptions) -> Read | None:
        if not slot.layer_idx:
            return None
        return Read("below", slot.rank, of="bottleneck", is_kept=options.gate == "scalar")

    def make(self, slot: Slot, options: LaXOptions):
        from crnet.linears.lax.module import LaXMap

        return LaXMap(self.tensors(slot, options))


METHODS = [LaX()]
