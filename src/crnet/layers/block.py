"""A block: sublayers between the reads and writes of a stream.

    state -> read -> x -> sublayer -> y -> write -> state

What a block gets and returns is a flat row of tensors, so that sharding, compilation and
checkpointing of torch see them: first the stream's state, then one carry for each position that
reads an earlier block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from crnet.layers.projector import Projector

State = tuple[Tensor, ...]
Sublayer = Callable[[Tensor, Any, Any], Tensor]
"""(x, projector, context) -> y."""


class Block(nn.Module):
    """One block of a model; an architecture says what its sublayers are.

    Attributes, set by ``prepare``:
        reads: by position, which earlier block hands it a carry (``below`` or ``first``).
        hands: positions whose hand-on a later block reads; returned behind the state.
        writes: whose output each sublayer writes.
        streams: one a sublayer: ``read(state)`` and ``write(state, y)``.
        as_map: how a module that somebody put in a map's place is called as one,
            ``as_map(module, is_read)``; None: nobody does (``adapters``).
    """

    as_map: Any = None

    reads: Mapping[str, str]
    hands: tuple[str, ...]
    writes: tuple[str, ...]
    layer_idx: int

    def prepare(
        self,
        layer_idx: int,
        maps: Mapping[str, nn.Module],
        paths: Mapping[str, str],
        streams: Sequence[nn.Module],
        writes: Sequence[str],
        reads: Mapping[str, str],
        hands: Sequence[str],
    ) -> None:
        """Take the maps, each at its path, and the stream's modules."""
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for position, path in paths.items():
            parent, _, name = path.rpartition(".")
            self._places[position] = self.get_submodule(parent), name
            self.get_submodule(parent).add_module(name, maps[position])
        self.streams = nn.ModuleList(streams)
        self.layer_idx = layer_idx
        self.reads = dict(reads)
        self.writes, self.hands = tuple(writes), tuple(hands)

    @property
    def maps(self) -> Mapping[str, Any]:
        """The linear map of each position: the module that is at its path now."""
        found = {position: getattr(*place) for position, place in self._places.items()}
        if self.as_map is None:
            return found
        return {name: self.as_map(each, name in self.hands) for name, each in found.items()}

    def read_parameters(self) -> list[Tensor]:
        """Its own parameters, and those that its maps share with other blocks."""
        holders = [linear.shared for linear in self.maps.values()]
        shared = [each.parameters() for each in holders if each is not None]
        return [*self.parameters(), *itertools.chain(*shared)]

    def around(self) -> list[Any]:
        """The stream's module around each sublayer."""
        return list(self.streams)

    def sublayers(self) -> tuple[Sublayer, ...]:
        """What is computed between a read and a write, in order."""
        raise NotImplementedError

    def forward(self, context: Any, *tensors: Tensor, run: Any = None) -> tuple[Tensor, ...]:
        """Return the new state, and what later blocks read of ``hands``.

        Args:
            context: what the architecture made for these tokens (rotary tables, caches).
            tensors: the state, then a carry for each of ``reads``.
            run: a recomputation's way to run this block, ``run(block, context, tensors)``.
        """
        if run is not None:
            return run(self, context, tensors)
        state, carries = self.split(tensors)
        projector = Projector(self.maps, carries, self.hands)
        state = self.run(state, projector, context)
        return (*state, *(projector.handed[position] for position in self.hands))

    def split(self, tensors: Sequence[Tensor]) -> tuple[State, dict[str, Tensor]]:
        """State and carries of what ``forward`` gets."""
        count = len(tensors) - len(self.reads)
        return tuple(tensors[:count]), dict(zip(self.reads, tensors[count:], strict=True))

    def run(
        self, state: State, projector: Any, context: Any, *, without_last_write: bool = False
    ) -> State:
        """Every sublayer, its maps by ``projector``."""
        parts = zip(self.sublayers(), self.around(), self.writes, strict=True)
        for sublayer, stream, position in parts:
            y_BTD = sublayer(stream.read(state), projector, context)
            projector.wrote(position, y_BTD)
            if without_last_write and position == self.writes[-1]:
                return state
            state = stream.write(state, y_BTD)
            del y_BTD  # the next sublayer needs its memory
        return state

    def rebuild_state(self, state: State, written: Mapping[str, Tensor]) -> State:
        """The state that leaves the block, from the one that enters it and what is written."""
        for stream, position in zip(self.around(), self.writes, strict=True):
            state = stream.write(state, written[position])
        return state


class Carries:
    """What blocks have handed on so far: the one place that knows who reads what."""

    def __init__(self, known: Mapping[tuple[str, str], Tensor] | None = None):
        """``known``: by (source, position), what ``needed`` returned."""
        self._tensors: dict[tuple[str, str], Tensor] = dict(known or {})

    def of(self, block: Block) -> tuple[Tensor, ...]:
        """The carry of each position that the block reads, in the order of its ``reads``."""
        return tuple(self._tensors[source, position] for position, source in block.reads.items())

    def below(self, position: str) -> Tensor:
        """What the latest block handed on."""
        return self._tensors["below", position]

    def take(self, block: Block, returned: Sequence[Tensor]) -> State:
        """Note what a block handed on; return its state."""
        count = len(returned) - len(block.hands)
        handed = dict(zip(block.hands, returned[count:], strict=True))
        sources = ("first", "below") if block.layer_idx == 0 else ("below",)
        kept = {key: tensor for key, tensor in self._tensors.items() if key[0] not in sources}
        new = {(source, name): tensor for source in sources for name, tensor in handed.items()}
        self._tensors = kept | new
        return tuple(returned[:count])

    def at(self, keys: Sequence[tuple[str, str]]) -> tuple[Tensor, ...]:
        """What was handed on, by (source, position)."""
        return tuple(self._tensors[key] for key in keys)

    def needed(self, blocks: Sequence[Block]) -> dict[tuple[str, str], Tensor]:
        """What successive blocks read of those below the first of them."""
        keys = [("below", name) for name, each in blocks[0].reads.items() if each == "below"]
        if blocks[0].layer_idx:
            keys += [("first", name) for name, each in blocks[-1].reads.items() if each == "first"]
        return {key: self._tensors[key] for key in keys}


def run_blocks(
    blocks: Sequence[Block],
    state: State,
    context: Any,
    carries: Carries | None = None,
    run: Any = None,
) -> State:
    """The plain runner: every block in order, everything kept.

    Args:
        carries: what earlier blocks handed on, and afterwards what these did; None: they are first.
        run: as ``Block.forward``'s.
    """
    carries = Carries() if carries is None else carries
    for block in blocks:
        state = carries.take(block, block(context, *state, *carries.of(block), run=run))
    return state
