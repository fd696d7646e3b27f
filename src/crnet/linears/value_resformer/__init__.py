"""Value ResFormer: full rank, and the values of every later block mix in those of the first.

``V_l <- lambda1 V_1 + lambda2 V_l`` from the second block on, both numbers learned, 1/2 at first;
V_1 is the first block's output before heads are split. Every other map is dense.
Source: value residual learning, official code at 95652f6; the learnable variant is not in it, and
the initial 1/2 is that of the fixed one. The entry ``resformer`` is another method.
"""

from __future__ import annotations

from crnet.linears import Parameterization
from crnet.linears._declarations import dense, dense_backward, dense_work, inner_passes
from crnet.specs import Passes, Read, Slot, Split, TensorSpec, Traffic, Work, constant

POSITION = "v"
INITIAL = 0.5


class ValueResFormer(Parameterization):
    name = "value-resformer"
    summary = "dense matrices; values mixed with those of the first block"
    has_ranks = False
    pads = True

    def problems(self, options, slots) -> list[str]:
        if any(slot.position == POSITION for slot in slots):
            return []
        return [
            f"value-resformer mixes the output of a position {POSITION}, and this architecture "
            "has none; take another one"
        ]

    def fixed_rank(self, layer_idx, options):
        return 0

    def tensors(self, slot: Slot, options) -> dict[str, TensorSpec]:
        if not _is_mixed(slot):
            return dense(slot)
        gain = TensorSpec((1,), "gain", constant(INITIAL), dtype="float32", decays=False)
        return dense(slot) | {"lambda1": gain, "lambda2": gain}

    def work(self, slot: Slot, options, rows: int, item_bytes: int) -> Work:
        if not _is_mixed(slot):
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

    def reads(self, slot: Slot, options) -> Read | None:
        return Read("first", slot.out_size, initial_gain=INITIAL) if _is_mixed(slot) else None

    def split(self, slot: Slot, options) -> Split:
        return Split("edge", ("lambda1", "lambda2") if _is_mixed(slot) else ())

    def make(self, slot: Slot, options):
        from crnet.linears._maps import DenseMap
        from crnet.linears.value_resformer.module import MixedValueMap

        return (MixedValueMap if _is_mixed(slot) else DenseMap)(self.tensors(slot, options))


def _is_mixed(slot: Slot) -> bool:
    return slot.position == POSITION and slot.layer_idx > 0


METHODS = [ValueResFormer()]
