"""The seam of the linear maps: one folder (or file) is one parameterization.

A method's ``__init__`` declares it and imports no torch; its ``module.py`` computes. What this file
asks for is the whole interface: nothing above this folder names a parameterization. Parts that
methods share stand in ``_declarations.py`` (no torch) and ``_maps.py``.

A map is called as ``map(x, carry) -> (output, handed)``. ``carry`` is what the same position of an
earlier block handed on, or None: ``Parameterization.reads`` says which, and a map that reads
nothing costs no memory for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crnet.registry import discover, find
from crnet.specs import Position, Read, Shape, Slot, Split, TensorSpec, Work

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from crnet.linears._maps import LinearMap


class Parameterization:
    """What a parameterization answers; a method states only what differs."""

    name: str
    summary: str
    """One line for ``crnet list`` and ``--help``."""
    Options: type | None = None
    """A frozen dataclass; its fields become ``--model.NAME.OPTION``."""
    examples: tuple[Any, ...] = ()
    """More ``Options`` that the contract is checked with (``measure.contract``)."""
    published_ranks: Mapping[str, Mapping[tuple[int, int], str]] = {}
    """A word of ``--model.rank``: (hidden_size, num_layers) -> schedule, as published."""
    has_ranks: bool = True
    """Whether ``--model.rank`` has an effect."""
    takes_dense: bool = False
    """Whether a map can begin as any matrix: ``from_dense``."""
    looks: bool = False
    """Whether maps look at what they read of the first rows of the first batch, before the events
    of step 0 (``LinearMap.look``)."""
    pads: bool = False
    """Whether a map may be stored wider, its tensors filled up with zeros: an input of 0 and a
    gradient of 0 leave the zeros as they are, and no number is drawn by a tensor's shape."""

    def can_pad(self, options: Any) -> bool:
        """``pads``, where an option decides."""
        return self.pads

    def of(self, slot: Slot) -> Parameterization:
        """Who answers for a slot: this method, or ``operator`` for the output of an operator."""
        return self.operator() if slot.is_operator else self

    def operator(self) -> Parameterization:
        """Answers for the output of an operator of several maps (``specs.Position.is_operator``).
        The maps of its experts read nothing: what an expert of an earlier block handed on is of
        other tokens. By default the output is handed on as it is."""
        return UNCHANGED

    def problems(self, options: Any, slots: Sequence[Slot]) -> list[str]:
        """What is wrong with options and slots, one sentence each, with the mend."""
        return []

    def fixed_rank(self, layer_idx: int, options: Any) -> int | None:
        """Rank of a block of which no schedule speaks; 0: full rank. None: scheduled."""
        return None

    def tensors(self, slot: Slot, options: Any) -> dict[str, TensorSpec]:
        """The parameters of a slot's map, by their name there."""
        raise NotImplementedError

    def shared(self, slot: Slot, options: Any) -> dict[str, TensorSpec]:
        """Parameters that the maps of a position share, the same for every block: the model has
        them once (``ModelSpec.shared_name``), and a map finds them in ``LinearMap.shared``."""
        return {}

    def work(self, slot: Slot, options: Any, rows: int, item_bytes: int) -> Work:
        """What a slot's map does with so many rows, items of the compute dtype so wide."""
        raise NotImplementedError

    def reads(self, slot: Slot, options: Any) -> Read | None:
        """What the map reads of an earlier block."""
        return None

    def split(self, slot: Slot, options: Any) -> Split | str:
        """How processes share the map, each with a part of its columns or rows; or why they cannot,
        half a sentence. A map adds up by ``LinearMap.sums``. A method with events cannot: they want
        whole tensors."""
        return "it does not say where the parts of its maps are added up"

    def output_bytes(self, slot: Slot, options: Any, item_bytes: int) -> int:
        """Of an item of the output, items of the compute dtype so wide."""
        return item_bytes

    def keeps_activation(self, shape: Shape, options: Any) -> bool:
        """Whether the feed-forward keeps the activation of the architecture."""
        return True

    def events(self, step: int, options: Any) -> tuple[str, ...]:
        """What is due once ``step`` optimizer steps are done: a pure function of the step."""
        return ()

    def has_events(self, options: Any) -> bool:
        """Whether anything is ever due."""
        return type(self).events is not Parameterization.events

    def compares_moments(self, options: Any) -> bool:
        """Whether an event keeps the largest moments (``specs.Forget``), so that they must be
        numbers (``OptimizerMethod.has_codes``)."""
        return False

    def options_at(self, step: int, num_steps: int, options: Any) -> Any:
        """The options of a model that began with ``options`` and has trained for ``step`` steps of
        a run of ``num_steps``: a pure function. A checkpoint stores these, so that it is read
        without the step. At step 0: with whatever hangs on the run's length worked out.

        Their tensors may be fewer than before, never others: the model and the optimizer drop the
        rest (``LinearMap.take``). Ranks and carries stay."""
        return options

    def from_dense(
        self, slot: Slot, options: Any, weight_FD: Tensor, values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors, fp32 on the CPU, of a map that multiplies with this matrix, for a run that
        begins with full-rank weights (``takes_dense``). ``values``: its initial ones."""
        raise NotImplementedError

    def initial_value(
        self, name: str, slot: Slot, options: Any, generator: Callable[[str], Generator]
    ) -> Tensor:
        """Value of a tensor whose ``init`` is ``OWN``, fp32 or int32, on the CPU.

        ``generator(word)``: a new generator, seeded by the run, the map's full name and the word.
        """
        raise NotImplementedError

    def make(self, slot: Slot, options: Any) -> LinearMap:
        """The module, its parameters registered from ``tensors`` and not yet filled."""
        raise NotImplementedError


class _Unchanged(Parameterization):
    """The output of an operator as it is: no tensor, no product."""

    def tensors(self, slot, options):
        return {}

    def work(self, slot, options, rows, item_bytes):
        return Work(0, 0, 0, keeps_input=False)

    def make(self, slot, options):
        from crnet.linears._maps import SameMap

        return SameMap({})


UNCHANGED = _Unchanged()


def names() -> list[str]:
    """Every parameterization, sorted."""
    return sorted(discover(__name__, Parameterization))


def get(name: str) -> Parameterization:
    """The parameterization of that name. Raises ``ValueError`` if there is none."""
    return find(__name__, name, Parameterization)


def make_slots(
    method: Parameterization,
    options: Any,
    shape: Shape,
    positions: Sequence[Position],
    rank: str,
) -> tuple[tuple[Slot, ...], ...]:
    """Every slot of a model, block by block, in the order of its positions.

    Raises:
        ValueError: ``rank`` cannot be read, or speaks of another number of blocks.
    """
    fixed = [method.fixed_rank(idx, options) for idx in range(shape.num_layers)]
    scheduled = [idx for idx, each in enumerate(fixed) if each is None]
    key = (shape.hidden_size, shape.num_layers)
    schedules = parse_ranks(
        rank,
        num_blocks=len(scheduled),
        hidden_size=shape.hidden_size,
        published={word: table.get(key) for word, table in method.published_ranks.items()},
        positions=tuple(dict.fromkeys(each.kind for each in positions if not each.is_operator)),
    )
    ranks = {idx: iter_idx for iter_idx, idx in enumerate(scheduled)}

    def rank_of(position: Position, layer_idx: int) -> int:
        given = 0 if position.is_operator else fixed[layer_idx]
        return schedules[position.kind][ranks[layer_idx]] if given is None else given

    return tuple(
        tuple(
            Slot(
                position.name,
                layer_idx,
                shape.num_layers,
                position.in_size,
                position.out_size,
                rank_of(position, layer_idx),
                shape.init_std,
                position.head_size,
                position.expert,
                position.is_operator,
            )
            for position in positions
        )
        for layer_idx in range(shape.num_layers)
    )


def parse_ranks(
    text: str,
    *,
    num_blocks: int,
    hidden_size: int,
    published: Mapping[str, str | None],
    positions: Sequence[str],
) -> dict[str, list[int]]:
    """Read a rank schedule: ``96``, ``96x3,112x4``, ``0.25h``, ``96x7/v=128x7``, a table's name.

    ``published``: schedules by their word; None where that word has none for this shape.
    Returns: position -> one rank per block that the schedule speaks of, bottom first.
    Raises:
        ValueError: unreadable, a rank below 1, or not one rank per block.
    """
    if num_blocks <= 0:
        return {position: [] for position in positions}
    common, *apart = text.split("/")
    if common in published or common.startswith("aligned-"):
        if (schedule := published.get(common)) is None:
            raise ValueError(
                f"--model.rank {common}: no published table gives ranks of this shape; "
                "give numbers, for example 0.25h or 96x3,112x4"
            )
        common = schedule
    schedules = {
        position: _parse_schedule(common, num_blocks, hidden_size) for position in positions
    }
    given: set[str] = set()
    for part in apart:
        position, _, schedule = part.partition("=")
        if position in given:
            raise ValueError(f"--model.rank {text} gives {position} twice; leave one out")
        given.add(position)
        if position not in positions:
            raise ValueError(
                f"--model.rank {text}: {position!r} is no position; known: {', '.join(positions)}"
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
        count = int(match[2] or 1)
        if count > num_blocks:  # before a slip makes a list without end
            raise ValueError(_not_one_each(text, len(ranks) + count, num_blocks, rank))
        ranks += [rank] * count
    if len(parts) == 1 and len(ranks) == 1 and "x" not in text:
        ranks *= num_blocks
    if len(ranks) != num_blocks:
        raise ValueError(_not_one_each(text, len(ranks), num_blocks, ranks[0]))
    return ranks


def _not_one_each(text: str, num_ranks: int, num_blocks: int, rank: int) -> str:
    return (
        f"--model.rank {text} gives {num_ranks} ranks, but {num_blocks} blocks are low rank; "
        f"{rank} alone would serve all of them"
    )
