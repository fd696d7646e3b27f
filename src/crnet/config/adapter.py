"""An adapter: low-rank updates that train beside the frozen maps of a given model. No torch.

The tensors have the names and shapes that PEFT gives them (``adapters``), so that optimizers,
checkpoints and the cost model find them where they find every other tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from crnet.specs import OWN, Slot, TensorSpec

NAME = "default"
"""Under which PEFT keeps the one adapter of a model."""


@dataclass(frozen=True)
class Adapter:
    """``y = base(x) + alpha / rank (x A^T) B^T`` on every map of every block."""

    rank: int
    alpha: float

    def beside(
        self, tensors: Mapping[str, TensorSpec], slot_of: Mapping[str, Slot]
    ) -> dict[str, TensorSpec]:
        """The tensors of a model with the adapter: its own, frozen, and behind them the adapter's.

        ``slot_of``: by the full name of a map.
        """
        found = {name: dataclasses.replace(each, trained=False) for name, each in tensors.items()}
        for owner, slot in slot_of.items():
            found |= {f"{owner}.{name}": each for name, each in self.tensors(slot).items()}
        return found

    def tensors(self, slot: Slot) -> dict[str, TensorSpec]:
        """Of one map, by their names there. fp32 in every precision: they are few."""
        shapes = {"lora_A": (self.rank, slot.in_size), "lora_B": (slot.out_size, self.rank)}
        return {
            f"{name}.{NAME}.weight": TensorSpec(shape, "matrix", OWN, dtype="float32")
            for name, shape in shapes.items()
        }
