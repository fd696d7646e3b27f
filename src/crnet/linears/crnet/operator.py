"""What CR-Net makes of an operator of several maps, a layer of experts: its output has the carry.

``Y_l = gain Y_{l-1} + MoE_l(X_l)``. Source: arXiv:2509.18993, E.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crnet.linears import UNCHANGED, Parameterization
from crnet.linears._declarations import inner_passes
from crnet.specs import Passes, Slot, TensorSpec, Traffic, Work


class CarriedOutput(Parameterization):
    """The output of an operator, added to that of an earlier block."""

    def __init__(self, method: Parameterization, beta: Callable[[Slot, Any], TensorSpec]):
        """``method``: whose maps read what this reads; ``beta``: the gain that a slot declares."""
        self.method, self.beta = method, beta

    def tensors(self, slot, options):
        return {"beta": self.beta(slot, options)} if self.reads(slot, options) else {}

    def work(self, slot, options, rows, item_bytes):
        if self.reads(slot, options) is None:
            return UNCHANGED.work(slot, options, rows, item_bytes)
        items = rows * slot.out_size
        size = items * self.output_bytes(slot, options, item_bytes)
        ahead = Traffic(2 * size, 1) + Traffic(2 * size + items * item_bytes, 1)
        back = Traffic(2 * size, 1) + inner_passes(items, size // items)
        return Work(
            *(0, 0, 0),
            keeps_input=False,
            kept_bytes=4,
            passes=Passes(ahead + Traffic(0, 3), ahead, Traffic(2 * size, 1)),
            backward_passes=Passes(back, back, Traffic(2 * size, 1)),
        )

    def reads(self, slot, options):
        return self.method.reads(slot, options)

    def output_bytes(self, slot, options, item_bytes):
        return self.method.output_bytes(slot, options, item_bytes)

    def make(self, slot, options):
        from crnet.linears._maps import SameMap
        from crnet.linears.crnet.module import CarriedOutputMap

        tensors = self.tensors(slot, options)
        return CarriedOutputMap(tensors, options.carry_dtype) if tensors else SameMap({})
