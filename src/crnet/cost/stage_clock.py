"""Seconds of a model's passes on a device: of a whole optimizer step, and of a pipeline's stages.

In three ways: eager, compiled, fused (``clock.Way``). Blocks that are alike are priced once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from crnet.cost import traffic
from crnet.cost.clock import WAYS, Clock, Way, attention_seconds, clock_of, second_run
from crnet.cost.hardware import Device
from crnet.cost.micro_batch import BlockBytes
from crnet.cost.stages import Stage, by_stage
from crnet.cost.workload import Workload
from crnet.recompute.plan import RecomputePlan
from crnet.specs import Passes, TensorSpec

TERMS = ("products", "attention", "passes", "head")


@dataclass(frozen=True)
class Seconds:
    """Of one micro-batch."""

    forward_s: float
    backward_s: float

    @property
    def both_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class _Pass:
    """One way through some blocks: seconds by term, and the operations that the host issues."""

    products: float = 0.0
    attention: float = 0.0
    passes: float = 0.0
    head: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: Self) -> Self:
        terms, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return type(self)(*map(sum, zip(terms, others, strict=True)))

    def seconds(self, issue_s: float) -> float:
        """No less than the host needs to issue the operations."""
        return max(sum(getattr(self, term) for term in TERMS), self.kernels * issue_s)


_Both = tuple[_Pass, _Pass]
"""Forward, backward."""


def step_seconds(work: Workload, plan: RecomputePlan, on: Device) -> dict[str, float]:
    """Seconds of one optimizer step, ``WAY: TERM``: ``products`` of the blocks, ``attention``,
    ``passes`` (elementwise kernels), ``head`` (the loss), ``optimizer``, ``total``.

    ``eager``: as the code runs without ``train.compile``, and no faster than the host issues its
    operations. ``compiled``: each block by Inductor; left out where the plan forbids it.
    ``fused``: were elementwise work inside the products' kernels. What packing activations takes
    (``RecomputePlan.keep_as``) is not in it.
    Accuracy: kernels and bytes of ``eager`` are counted (``measure.traffic``), the rates are not.
    """
    clock = clock_of(work.micro_batch, on)
    compiles = plan.policy in ("none", "block") and not plan.is_packed
    ways: list[Way] = [way for way in WAYS if way != "compiled" or compiles]
    found: dict[str, float] = {}
    for way in ways:
        both = _whole(clock, plan, way)
        terms = {term: work.num_micro_batches * getattr(both, term) for term in TERMS}
        terms["optimizer"] = optimizer_seconds(work.state_bytes, work.gradient_bytes, clock)
        total = sum(terms.values())
        if way == "eager":
            total = max(total, work.num_micro_batches * round(both.kernels) * on.issue_s)
        found |= {f"{way}: {term}": seconds for term, seconds in (terms | {"total": total}).items()}
    return found


def optimizer_seconds(state_bytes: Mapping[str, int], gradient_bytes: int, clock: Clock) -> float:
    """Weights and state read and written, gradients read; bytes as of a workload."""
    moved = 2 * (state_bytes["weights"] + state_bytes["optimizer state"])
    return clock.of_bytes(moved + gradient_bytes)


def num_kernels(clock: Clock, plan: RecomputePlan) -> int:
    """Operations that the host issues for one micro-batch, eager."""
    return round(_whole(clock, plan, "eager").kernels)


def stage_seconds(
    clock: Clock,
    plan: RecomputePlan,
    stages: Sequence[Stage],
    tensors: Mapping[str, TensorSpec] | None = None,
    way: Way = "eager",
) -> list[Seconds]:
    """Of each stage, one micro-batch.

    The loss makes its gradients in the forward pass: the head is in the last stage's. What is
    recomputed is in the backward passes. Added up they are ``step_seconds`` without the optimizer,
    but that ``eager`` has no pass faster than that stage's host issues it.

    Args:
        stages: together all blocks; one stage is the whole model.
        tensors: as a process stores them, by full name; None: as the model declares them.
    """
    issue_s = clock.device.issue_s if way == "eager" else 0.0
    each_stage = _stages(clock, plan, way, stages, tensors)
    return [Seconds(*(each.seconds(issue_s) for each in both)) for both in each_stage]


def _whole(clock: Clock, plan: RecomputePlan, way: Way) -> _Pass:
    """Both ways through the model in one stage."""
    stage = Stage(0, 1, 0, clock.micro_batch.spec.num_layers)
    ((ahead, back),) = _stages(clock, plan, way, [stage])
    return ahead + back


def _stages(
    clock: Clock,
    plan: RecomputePlan,
    way: Way,
    stages: Sequence[Stage],
    tensors: Mapping[str, TensorSpec] | None = None,
) -> list[_Both]:
    tensors = clock.micro_batch.spec.tensors if tensors is None else tensors
    repeated_frac = second_run(clock.micro_batch, plan)
    known: dict[Hashable, _Both] = {}
    blocks = []
    for block in clock.micro_batch.blocks:
        if (key := _kind(block)) not in known:
            known[key] = _block(clock, plan, way, block, repeated_frac)
        blocks.append(known[key])
    found = []
    for stage, mine in zip(stages, by_stage(stages, tensors), strict=True):
        outside = _outside(clock, way, stage, list(mine.values()))
        each_way = zip(*blocks[stage.bottom : stage.top], outside, strict=True)
        ahead, back = (sum(each, _Pass()) for each in each_way)
        found.append((ahead, back))
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
) -> _Both:
    """Without what weights move."""
    works, runs_again = list(block.works.values()), plan.policy != "none"
    ahead = sum(clock.of_map(each, each.products, each.forward_flops) for each in works)
    back = sum(clock.of_map(each, each.backward_products, each.backward_flops) for each in works)
    attention, attention_back = attention_seconds(clock)
    passes = traffic.forward_passes(clock.micro_batch, [block])
    passes_back = traffic.backward_passes(clock.micro_batch, [block])
    passes_back += passes if runs_again else Passes()
    count = sum(len(each.products) for each in works)
    count_back = sum(len(each.backward_products) for each in works) + count * repeated_frac
    return (
        _Pass(
            products=ahead,
            attention=attention,
            passes=clock.of_passes(passes, way),
            kernels=count + 1 + passes.eager.kernels,
        ),
        _Pass(
            products=back + ahead * repeated_frac,
            attention=attention_back + (0.0 if plan.is_plain or plan.keep_attention else attention),
            passes=clock.of_passes(passes_back, way),
            kernels=count_back + 1 + passes_back.eager.kernels,
        ),
    )


def _outside(clock: Clock, way: Way, stage: Stage, tensors: Sequence[TensorSpec]) -> _Both:
    """What weights move, embedding, last norm, head."""
    micro_batch, head, kernels = clock.micro_batch, 0.0, 0
    ahead = traffic.cast_passes(micro_batch, tensors)
    back = traffic.gradient_passes(micro_batch, tensors)
    if stage.is_first:
        embed, embed_back = traffic.embedding_passes(micro_batch)
        ahead, back = ahead + embed, back + embed_back
    if stage.is_last:
        last, last_back = traffic.last_passes(micro_batch)
        ahead, back = ahead + last, back + last_back
        products, passes = traffic.head_products(micro_batch), traffic.head_passes(micro_batch)
        head = sum(clock.of_product(each) * count for each, count in products)
        head += clock.of_passes(passes, way)
        kernels = sum(count for _, count in products) + passes.eager.kernels
    return (
        _Pass(passes=clock.of_passes(ahead, way), head=head, kernels=kernels + ahead.eager.kernels),
        _Pass(passes=clock.of_passes(back, way), kernels=back.eager.kernels),
    )
