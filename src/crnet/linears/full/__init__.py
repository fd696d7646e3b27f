"""Full rank: every map is a dense matrix. The baseline of every comparison."""

from __future__ import annotations

from typing import Any

from crnet.linears import Group, Slot


class Full:
    name = "full"
    summary = "dense matrices (LLaMA)"
    carry = "none"
    first_ranked_layer_idx = 1 << 30  # above every block: no rank schedule applies
    published_ranks: dict[str, dict[tuple[int, int], str]] = {}

    def rank_below(self, options: Any) -> int:
        return 0

    def problems(self, options: Any) -> list[str]:
        return []

    def shapes(self, slot: Slot) -> dict[str, tuple[int, ...]]:
        return {"weight": (slot.out_size, slot.in_size)}

    def matrix_items(self, slot: Slot) -> int:
        return slot.in_size * slot.out_size

    def bottleneck(self, slot: Slot) -> int:
        return 0

    def carry_bytes(self, options: Any, compute_bytes: int) -> int:
        return compute_bytes

    def initial_gain(self, options: Any) -> float:
        return 1.0

    def groups(self, slot: Slot, options: Any) -> dict[str, Group]:
        return {"weight": Group()}

    def make(self, slot: Slot, options: Any, init_std: float):
        from crnet.linears.full.module import FullLinear

        return FullLinear(slot, init_std)


METHODS = [Full()]
