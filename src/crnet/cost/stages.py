"""A model in stages: which blocks, tensors and FLOPs each has, and what crosses between them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from crnet.config.model_spec import ModelSpec
from crnet.cost.micro_batch import MicroBatch
from crnet.specs import TensorSpec

Direction = Literal["forward", "backward"]
"""Of a pass through a stage."""
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclass(frozen=True)
class Stage:
    """A run of blocks, ``bottom`` to ``top`` (0-based, half open)."""

    idx: int
    num_stages: int
    bottom: int
    top: int

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding."""
        return self.idx == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the last read, the norm, the head and the loss."""
        return self.idx == self.num_stages - 1


@dataclass(frozen=True)
class Crossing:
    """One tensor that a stage gets of the one below, (B, T, width)."""

    source: str
    """``state``: of the stream; else whose hand-on it is, as ``Read.source``."""
    position: str
    width: int
    item_bytes: int


def cut(spec: ModelSpec, num_stages: int, length: int) -> tuple[Stage, ...]:
    """Cut a model into stages whose largest has as few FLOPs as can be.

    Among those with the same largest stage: the ones most alike, and then the smaller ones first,
    which under 1F1B keep the most micro-batches alive. Where at least ``num_stages - 1`` blocks
    read nothing but the stream, stages begin at such blocks alone.

    Args:
        length: tokens of a row: attention's FLOPs depend on it.
    Raises:
        ValueError: more stages than blocks.
    """
    num_layers = spec.num_layers
    if num_stages > num_layers:
        raise ValueError(f"{num_layers} blocks make no {num_stages} stages")
    costs = block_flops(spec, length)
    free = [idx for idx in range(1, num_layers) if not spec.reads[idx]]
    carried = any(spec.reads)
    starts = free if carried and len(free) >= num_stages - 1 else list(range(1, num_layers))
    bounds = [0, *starts, num_layers]
    parts = [sum(costs[low:high]) for low, high in itertools.pairwise(bounds)]
    sizes = _fill(parts, num_stages)
    ends = [bounds[sum(sizes[: idx + 1])] for idx in range(num_stages)]
    return tuple(
        Stage(idx, num_stages, bottom, top)
        for idx, (bottom, top) in enumerate(itertools.pairwise([0, *ends]))
    )


def block_flops(spec: ModelSpec, length: int) -> list[int]:
    """Forward and backward FLOPs of each block with one row of tokens; the head counts for the
    last."""
    micro_batch = MicroBatch(spec, 1, length)
    inside = micro_batch.inside
    found = []
    for block in micro_batch.blocks:
        works = [*block.works.values(), *block.streams]
        found.append(
            sum(work.forward_flops + work.backward_flops for work in works)
            + inside.forward_flops
            + inside.backward_flops
        )
    found[-1] += 6 * length * spec.shape.hidden_size * spec.shape.vocab_size
    return found


def _fill(parts: Sequence[int], num_stages: int) -> list[int]:
    """How many successive parts each stage gets, bottom first: the largest sum is the least, and
    then the sum of squares. Cost: ``num_stages len(parts)^2`` sums."""
    low, high = max(parts), sum(parts)
    while low < high:
        middle = (low + high) // 2
        if _num_filled(parts, middle) <= num_stages:
            high = middle
        else:
            low = middle + 1
    below = [0, *itertools.accumulate(parts)]
    # By the number of parts so far: the least sum of squares, and where the stages end.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for _ in range(num_stages):
        longer: dict[int, tuple[int, tuple[int, ...]]] = {}
        for start, (squares, ends) in best.items():
            for end in range(start + 1, len(parts) + 1):
                if (size := below[end] - below[start]) > low:
                    break
                each = (squares + size * size, (*ends, end))
                longer[end] = min(longer.get(end, each), each)
        best = longer
    ends = best[len(parts)][1]
    return [end - start for start, end in itertools.pairwise((0, *ends))]


def _num_filled(parts: Sequence[int], most: int) -> int:
    """Stages that it takes where none has more than ``most``."""
    number, total = 1, 0
    for part in reversed(parts):
        if total + part > most:
            number, total = number + 1, 0
        total += part
    return number


def held(spec: ModelSpec, stages: Sequence[Stage]) -> frozenset[str]:
    """Full names of the tensors of some stages: of their blocks, around the blocks those of the
    embedding in the first, of the last read, norm and head in the last."""
    return frozenset(name for each in by_stage(stages, spec.whole().tensors) for name in each)


def by_stage(
    stages: Sequence[Stage], tensors: Mapping[str, TensorSpec]
) -> list[dict[str, TensorSpec]]:
    """Those of the tensors that each of some stages holds, as ``held`` says, by full name."""
    of_block = {at: idx for idx, each in enumerate(stages) for at in range(each.bottom, each.top)}
    first = next((idx for idx, stage in enumerate(stages) if stage.is_first), None)
    last = next((idx for idx, stage in enumerate(stages) if stage.is_last), None)
    found: list[dict[str, TensorSpec]] = [{} for _ in stages]
    for name, tensor in tensors.items():
        words = name.split(".")
        if words[1] == "layers":
            idx = of_block.get(int(words[2]))
        else:
            idx = last if words[0] == "lm_head" or words[1] in AT_THE_END else first
        if idx is not None:
            found[idx][name] = tensor
    return found


AT_THE_END = ("last_read", "norm")
"""Modules of ``model`` behind the last block."""


def boundary(micro_batch: MicroBatch, bottom: int) -> list[Crossing]:
    """What the stage that begins with block ``bottom`` gets of those below: the stream's state,
    what this block reads of the one below, and what any block from here on reads of the first."""
    spec, blocks = micro_batch.spec, micro_batch.blocks
    h = spec.shape.hidden_size
    written = [block.items[name] for block in blocks[:bottom] for name in block.writes]
    where = (len(written), spec.num_sublayers, spec.shape, spec.stream_options)
    state = spec.stream.crossing(*where, micro_batch.stream_bytes, written)
    found = [Crossing("state", str(idx), h, item) for idx, item in enumerate(state)]
    for source, reader, giver in (("below", bottom, bottom - 1), ("first", -1, 0)):
        for position, read in spec.reads[reader].items():
            if read.source == source:
                is_output = read.of == "output"
                item = blocks[giver].items[position] if is_output else micro_batch.compute_bytes
                found.append(Crossing(source, position, read.width, item))
    return found


def boundary_bytes(micro_batch: MicroBatch, bottom: int) -> int:
    """Bytes of ``boundary``, one micro-batch, one pass; with a gradient for each tensor, as many
    again cross back."""
    crossing = boundary(micro_batch, bottom)
    return micro_batch.rows * sum(each.width * each.item_bytes for each in crossing)


def in_flight(stage: Stage, num_processes: int, num_micro_batches: int) -> int:
    """Most micro-batches of a stage whose backward pass is still to come.

    1F1B (a stage a process): as many as there are stages from this one on. Interleaved (Narayanan
    et al., 2021, figure 4): process p begins with ``(chunks - 1) P + 2 (P - p - 1)`` forward passes
    and then one more before each backward pass, P micro-batches of a stage at a time.
    """
    chunks = stage.num_stages // num_processes
    if chunks == 1:
        return min(num_micro_batches, stage.num_stages - stage.idx)
    chunk, process = divmod(stage.idx, num_processes)
    return max(_interleaved(process, chunk, chunks, num_processes, num_micro_batches))


def _interleaved(process: int, chunk: int, chunks: int, processes: int, number: int) -> list[int]:
    """After each forward pass of a process: how many micro-batches of one of its stages wait."""
    turn, total = chunks * processes, chunks * number
    ahead = min(total, (chunks - 1) * processes + 2 * (processes - process - 1))
    forward = [(step % turn) // processes for step in range(total)]
    begun = list(itertools.accumulate(each == chunk for each in forward))
    ended = list(itertools.accumulate(chunks - 1 - each == chunk for each in forward))
    return [begun[step] - (ended[step - ahead - 1] if step > ahead else 0) for step in range(total)]
