"""The seam between the model and the parameterizations of its linear maps.

One sub-package is one parameterization. Its ``__init__`` declares it (what it is called, which
slots are low rank, what it costs) and imports no torch; its ``module.py`` computes. What its
``METHODS`` lists is the whole interface: nothing above this folder names a parameterization.

A slot's module is called as ``module(x_BTD, carry)``. ``carry`` is an earlier block's output of the
same position, or None: ``Method.carry`` says which (``below``, ``first`` or ``none``), and a
parameterization that says ``none`` costs no memory for it.

For recomputation the module also comes apart. ``reduce(x)`` is the narrowest tensor that its output
follows from without x (a bottleneck; for a dense map the output itself), ``expand(reduced, carry)``
that output, bit for bit; ``recall(x, carry, (reduced, output))`` makes the node of the graph from
what is known. A module whose carry follows from its output has ``shrink(output, reduced)`` for that
and ``gain()``, the factor it divides by.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from crnet.registry import discover, find

if TYPE_CHECKING:
    from torch import nn

    from crnet.config.sections import ModelConfig

POSITIONS: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Slot:
    """One linear map of one block."""

    position: str
    layer_idx: int
    """0-based; the paper's l is this plus 1."""
    in_size: int
    out_size: int
    rank: int
    """0 where the map is full rank."""
    num_layers: int


@dataclass(frozen=True)
class Group:
    """How the optimizer treats one named parameter of a slot."""

    lr_factor: float = 1.0
    decays: bool = True


class Method(Protocol):
    """What a parameterization answers."""

    name: str
    summary: str
    carry: Literal["none", "below", "first"]
    first_ranked_layer_idx: int
    """The bottom-most block that a rank schedule speaks of."""
    published_ranks: Mapping[str, Mapping[tuple[int, int], str]]
    """``aligned-parameters`` ...: (hidden_size, num_layers) -> schedule, from a published table."""

    def rank_below(self, options: Any) -> int:
        """Rank of the blocks under ``first_ranked_layer_idx``; 0: full rank."""
        ...

    def problems(self, options: Any) -> list[str]:
        """What is wrong with the options, one sentence each."""
        ...

    def shapes(self, slot: Slot) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of the slot's module, by its name there."""
        ...

    def matrix_items(self, slot: Slot) -> int:
        """Items of the matrices that a row is multiplied with; each costs 2 FLOPs a row."""
        ...

    def bottleneck(self, slot: Slot) -> int:
        """Width of what ``reduce`` returns; 0 where that is the output itself."""
        ...

    def carry_bytes(self, options: Any, compute_bytes: int) -> int:
        """Of an item of the outputs of a slot that has a carry."""
        ...

    def initial_gain(self, options: Any) -> float:
        """What the carry is multiplied with before the first step; 1 where there is none."""
        ...

    def groups(self, slot: Slot, options: Any) -> dict[str, Group]:
        """The optimizer's treatment of each trained parameter of the module, by its name there."""
        ...

    def make(self, slot: Slot, options: Any, init_std: float) -> nn.Module:
        """The module: ``reset_parameters(generator)``, ``forward(x, carry)`` and its halves."""
        ...


def names() -> list[str]:
    """Every parameterization, sorted."""
    return sorted(discover(__name__))


def get(name: str) -> Method:
    """The parameterization of that name. Raises ``ValueError`` if there is none."""
    return find(__name__, name)


def slot_sizes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(input width, output width) of each position."""
    h, f = model.hidden_size, model.intermediate_size
    kv = (model.num_kv_heads or model.num_heads) * (h // model.num_heads)
    widths = ((h, h), (h, kv), (h, kv), (h, h), (h, f), (h, f), (f, h))
    return dict(zip(POSITIONS, widths, strict=True))


def slots(model: ModelConfig) -> list[Slot]:
    """Every slot of a model, block by block, in the order of ``POSITIONS``.

    Raises:
        ValueError: ``model.rank`` cannot be read, or speaks of another number of blocks.
    """
    method = get(model.linear)
    options = getattr(model, model.linear, None)
    ranked = range(method.first_ranked_layer_idx, model.num_layers)
    schedules = parse_ranks(
        model.rank,
        num_blocks=len(ranked),
        hidden_size=model.hidden_size,
        published={
            word: table[model.hidden_size, model.num_layers]
            for word, table in method.published_ranks.items()
            if (model.hidden_size, model.num_layers) in table
        },
    )
    below = method.rank_below(options)

    def rank(position: str, layer_idx: int) -> int:
        if layer_idx not in ranked:
            return below
        return schedules[position][layer_idx - ranked.start]

    return [
        Slot(position, layer_idx, in_size, out_size, rank(position, layer_idx), model.num_layers)
        for layer_idx in range(model.num_layers)
        for position, (in_size, out_size) in slot_sizes(model).items()
    ]


def num_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters in closed form: embedding, head, norms and each position; their sum is the total.

    ``model.vocab_size`` must be known. Cost: no tensor is made.
    """
    assert model.vocab_size, "the vocabulary size is resolved before parameters are counted"
    method = get(model.linear)
    table = model.vocab_size * model.hidden_size
    counts = {
        "embedding": table,
        "head": 0 if model.tie_embeddings else table,
        "norms": (2 * model.num_layers + 1) * model.hidden_size,
    } | dict.fromkeys(POSITIONS, 0)
    for slot in slots(model):
        counts[slot.position] += sum(math.prod(it) for it in method.shapes(slot).values())
    return counts


def parse_ranks(
    text: str, *, num_blocks: int, hidden_size: int, published: Mapping[str, str]
) -> dict[str, list[int]]:
    """Read a rank schedule: ``96``, ``96x3,112x4``, ``0.25h``, ``96x7/v=128x7``, a table's name.

    Returns: position -> one rank per block that the schedule speaks of, bottom first.
    Raises:
        ValueError: unreadable, a rank below 1, or not one rank per block.
    """
    if num_blocks <= 0:
        return {position: [] for position in POSITIONS}
    common, *apart = text.split("/")
    if common.startswith("aligned-"):
        if common not in published:
            raise ValueError(
                f"--model.rank {common}: no published table gives ranks of this shape; "
                "give numbers, for example 0.25h or 96x3,112x4"
            )
        common = published[common]
    schedules = {
        position: _parse_schedule(common, num_blocks, hidden_size) for position in POSITIONS
    }
    given: set[str] = set()
    for part in apart:
        position, _, schedule = part.partition("=")
        if position in given:
            raise ValueError(f"--model.rank {text} gives {position} twice; leave one out")
        given.add(position)
        if position not in POSITIONS:
            raise ValueError(
                f"--model.rank {text}: {position!r} is no position; known: {', '.join(POSITIONS)}"
            )
        schedules[position] = _parse_schedule(schedule, num_blocks, hidden_size)
    return schedules


def _parse_schedule(text: str, num_blocks: int, hidden_size: int) -> list[int]:
    ranks: list[int] = []
    parts = text.split(",")
    for part in parts:
        match = re.fullmatch(r"(\d+|\d*\.\d+h)(?:x(\d+))?", part.strip())
        if not match:
            raise ValueError(
                f"--model.rank: {part.strip()!r} cannot be read; write 96, 96x3,112x4, 0.25h, "
                "aligned-parameters or aligned-memory"
            )
        size = match[1]
        rank = round(float(size[:-1]) * hidden_size) if size.endswith("h") else int(size)
        if rank < 1:
            raise ValueError(f"--model.rank: {part.strip()!r} is a rank of {rank}; take 1 or more")
        if match[2] and int(match[2]) == 0:
            raise ValueError(f"--model.rank: {part.strip()!r} is a rank for no block; leave it out")
        ranks += [rank] * (int(match[2]) if match[2] else 1)
    if len(parts) == 1 and len(ranks) == 1 and "x" not in text:
        ranks *= num_blocks
    if len(ranks) != num_blocks:
        raise ValueError(
            f"--model.rank {text} gives {len(ranks)} ranks, but {num_blocks} blocks are low rank; "
            f"{ranks[0]} alone would serve all of them"
        )
    return ranks
