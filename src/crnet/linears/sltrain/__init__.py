"""SLTrain: a pair of factors plus a sparse matrix whose support never moves.

``W = (alpha / r) B A + scatter(values)``, ``y = W x``. Source: SLTrain, official code at 2335d62.
Deviation: positions of the support are int32, not int64.
"""

from __future__ import annotations

from dataclasses import dataclass

from crnet.linears import Parameterization
from crnet.linears._declarations import (
    TABLE_RANKS,
    above_zero,
    dense_backward,
    dense_work,
    pair,
    share,
)
from crnet.specs import OWN, Product, Slot, TensorSpec, Work, constant, in_each_way, uniform

MOST_ITEMS = 2**31 - 1
"""Of a matrix whose positions int32 can name."""


@dataclass(frozen=True, kw_only=True)
class SLTrainOptions:
    """SLTrain."""

    delta: float = 0.03
    """Share of a matrix that the sparse part holds (published: 0.05 at 7B, else 0.03)."""
    alpha: float = 32.0
    """The product of the factors is scaled by alpha over the rank (published: 32, 16, 16, 8, 8 for
    60M, 130M, 350M, 1B, 7B)."""


class SLTrain(Parameterization):
    name = "sltrain"
    summary = "a low-rank matrix plus a sparse one with a random, fixed support"
    Options = SLTrainOptions
    published_ranks = TABLE_RANKS

    def problems(self, options: SLTrainOptions, slots) -> list[str]:
        found = above_zero(self.name, alpha=options.alpha)
        if not 0 < options.delta <= 1:
            words = f"--model.sltrain.delta is {options.delta}; it is a share and must lie in "
            return [*found, f"{words}(0, 1]"]
        sizes = {(slot.position, slot.in_size, slot.out_size) for slot in slots}
        for position, in_size, out_size in sorted(sizes):
            where = f"the map {position} ({in_size} x {out_size})"
            if in_size * out_size > MOST_ITEMS:
                found.append(
                    f"{where} has more items than the {MOST_ITEMS} that sltrain's int32 positions "
                    "can name; take a smaller model, or another parameterization"
                )
            elif not _num_values(in_size, out_size, options.delta):
                found.append(
                    f"--model.sltrain.delta {options.delta} leaves no item of {where}; take more"
                )
        return found

    def tensors(self, slot: Slot, options: SLTrainOptions) -> dict[str, TensorSpec]:
        """``index``: positions in the matrix (F, D) read row by row, ascending."""
        bound = uniform(slot.in_size**-0.5)
        size = (_num_values(slot.in_size, slot.out_size, options.delta),)
        return pair(slot, bound, constant(0.0)) | {
            "values": TensorSpec(size, "values", bound),
            "index": TensorSpec(size, "index", OWN, trained=False, dtype="int32"),
        }

    def split(self, slot: Slot, options: SLTrainOptions) -> str:
        return "its sparse items are drawn and kept for a whole matrix"

    def work(self, slot: Slot, options: SLTrainOptions, rows: int, item_bytes: int) -> Work:
        """Forward: the matrix is built, then read; backward: built, read, its gradient, and the
        gradients of both factors from that."""
        items = slot.in_size * slot.out_size
        of_factors = slot.rank * (slot.in_size + slot.out_size)
        num_values = _num_values(slot.in_size, slot.out_size, options.delta)
        build = Product(slot.out_size, slot.rank, slot.in_size)
        # values added where the index says; of the gradient, both scales and the values read.
        scattered = (3 * item_bytes + 4) * num_values
        gathered = (2 * item_bytes + 4) * num_values + 2 * of_factors * item_bytes
        return Work(
            forward_flops=2 * items * (slot.rank + rows),
            backward_flops=2 * items * (3 * slot.rank + 2 * rows),
            weight_items=of_factors + num_values,
            transient_bytes=items * item_bytes,
            products=(build, *dense_work(slot, rows).products),
            backward_products=(
                build,
                *dense_backward(slot, rows),
                Product(slot.in_size, slot.out_size, slot.rank),
                Product(slot.rank, slot.in_size, slot.out_size),
            ),
            passes=in_each_way(scattered, 1),
            backward_passes=in_each_way(scattered + gathered, 4),
        )

    def initial_value(self, name, slot, options, generator):
        """The support: uniform, without replacement. Cost: 4 D F bytes for a moment."""
        import torch

        count = _num_values(slot.in_size, slot.out_size, options.delta)
        items = slot.in_size * slot.out_size
        order = torch.randperm(items, dtype=torch.int32, generator=generator("support"))
        return order[:count].sort().values

    def make(self, slot: Slot, options: SLTrainOptions):
        from crnet.linears.sltrain.module import SLTrainMap

        return SLTrainMap(self.tensors(slot, options), options.alpha / slot.rank)


def _num_values(in_size: int, out_size: int, delta: float) -> int:
    return share(delta, in_size * out_size)


METHODS = [SLTrain()]
