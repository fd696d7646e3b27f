"""Who holds what of a model whose tensors are split over processes, and what is stepped at once; no
torch.

A tensor is split by rows, as ``torch.chunk`` does: parts of one size, the last ones smaller, or
empty. A matrix that its optimizer needs whole has one owner among the processes that split it: the
owner has its state and computes its step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
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


def partner_of(name: str, spec: TensorSpec) -> str | None:
    """Full name of the other factor of a tensor's pair."""
    return None if spec.partner is None else name.rpartition(".")[0] + "." + spec.partner


def pairs(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """``factor_out`` of each ``factor_in``, by full name, where both are among ``specs``."""
    found = {name: partner_of(name, spec) for name, spec in specs.items()}
    return {
        name: other
        for name, other in found.items()
        if other is not None and other in specs and specs[name].role == "factor_in"
    }


def stepped_at_once(
    method: OptimizerMethod, specs: Mapping[str, TensorSpec]
) -> list[tuple[str, ...]]:
    """Each tensor's full name, alone or with that of its partner (``steps_pairs``), in order."""
    return together(specs, pairs(specs) if method.steps_pairs else {})


def together(names: Iterable[str], partners: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Each name, alone or with its partner, in order. ``partners``: the second of each first."""
    seconds = set(partners.values())
    return [
        (name, partners[name]) if name in partners else (name,)
        for name in names
        if name not in seconds
    ]


def owners(
    method: OptimizerMethod, options: Any, trained: Mapping[str, TensorSpec], num_ranks: int
) -> dict[str, int]:
    """The rank that owns each tensor that the method needs whole, by full name; what is stepped at
    once has one owner.

    The largest goes first, each to the rank that has the fewest items so far; names and ranks
    decide where numbers do not. So no rank has more than a fair share and one tensor, or pair,
    besides.
    Returns: in the order in which they were given out.
    """
    whole = {name: spec for name, spec in trained.items() if method.whole(spec, options)}

    def num_items(unit: tuple[str, ...]) -> int:
        return sum(whole[name].num_items for name in unit)

    loads, found = [0] * num_ranks, {}
    units = stepped_at_once(method, whole)
    for unit in sorted(units, key=lambda each: (-num_items(each), each)):
        rank = loads.index(min(loads))
        found.update(dict.fromkeys(unit, rank))
        loads[rank] += num_items(unit)
    return found
