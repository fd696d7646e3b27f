"""Value ResFormer: full rank, and the values of later blocks mix in those of the first.

`V_l <- lambda1 V_1 + lambda2 V_l` from the second block on, both numbers learned, each block its
own, 1/2 at first; V_1 is the first block's output before heads are split. Every other map is dense.
The entry `resformer` is another method, the rival in figure 6 of CR-Net's paper.

Source: Zhou et al. 2024 (arXiv:2410.17897), official code at 95652f6. Its variants are options:
numbers that stay as they are (`--model.value-resformer.learnable false`), the first block's values
as they come beside the own (`lambda1` and `lambda2` 1), the upper blocks alone (`blocks`).

Deviation: none decays, and the rate is the base rate.

Unverified: the learnable variant is not in the code; the initial 1/2 is that of the fixed one.
"""

from __future__ import annotations

from dataclasses import dataclass

from crnet.linears import Parameterization
from crnet.linears._declarations import dense, dense_backward, dense_work, inner_passes
from crnet.specs import Passes, Read, Slot, Split, TensorSpec, Traffic, Work, constant

POSITION = "v"


@dataclass(frozen=True, kw_only=True)
class ValueResFormerOptions:
    """Value ResFormer."""

    lambda1: float = 0.5
    """Initial factor of the first block's values."""
    lambda2: float = 0.5
    """Initial factor of a block's own values."""
    learnable: bool = True
    """Train both; otherwise they stay as they are."""
    blocks: str | None = None
    """Blocks, from 2, that mix: 6,7,8; none: all."""


class ValueResFormer(Parameterization):
    name = "value-resformer"
    summary = "dense matrices; values mixed with those of the first block"
    Options = ValueResFormerOptions
    examples = (
        ValueResFormerOptions(lambda1=1.0, lambda2=1.0, learnable=False),
        ValueResFormerOptions(blocks="3"),
    )
    has_ranks = False
    pads = True

    def problems(self, options: ValueResFormerOptions, slots) -> list[str]:
        if not any(slot.position == POSITION for slot in slots):
            return [
                f"value-resformer mixes the output of a position {POSITION}, and this architecture "
                "has none; take another one"
            ]
        found, num_layers = [], slots[0].num_layers
        try:
            named = _blocks(options)
        except ValueError as error:
            return [str(error)]
        if outside := [str(idx + 1) for idx in named if not 0 < idx < num_layers]:
            found.append(
                f"--model.value-resformer.blocks {options.blocks}: block {', '.join(outside)} is "
                f"not one of 2 to {num_layers}; leave it out"
            )
        if not options.learnable and options.lambda1 == 0:
            found.append(
                "--model.value-resformer.lambda1 0 that is not learned reads nothing of the first "
                "block; take full, or another number"
            )
        return found

    def fixed_rank(self, layer_idx, options):
        return 0

    def tensors(self, slot: Slot, options: ValueResFormerOptions) -> dict[str, TensorSpec]:
        if not _is_mixed(slot, options):
            return dense(slot)
        initial = {"lambda1": options.lambda1, "lambda2": options.lambda2}
        return dense(slot) | {
            name: TensorSpec(
                (1,),
                "gain",
                constant(value),
                trained=options.learnable,
                dtype="float32",
                decays=False,
            )
            for name, value in initial.items()
        }

    def work(self, slot: Slot, options: ValueResFormerOptions, rows: int, item_bytes: int) -> Work:
        if not _is_mixed(slot, options):
            return dense_work(slot, rows)
        items = slot.in_size * slot.out_size
        size = rows * slot.out_size * item_bytes
        wide = rows * slot.in_size * item_bytes
        weight = items * item_bytes
        inners = inner_passes(rows * slot.out_size, item_bytes) + inner_passes(items, item_bytes)
        backward = Traffic(2 * size + 2 * wide + 2 * weight, 3) + inners
        return Work(
            forward_flops=2 * rows * items,
            backward_flops=4 * rows * items,
            weight_items=items,
            products=dense_work(slot, rows).products,
            backward_products=dense_backward(slot, rows),
            passes=Passes(Traffic(5 * size, 2), *[Traffic(3 * size, 1)] * 2),
            backward_passes=Passes(*[backward] * 3),
        )

    def reads(self, slot: Slot, options: ValueResFormerOptions) -> Read | None:
        if not _is_mixed(slot, options):
            return None
        return Read("first", slot.out_size, initial_gain=options.lambda1)

    def split(self, slot: Slot, options: ValueResFormerOptions) -> Split:
        return Split("edge", ("lambda1", "lambda2") if _is_mixed(slot, options) else ())

    def make(self, slot: Slot, options: ValueResFormerOptions):
        from crnet.linears._maps import DenseMap
        from crnet.linears.value_resformer.module import MixedValueMap

        return (MixedValueMap if _is_mixed(slot, options) else DenseMap)(
            self.tensors(slot, options)
        )


def _blocks(options: ValueResFormerOptions) -> list[int]:
    """Blocks that are named, from 0. Raises ``ValueError`` where they cannot be read."""
    words = [] if options.blocks is None else options.blocks.split(",")
    if not all(word.isdecimal() and word.isascii() for word in words):
        raise ValueError(
            f"--model.value-resformer.blocks {options.blocks!r} cannot be read; write 6 or 6,7,8"
        )
    return sorted({int(word) - 1 for word in words})


def _is_mixed(slot: Slot, options: ValueResFormerOptions) -> bool:
    named = options.blocks is None or slot.layer_idx in _blocks(options)
    return slot.position == POSITION and slot.layer_idx > 0 and named


METHODS = [ValueResFormer()]
