"""AdamW whose two moments take a byte an item, for matrices; AdamW for the rest.

Source: Dettmers et al. 2022 (arXiv:2110.02861): moments are kept as codes of a dynamic map, with
an absolute maximum for every block of 256 items; bitsandbytes' kernels. As advised there the
embedding and the head keep 32 bits, and so does what is small. Cost: one pass over a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crnet.optimizers import OptimizerMethod
from crnet.optimizers._eight_bits import MIN_ITEMS, blocks_bytes
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Adam8bitOptions:
    """8-bit Adam."""

    min_items: int = MIN_ITEMS
    """Matrices with fewer items keep moments of their own dtype."""

    def takes(self, spec: TensorSpec) -> bool:
        """Whether the moments of a tensor take 8 bits."""
        is_map = spec.role in ("matrix", "factor_in", "factor_out") and len(spec.shape) == 2
        return is_map and spec.num_items >= self.min_items


class Adam8bit(OptimizerMethod):
    name = "adam8bit"
    summary = "AdamW with moments of 8 bits for matrices (bitsandbytes)"
    Options = Adam8bitOptions
    examples = (Adam8bitOptions(min_items=1),)
    has_codes = True

    def problems(self, options: Adam8bitOptions) -> list[str]:
        if options.min_items < 1:
            return [f"--optimizer.adam8bit.min-items is {options.min_items}; take 1 or more"]
        return []

    def state_bytes(self, spec: TensorSpec, options: Adam8bitOptions, item_bytes: int) -> int:
        moments = 2 * spec.num_items * item_bytes
        if options.takes(spec):
            moments = blocks_bytes(spec.num_items)
        return moments + 4  # AdamW's step counter

    def whole(self, spec: TensorSpec, options: Adam8bitOptions) -> bool:
        return options.takes(spec)  # blocks would begin elsewhere in a part

    def build(self, parameters, options: Adam8bitOptions, settings) -> Any:
        from crnet.optimizers.adam8bit.module import Adam8bitAndAdamW

        return Adam8bitAndAdamW(parameters, options, settings, self.name)


METHODS = [Adam8bit()]
