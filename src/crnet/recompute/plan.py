"""What the forward pass keeps for the backward pass: policies, kept layers, the bound of invert.

No torch: the cost model reads it too.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Policy = Literal["none", "block", "invert", "replay"]
POLICIES: tuple[Policy, ...] = ("none", "block", "replay", "invert")
KeepAs = Literal["computed", "nf4"]
PACKING: tuple[Policy, ...] = ("none", "replay")
"""Policies under which what is kept may be packed (``RecomputePlan.keep_as``)."""

Added = dict[str, tuple[int, ...]]
"""Layers (1-based), by position."""


@dataclass(frozen=True)
class RecomputePlan:
    """What the forward pass keeps for the backward pass (``engine`` carries it out)."""

    policy: Policy = "none"
    kept_layers: tuple[int, ...] = ()
    """Layers (1-based) whose outputs are kept. invert: the set A of algorithm 1, the last layer
    always in it. replay: the tops of the segments, the last layer never needed."""
    keep_attention: bool = False
    """Keep the output of attention and its log-sum-exp instead of running attention again."""
    tolerance: float = 0.05
    """invert: largest relative error of a rebuilt output by ``invert_error``."""
    keep_as: KeepAs = "computed"
    """nf4: what blocks keep waits in four bits an item (``packed``)."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a policy that does not exist, or cannot pack: nothing would be
        recomputed, or packed."""
        if self.policy not in POLICIES:
            raise ValueError(f"policy {self.policy!r}; known are {', '.join(POLICIES)}")
        if self.is_packed and self.policy not in PACKING:
            raise ValueError(f"policy {self.policy!r} keeps nothing as {self.keep_as}")
        if self.is_packed and self.keep_attention:
            raise ValueError(f"attention is not kept as {self.keep_as}: it is run again")

    @property
    def is_packed(self) -> bool:
        return self.keep_as == "nf4"

    @property
    def is_plain(self) -> bool:
        """Whether autograd keeps everything as it is."""
        return self.policy == "none" and not self.is_packed


def within(plan: RecomputePlan, bottom: int, top: int) -> RecomputePlan:
    """The plan of blocks ``bottom`` to ``top`` (0-based, half open) alone, its layers counted from
    the first of them."""
    kept = tuple(layer - bottom for layer in plan.kept_layers if bottom < layer < top)
    return dataclasses.replace(plan, kept_layers=kept)


def segments(plan: RecomputePlan, num_layers: int) -> list[tuple[int, int]]:
    """(bottom, top) of ``replay``'s segments, 0-based and half open, from the bottom up."""
    tops = sorted({*plan.kept_layers, num_layers})
    return list(zip([0, *tops], tops, strict=False))


def inverted_layers(
    plan: RecomputePlan, num_layers: int, positions: Sequence[str], added: Added | None = None
) -> dict[str, tuple[int, ...]]:
    """The set A of each position (1-based): the plan's, the last layer, and what was added."""
    return {
        position: tuple(sorted({*plan.kept_layers, num_layers, *(added or {}).get(position, ())}))
        for position in positions
    }


def published_layers(num_layers: int) -> tuple[int, ...]:
    """The paper's set A without the last layer, which is always in it: every 8th."""
    return tuple(range(8, num_layers, 8))


def invert_error(gains: Sequence[float], unit: float) -> list[float]:
    """Bounds of the error of outputs rebuilt downwards by eq. 7, nearest to the kept one first.

    Args:
        gains: of the layers crossed, from the kept one down.
        unit: unit roundoff of the chain's dtype (half its epsilon).
    Returns:
        One bound a layer crossed: root mean square of the error over the largest root mean square
        among the outputs of the chain. Each crossing divides what came by the gain; what it adds
        is two roundings of its own before the division and three at the scale of the result.
    """
    error, bounds = 0.0, []
    for gain in gains:
        error = _crossed(error, gain, unit)
        bounds.append(error)
    return bounds


def _crossed(error: float, gain: float, unit: float) -> float:
    return (error + 2 * unit) / abs(gain) + 3 * unit if gain else math.inf


def guarded_layers(
    kept_layers: Sequence[int], gains: Sequence[float], unit: float, tolerance: float
) -> tuple[int, ...]:
    """The fewest layers to keep, the given ones among them, with every bound within tolerance.

    Args:
        kept_layers: 1-based; the last layer is always kept.
        gains: of layers 1 to L, at one position; the first is not read.
        unit, tolerance: ``invert_error``.
    """
    kept = {*kept_layers, len(gains)}
    bound = 0.0
    for layer in range(len(gains) - 1, 0, -1):
        bound = _crossed(bound, gains[layer], unit)  # that of the layer above: it is crossed
        if not (bound <= tolerance and math.isfinite(bound)):  # whatever the tolerance, never nan
            kept.add(layer)
        if layer in kept:
            bound = 0.0
    return tuple(sorted(kept))


def added_layers(
    plan: RecomputePlan, gains: Mapping[str, Sequence[float]], units: Mapping[str, float]
) -> Added:
    """What ``invert`` keeps beyond the plan because its error would pass the tolerance.

    Args:
        gains: by position, of layers 1 to L; the first is not read.
        units: by position, unit roundoff of what is carried.
    """
    found: Added = {}
    for position, row in gains.items():
        kept = guarded_layers(plan.kept_layers, row, units[position], plan.tolerance)
        extra = tuple(sorted({*kept} - {*plan.kept_layers, len(row)}))
        if extra:
            found[position] = extra
    return found


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Read a set of blocks, 1-based: ``4,8,12``, or ``every-8`` for 8, 16, ...

    Raises:
        ValueError: unreadable, or a block that the model does not have.
    """
    if match := re.fullmatch(r"every-([1-9]\d*)", text):
        every = int(match[1])
        return tuple(range(every, num_layers + 1, every))
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(
            f"--train.recompute-layers {text!r} cannot be read; write 4,8,12 or every-8"
        )
    layers = tuple(sorted({int(number) for number in text.split(",")}))
    if layers[0] < 1 or layers[-1] > num_layers:
        raise ValueError(
            f"--train.recompute-layers {text}: the model's blocks are 1 to {num_layers}"
        )
    return layers
