"""LOST (re-implementation): a pair of factors with SiLU between them, plus dense columns of a few
input channels.

``y = gamma silu(x A) B + (1 - gamma) x_I C^T``; I are fixed input channels, C (F, count of I) their
columns. All of it begins in one dense Gaussian matrix W with singular triples u, v, t: A and B are
the top R of them, split evenly; I are the channels whose columns are largest in the rest of W; C
are their columns in W itself, not in that rest.

Source: arXiv:2508.02668 as secondary texts give it. Its code could not be read; a later working
repository of the first author (Lora-init at d7a90f4) was.
Deviation: ``released`` is what that repository does otherwise: channels are ranked by the 256
triples behind the top R alone, and there is no SiLU. Its own defaults are gamma 0.5 and delta 0.05.
Unverified: gamma, delta and their sizes per model, learning rate, how singular values are split,
the standard deviation of W (here that of a dense map), and whether the feed-forward keeps its own
activation (here it does).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from crnet.linears import Parameterization
from crnet.linears._declarations import (
    TABLE_RANKS,
    above_zero,
    activated_work,
    factor_backward,
    factor_products,
    factors_work,
    pair,
    share,
)
from crnet.specs import OWN, Product, Slot, TensorSpec, Work, in_each_way

RELEASED_TRIPLES = 256
"""Behind the top R, by which the released code ranks channels."""


@dataclass(frozen=True, kw_only=True)
class LOSTOptions:
    """LOST."""

    gamma: float = 0.7
    """Share of the factors in the output; the columns have the rest (recalled: 0.7; 130M: 0.9)."""
    delta: float = 0.01
    """Share of the input channels that have columns, at least one channel (unverified)."""
    released: bool = False
    """As the readable code: channels by the next 256 triples, no SiLU. Then a map is a matrix."""
    lr_factor: float = 1.0
    """Learning rate of factors and columns over the base rate (unverified)."""


class LOST(Parameterization):
    name = "lost"
    summary = "factors with SiLU plus dense columns of a few fixed input channels"
    Options = LOSTOptions
    examples = (LOSTOptions(released=True, gamma=0.5, delta=0.2),)
    published_ranks = TABLE_RANKS

    def problems(self, options: LOSTOptions, slots: Sequence[Slot]) -> list[str]:
        found = above_zero(self.name, lr_factor=options.lr_factor)
        if not 0 < options.gamma < 1:
            found.append(
                f"--model.lost.gamma is {options.gamma}; it is a share and must lie in (0, 1)"
            )
        if not 0 < options.delta <= 1:
            found.append(
                f"--model.lost.delta is {options.delta}; it is a share and must lie in (0, 1]"
            )
        return found

    def tensors(self, slot: Slot, options: LOSTOptions) -> dict[str, TensorSpec]:
        """``columns``: C; ``index``: I, ascending."""
        count = num_channels(slot, options)
        columns = TensorSpec((slot.out_size, count), "values", OWN, lr_factor=options.lr_factor)
        index = TensorSpec((count,), "index", OWN, trained=False, dtype="int32")
        return pair(slot, OWN, OWN, options.lr_factor) | {"columns": columns, "index": index}

    def work(self, slot: Slot, options: LOSTOptions, rows: int, item_bytes: int) -> Work:
        work = (factors_work if options.released else activated_work)(slot, rows, item_bytes)
        count = num_channels(slot, options)
        items, picked = count * slot.out_size, rows * count * item_bytes
        down, up = factor_products(slot, rows)
        of_columns = (
            Product(count, rows, slot.out_size),
            Product(count, slot.out_size, rows),
        )
        picking = in_each_way(2 * picked + 4 * count, 1)
        return dataclasses.replace(
            work,
            forward_flops=work.forward_flops + 2 * rows * items,
            backward_flops=work.backward_flops + 4 * rows * items,
            weight_items=work.weight_items + items,
            bottleneck_bytes=work.bottleneck_bytes + picked,
            rebuild_flops=work.rebuild_flops + 2 * rows * items,
            transient_bytes=work.transient_bytes + picked,
            products=(
                down,
                Product(rows, count, slot.out_size),
                dataclasses.replace(up, accumulates=True),
            ),
            backward_products=(*factor_backward(slot, rows), *of_columns),
            passes=work.passes + picking,
            backward_passes=work.backward_passes
            + picking
            + in_each_way(3 * picked + (4 + 8 + 8) * count, 2),  # the index is widened
        )

    def split(self, slot: Slot, options: LOSTOptions) -> str:
        return "its channels are chosen among those of the whole input"

    def initial_value(self, name, slot, options, generator):
        """Cost: one SVD of a dense matrix for all tensors of a map."""
        from crnet.linears._maps import spectral_factor
        from crnet.linears.lost.module import chosen_channels, columns_of

        sizes = (slot.in_size, slot.rank, slot.out_size)
        if name in ("A", "B"):
            return spectral_factor(name, *sizes, slot.init_std, generator("dense"))
        count = num_channels(slot, options)
        num_triples = RELEASED_TRIPLES if options.released else None
        seed = generator("dense").initial_seed()
        index = chosen_channels(*sizes, slot.init_std, seed, count, num_triples)
        return index if name == "index" else columns_of(slot, index, seed)

    def make(self, slot: Slot, options: LOSTOptions):
        from crnet.linears.lost.module import LOSTMap

        return LOSTMap(self.tensors(slot, options), options.gamma, not options.released)


def num_channels(slot: Slot, options: LOSTOptions) -> int:
    """Input channels with a column."""
    return max(1, share(options.delta, slot.in_size))


METHODS = [LOST()]
