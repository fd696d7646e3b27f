"""Plain low rank: every map is W = A B, in every block, without a carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crnet.linears import Group, Slot


@dataclass(frozen=True, kw_only=True)
class LowRankOptions:
    """Plain low rank."""

    init: Literal["balanced", "zero-b", "spectral"] = "balanced"
    """balanced: equal Gaussian factors; zero-b: B starts at 0; spectral: truncated SVD of a dense
    initial matrix."""
    lr_factor: float = 0.25
    """Learning rate of the factors over the base rate."""


class LowRank:
    name = "lowrank"
    summary = "W = A B in every block"
    carry = "none"
    first_ranked_layer_idx = 0
    # The convention of every published table of the GaLore family.
    published_ranks = {
        "aligned-parameters": {
            (512, 8): "128",
            (768, 12): "256",
            (1024, 24): "256",
            (2048, 24): "512",
            (4096, 32): "1024",
        }
    }

    def rank_below(self, options: LowRankOptions) -> int:
        return 0

    def problems(self, options: LowRankOptions) -> list[str]:
        if options.lr_factor <= 0:
            return [f"--model.lowrank.lr-factor is {options.lr_factor}; it must be above zero"]
        return []

    def shapes(self, slot: Slot) -> dict[str, tuple[int, ...]]:
        return {"A": (slot.in_size, slot.rank), "B": (slot.rank, slot.out_size)}

    def matrix_items(self, slot: Slot) -> int:
        return slot.rank * (slot.in_size + slot.out_size)

    def bottleneck(self, slot: Slot) -> int:
        return slot.rank

    def carry_bytes(self, options: LowRankOptions, compute_bytes: int) -> int:
        return compute_bytes

    def initial_gain(self, options: LowRankOptions) -> float:
        return 1.0

    def groups(self, slot: Slot, options: LowRankOptions) -> dict[str, Group]:
        return {name: Group(lr_factor=options.lr_factor) for name in ("A", "B")}

    def make(self, slot: Slot, options: LowRankOptions, init_std: float):
        from crnet.linears.lowrank.module import LowRankLinear

        return LowRankLinear(slot, options.init, init_std)


METHODS = [LowRank()]
