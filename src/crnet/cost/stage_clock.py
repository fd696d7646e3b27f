"""``clock.stage_seconds`` for a search: of a model in parts too, and blocks that are alike priced
once.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from crnet.cost import traffic
from crnet.cost.clock import Clock, Way, attention_seconds, second_run
from crnet.cost.micro_batch import BlockBytes
from crnet.cost.stages import Stage, by_stage
from crnet.recompute.plan import RecomputePlan
from crnet.specs import Passes, TensorSpec


@dataclass(frozen=True)
class Seconds:
    """Of one micro-batch."""

    forward_s: float
    backward_s: float

    @property
    def both_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class _Direction:
    """Of one pass through a block or a stage: seconds, operations that the host issues."""

    seconds: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: _Direction) -> _Direction:
        return _Direction(self.seconds + other.seconds, self.kernels + other.kernels)


def stage_seconds(
    clock: Clock,
    plan: RecomputePlan,
    way: Way,
    stages: Sequence[Stage],
    tensors: Mapping[str, TensorSpec],
) -> list[Seconds]:
    """Of each stage, one micro-batch; those of ``clock.stage_seconds`` where nothing is in parts.

    Args:
        stages: together all blocks; one stage is the whole model.
        tensors: as a process stores them, by full name.
    """
    repeated_frac = second_run(clock.micro_batch, plan)
    known: dict[Hashable, tuple[_Direction, _Direction]] = {}
    blocks = []
    for block in clock.micro_batch.blocks:
        if (key := _kind(block)) not in known:
            known[key] = _block(clock, plan, way, block, repeated_frac)
        blocks.append(known[key])
    found = []
    for stage, mine in zip(stages, by_stage(stages, tensors), strict=True):
        outside = _outside(clock, way, stage, list(mine.values()))
        each_way = zip(*blocks[stage.bottom : stage.top], outside, strict=True)
        ahead, back = (sum(each, _Direction()) for each in each_way)
        # An eager pass takes no less than the host needs to issue it.
        issue = clock.device.issue_s if way == "eager" else 0.0
        slower = [max(each.seconds, each.kernels * issue) for each in (ahead, back)]
        found.append(Seconds(*slower))
    return found


def _kind(block: BlockBytes) -> Hashable:
    """What a block's seconds follow from."""
    return (
        tuple(block.works.items()),
        tuple(block.streams),
        tuple(block.items.items()),
        tuple((name, *reads) for name, reads in block.readers.items()),
    )


def _block(
    clock: Clock, plan: RecomputePlan, way: Way, block: BlockBytes, repeated_frac: float
) -> tuple[_Direction, _Direction]:
    """Forward and backward, without what weights move."""
    works, runs_again = list(block.works.values()), plan.policy != "none"
    ahead = sum(clock.of_map(each, each.products, each.forward_flops) for each in works)
    back = sum(clock.of_map(each, each.backward_products, each.backward_flops) for each in works)
    attention, attention_back = attention_seconds(clock)
    passes = traffic.forward_passes(clock.micro_batch, [block])
    passes_back = traffic.backward_passes(clock.micro_batch, [block])
    passes_back += passes if runs_again else Passes()
    back += ahead * repeated_frac + attention_back + clock.of_passes(passes_back, way)
    back += attention if runs_again and not plan.keep_attention else 0.0
    count = sum(len(each.products) for each in works)
    count_back = sum(len(each.backward_products) for each in works) + count * repeated_frac
    return (
        _Direction(
            ahead + attention + clock.of_passes(passes, way), count + 1 + passes.eager.kernels
        ),
        _Direction(back, count_back + 1 + passes_back.eager.kernels),
    )


def _outside(
    clock: Clock, way: Way, stage: Stage, tensors: Sequence[TensorSpec]
) -> tuple[_Direction, _Direction]:
    """What weights move, embedding, last norm, head."""
    micro_batch = clock.micro_batch
    ahead = traffic.cast_passes(micro_batch, tensors)
    back = traffic.gradient_passes(micro_batch, tensors)
    products: list[tuple[float, int]] = []
    if stage.is_first:
        embed, embed_back = traffic.embedding_passes(micro_batch)
        ahead, back = ahead + embed, back + embed_back
    if stage.is_last:
        last, last_back = traffic.last_passes(micro_batch)
        ahead, back = ahead + last + traffic.head_passes(micro_batch), back + last_back
        head = traffic.head_products(micro_batch)
        products = [(clock.of_product(each), count) for each, count in head]
    seconds = sum(each * count for each, count in products) + clock.of_passes(ahead, way)
    kernels = sum(count for _, count in products) + ahead.eager.kernels
    return (
        _Direction(seconds, kernels),
        _Direction(clock.of_passes(back, way), back.eager.kernels),
    )
