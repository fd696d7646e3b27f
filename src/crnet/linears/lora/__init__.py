"""LoRA from scratch, and ReLoRA, which merges the update into the frozen matrix and starts a new.

``y = W0 x + (alpha / r) B A x``, W0 random and frozen, B zero at first. Source: ReLoRA, official
code at 176f376.
Deviation: A is never zero. The official code zeroes A at the start too, so that nothing is trained
before the first merge. No dropout.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from crnet.linears import Parameterization
from crnet.linears._declarations import (
    TABLE_RANKS,
    above_zero,
    dense,
    dense_backward,
    factor_backward,
    factor_products,
    pair,
)
from crnet.specs import Product, Slot, Split, TensorSpec, Work, constant, in_each_way, uniform


@dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    """LoRA."""

    alpha: float = 32.0
    """The update is scaled by alpha over the rank."""


@dataclass(frozen=True, kw_only=True)
class ReLoRAOptions(LoRAOptions):
    """ReLoRA."""

    merge_every: int = 1000
    """Steps between two merges of the update into the frozen matrix."""
    reset_every: int = 1000
    """Steps between two resets of the optimizer's state of A and B."""
    kept_frac: float = 0.001
    """Share of that state's items, drawn at random, that a reset keeps."""


def _accumulated(product: Product) -> Product:
    return dataclasses.replace(product, accumulates=True)


class LoRA(Parameterization):
    name = "lora"
    summary = "a frozen random matrix plus a trained low-rank update"
    Options: type | None = LoRAOptions
    pads = True
    published_ranks = TABLE_RANKS

    def problems(self, options: LoRAOptions, slots) -> list[str]:
        return above_zero(self.name, alpha=options.alpha)

    def tensors(self, slot: Slot, options: LoRAOptions) -> dict[str, TensorSpec]:
        """A is Kaiming-uniform with slope sqrt(5), which is a bound of D^(-1/2)."""
        frozen = {
            name: dataclasses.replace(spec, trained=False) for name, spec in dense(slot).items()
        }
        return frozen | pair(slot, uniform(slot.in_size**-0.5), constant(0.0))

    def work(self, slot: Slot, options: LoRAOptions, rows: int, item_bytes: int) -> Work:
        frozen = slot.in_size * slot.out_size
        trained = slot.rank * (slot.in_size + slot.out_size)
        shrink, grow = factor_products(slot, rows)
        *of_factors, of_x = factor_backward(slot, rows)
        frozen_x, _ = dense_backward(slot, rows)
        scaled = slot.rank * (rows + slot.out_size)
        return Work(
            forward_flops=2 * rows * (frozen + trained),
            backward_flops=2 * rows * (frozen + 2 * trained),
            weight_items=frozen + trained,
            kept_bytes=rows * slot.rank * item_bytes,
            bottleneck_bytes=rows * (slot.out_size + slot.rank) * item_bytes,
            products=(Product(rows, slot.in_size, slot.out_size), shrink, _accumulated(grow)),
            backward_products=(*of_factors, _accumulated(of_x), frozen_x),
            # The scale, of dB and of dZ.
            backward_passes=in_each_way(2 * scaled * item_bytes, 2),
        )

    def split(self, slot: Slot, options: LoRAOptions) -> Split | str:
        """W0 wants a sum at the edge, and that has the update's in it."""
        return Split("edge", ("A", "B"))

    def make(self, slot: Slot, options: LoRAOptions):
        from crnet.linears.lora.module import LoRAMap

        return LoRAMap(self.tensors(slot, options), options.alpha / slot.rank)


class ReLoRA(LoRA):
    """Events: ``merge`` and ``reset``, each on a clock of its own.

    Deviation: an event is due once a multiple of its steps is done; the official code has it one
    step later and counts from the start of the schedule. Of its three resets the random one alone.
    """

    name = "relora"
    summary = "LoRA that merges its update every so many steps"
    Options = ReLoRAOptions
    pads = False  # a merge draws A anew, as long as it is
    examples = (ReLoRAOptions(merge_every=7, reset_every=6, kept_frac=0.1),)

    def problems(self, options: ReLoRAOptions, slots) -> list[str]:
        clocks = {"merge_every": options.merge_every, "reset_every": options.reset_every}
        found = above_zero(self.name, alpha=options.alpha, **clocks)
        if not 0 <= options.kept_frac < 1:
            found.append(
                f"--model.relora.kept-frac is {options.kept_frac}; it is a share and must lie in "
                "[0, 1)"
            )
        return found

    def events(self, step: int, options: ReLoRAOptions) -> tuple[str, ...]:
        clocks = {"merge": options.merge_every, "reset": options.reset_every}
        return tuple(name for name, every in clocks.items() if step and step % every == 0)

    def split(self, slot: Slot, options: ReLoRAOptions) -> Split | str:
        return "its merges and resets want whole tensors"

    def make(self, slot: Slot, options: ReLoRAOptions):
        from crnet.linears.lora.module import ReLoRAMap

        scale = options.alpha / slot.rank
        return ReLoRAMap(self.tensors(slot, options), scale, options.kept_frac)


METHODS = [LoRA(), ReLoRA()]
