"""Adam in a subspace of every dense matrix: what the methods of GaLore's family share.

The gradient G (m, n) is projected along its smaller side onto r directions, the moments are those
of the projection R, and Adam's direction of R goes back to the whole matrix. A method says how the
directions are found and what a step is made of; how others are trained is the same for all: Adam.

Of the role ``matrix`` alone: embedding, head, factors and norms are never projected. No torch here:
``module`` computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from crnet.optimizers import OptimizerMethod
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class SubspaceOptions:
    """Options that all methods have."""

    rank: int = 128
    """Rank of the projected gradient (a quarter of the width in the published runs); of a matrix
    with fewer rows or columns, as many as it has."""
    refresh_every: int = 200
    """Steps between two projections of a matrix."""
    stagger: bool = False
    """Refresh one matrix a step in turn, where there are no more of them than steps between two
    refreshes; else all at once. The first step projects them all in either case."""

    def rank_of(self, spec: TensorSpec) -> int:
        """Rank of the projected gradient of a matrix."""
        return min(self.rank, *spec.shape)


class SubspaceMethod(OptimizerMethod):
    """A method states its options and builds its own ``SubspaceAdam``."""

    def problems(self, options: Any) -> list[str]:
        flag, found = f"--optimizer.{self.name}", []
        for name in ("rank", "refresh_every"):
            if getattr(options, name) < 1:
                word = name.replace("_", "-")
                found.append(f"{flag}.{word} is {getattr(options, name)}; take 1 or more")
        if not getattr(options, "scale", 1) > 0:
            found.append(f"{flag}.scale is {options.scale}; it must be above zero")
        if options.stagger and options.refresh_every == 1:
            found.append(f"{flag}.stagger has no effect where every step is a refresh; say false")
        return found

    def state_bytes(self, spec: TensorSpec, options: Any, item_bytes: int) -> int:
        if spec.role != "matrix":
            return 2 * spec.num_items * item_bytes
        rank = options.rank_of(spec)
        return rank * (2 * max(spec.shape) + min(spec.shape)) * item_bytes  # moments, projection

    def whole(self, spec: TensorSpec, options: Any) -> bool:
        return spec.role == "matrix"


def offsets(names: Iterable[str], every: int) -> dict[str, int]:
    """At which of ``every`` steps each matrix is refreshed, by full name.

    From the number of a matrix's block and its place among the maps of a block, in the order of
    their names: so it is the same whatever the order of the parameters, and the same in a stage of
    a pipeline whose blocks have the maps of all others.
    """
    parts = {name: _block_and_map(name) for name in names}
    maps = sorted({each for _, each in parts.values()})
    place = {each: idx for idx, each in enumerate(maps)}
    return {
        name: (block_idx * len(maps) + place[each]) % every
        for name, (block_idx, each) in parts.items()
    }


def _block_and_map(name: str) -> tuple[int, str]:
    words = name.split(".")
    for idx, word in enumerate(words):
        if word.isdigit():
            return int(word), ".".join([*words[:idx], "", *words[idx + 1 :]])
    return 0, name
