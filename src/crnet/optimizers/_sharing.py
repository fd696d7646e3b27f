"""Who holds what of a model whose tensors are split over processes; no torch.

A tensor is split by rows, as ``torch.chunk`` does: parts of one size, the last ones smaller, or
empty. A matrix that its optimizer needs whole has one owner among the processes that split it: the
owner has its state and computes its step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from crnet.specs import TensorSpec

if TYPE_CHECKING:
    from crnet.optimizers import OptimizerMethod


def part_of(spec: TensorSpec, rank: int, num_ranks: int) -> TensorSpec:
    """A rank's part of a tensor of one dimension or more."""
    rows, *rest = spec.shape
    size = -(-rows // num_ranks)
    part = max(0, min(size, rows - rank * size))
    return dataclasses.replace(spec, shape=(part, *rest))


def owners(
    method: OptimizerMethod, options: Any, trained: Mapping[str, TensorSpec], num_ranks: int
) -> dict[str, int]:
    """The rank that owns each tensor that the method needs whole, by full name.

    The largest goes first, each to the rank that has the fewest items so far; names and ranks
    decide where numbers do not. So no rank has more than a fair share and one tensor besides.
    Returns: in the order in which they were given out.
    """
    whole = {name: spec for name, spec in trained.items() if method.whole(spec, options)}
    loads, found = [0] * num_ranks, {}
    for name, spec in sorted(whole.items(), key=lambda each: (-each[1].num_items, each[0])):
        found[name] = rank = loads.index(min(loads))
        loads[rank] += spec.num_items
    return found
