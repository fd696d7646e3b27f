"""Seconds of an optimizer step on a device, in three ways: eager, compiled, fused.

A product takes its FLOPs at what the device reaches or the bytes of its operands, whichever is
slower; every other kernel its bytes; and each kernel a launch. Nothing overlaps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from crnet.cost import traffic
from crnet.cost.flops import block_flops
from crnet.cost.hardware import Device, is_gpu
from crnet.cost.micro_batch import BlockBytes, MicroBatch
from crnet.cost.stages import DIRECTIONS, Direction, Stage, held
from crnet.cost.workload import Workload
from crnet.recompute.plan import RecomputePlan
from crnet.specs import Passes, Product, Traffic, Work

Way = Literal["eager", "compiled", "fused"]
WAYS: tuple[Way, ...] = ("eager", "compiled", "fused")


@dataclass(frozen=True)
class Clock:
    """What a device takes for a micro-batch's kernels, in seconds."""

    device: Device
    micro_batch: MicroBatch

    @property
    def _flops_per_s(self) -> float:
        return self.device.product_frac * self.device.flops_per_s(self.micro_batch.precision)

    def of_product(self, product: Product) -> float:
        on, size = self.device, product.moved_bytes(self.micro_batch.compute_bytes)
        bound = size / (on.product_bytes_frac * on.bytes_per_s)
        return max(product.flops / self._flops_per_s, bound) + on.launch_s

    def of_flops(self, flops: float) -> float:
        return flops / self._flops_per_s

    def of_bytes(self, moved_bytes: float) -> float:
        return moved_bytes / (self.device.pass_bytes_frac * self.device.bytes_per_s)

    def of_traffic(self, moved: Traffic) -> float:
        return self.of_bytes(moved.moved_bytes) + moved.kernels * self.device.launch_s

    def of_passes(self, passes: Passes, way: Way) -> float:
        return self.of_traffic(getattr(passes, way))

    def of_map(self, work: Work, products: tuple[Product, ...], flops: int) -> float:
        """Its products one by one; where a method names none, its FLOPs."""
        return sum(map(self.of_product, products)) if work.products else self.of_flops(flops)

    def of_attention(self, flops: int, moved_bytes: int, kernels: int) -> float:
        """A fused kernel that skips masked pairs: half of the FLOPs."""
        bound = max(self.of_flops(flops / 2), self.of_bytes(moved_bytes))
        return bound + kernels * self.device.launch_s


def step_seconds(work: Workload, plan: RecomputePlan, on: Device) -> dict[str, float]:
    """Seconds of one optimizer step, ``WAY: TERM``: ``products`` of the blocks, ``attention``,
    ``passes`` (elementwise kernels), ``head`` (the loss), ``optimizer``, ``total``.

    ``eager``: as the code runs without ``train.compile``, and no faster than the host issues its
    operations. ``compiled``: each block by Inductor; left out where the plan forbids it.
    ``fused``: were elementwise work inside the products' kernels.
    Accuracy: kernels and bytes of ``eager`` are counted (``measure.traffic``), the rates are not.
    """
    clock = clock_of(work.micro_batch, on)
    ways: list[Way] = [way for way in WAYS if way != "compiled" or plan.policy in ("none", "block")]
    found: dict[str, float] = {}
    for way in ways:
        parts = _micro_batch_parts(clock, plan, way)
        terms = {term: work.num_micro_batches * seconds for term, seconds in parts.items()}
        terms["optimizer"] = optimizer_seconds(work.state_bytes, clock)
        total = sum(terms.values())
        if way == "eager":
            kernels = work.num_micro_batches * num_kernels(clock.micro_batch, plan)
            total = max(total, kernels * on.issue_s)
        found |= {f"{way}: {term}": seconds for term, seconds in (terms | {"total": total}).items()}
    return found


def optimizer_seconds(state_bytes: Mapping[str, int], clock: Clock) -> float:
    """Weights and state read and written, gradients read; ``state_bytes`` as of a workload."""
    moved = 2 * (state_bytes["weights"] + state_bytes["optimizer state"])
    return clock.of_bytes(moved + state_bytes["gradients"])


def stage_seconds(
    work: Workload, stages: Sequence[Stage], plan: RecomputePlan, on: Device, way: Way = "eager"
) -> tuple[list[float], list[float]]:
    """Seconds of one micro-batch in each stage, bottom first: forward, backward.

    The loss makes its gradients in the forward pass: the head is in the last stage's. What is
    recomputed is in the backward passes. Added up they are ``step_seconds`` without the optimizer,
    but that ``eager`` has no pass faster than that stage's host issues it.
    """
    clock = clock_of(work.micro_batch, on)
    found: dict[Direction, list[float]] = {"forward": [], "backward": []}
    for stage in stages:
        for direction, seconds in found.items():
            total = sum(_stage_parts(clock, plan, way, stage, direction).values())
            if way == "eager":
                kernels = _stage_kernels(clock.micro_batch, plan, stage, direction)
                total = max(total, kernels * on.issue_s)
            seconds.append(total)
    return found["forward"], found["backward"]


def clock_of(micro_batch: MicroBatch, on: Device) -> Clock:
    """The clock of a micro-batch on a device."""
    if is_gpu(on) and micro_batch.device_type != "cuda":
        micro_batch = dataclasses.replace(micro_batch, device_type="cuda")
    return Clock(on, micro_batch)


def _whole(micro_batch: MicroBatch) -> Stage:
    """A model in one stage."""
    return Stage(0, 1, 0, micro_batch.spec.num_layers)


def _micro_batch_parts(clock: Clock, plan: RecomputePlan, way: Way) -> dict[str, float]:
    stage = _whole(clock.micro_batch)
    forward = _stage_parts(clock, plan, way, stage, "forward")
    backward = _stage_parts(clock, plan, way, stage, "backward")
    return {term: forward[term] + backward[term] for term in forward}


def _stage_parts(
    clock: Clock, plan: RecomputePlan, way: Way, stage: Stage, direction: Direction
) -> dict[str, float]:
    micro_batch = clock.micro_batch
    blocks = micro_batch.blocks[stage.bottom : stage.top]
    forward, backward = _product_seconds(clock, blocks)
    attention, attention_backward = (len(blocks) * each for each in attention_seconds(clock))
    head = 0.0
    if direction == "forward" and stage.is_last:
        head = sum(count * clock.of_product(it) for it, count in traffic.head_products(micro_batch))
        head += clock.of_passes(traffic.head_passes(micro_batch), way)
    if direction == "backward":
        forward = backward + forward * second_run(micro_batch, plan)
        runs_again = plan.policy != "none" and not plan.keep_attention
        attention = attention_backward + (attention if runs_again else 0.0)
    passes = _stage_passes(micro_batch, plan, stage, direction)
    return {
        "products": forward,
        "attention": attention,
        "passes": clock.of_passes(passes, way),
        "head": head,
    }


def _stage_passes(
    micro_batch: MicroBatch, plan: RecomputePlan, stage: Stage, direction: Direction
) -> Passes:
    """Without the head's."""
    spec, blocks = micro_batch.spec, micro_batch.blocks[stage.bottom : stage.top]
    names = held(spec, [stage]) & spec.tensors.keys()
    tensors = [spec.tensors[name] for name in sorted(names)]
    is_back = direction == "backward"
    if not is_back or plan.policy != "none":
        found = traffic.forward_passes(micro_batch, blocks)
    else:
        found = Passes()
    if is_back:
        found += traffic.backward_passes(micro_batch, blocks)
        found += traffic.gradient_passes(micro_batch, tensors)
    else:
        found += traffic.cast_passes(micro_batch, tensors)
    if stage.is_first:
        found += traffic.embedding_passes(micro_batch)[is_back]
    if stage.is_last:
        found += traffic.last_passes(micro_batch)[is_back]
    return found


def _product_seconds(clock: Clock, blocks: Sequence[BlockBytes]) -> tuple[float, float]:
    """Of the maps of some blocks, forward and backward."""
    works = list(_works(blocks))
    forward = sum(clock.of_map(each, each.products, each.forward_flops) for each in works)
    backward = sum(
        clock.of_map(each, each.backward_products, each.backward_flops) for each in works
    )
    return forward, backward


def _works(blocks: Sequence[BlockBytes]) -> Iterable[Work]:
    return (work for block in blocks for work in block.works.values())


def second_run(micro_batch: MicroBatch, plan: RecomputePlan) -> float:
    """Products computed again, as a share of the forward pass's."""
    flops = block_flops(micro_batch, plan)
    inside = len(micro_batch.blocks) * micro_batch.inside.forward_flops
    repeated = flops["recompute"]
    if plan.policy != "none" and not plan.keep_attention:
        repeated -= inside
    return max(repeated, 0) / max(flops["forward"] - inside, 1)


def attention_seconds(clock: Clock) -> tuple[float, float]:
    """Of one block, forward and backward."""
    inside = clock.micro_batch.inside
    moved = inside.attention_moved_bytes
    forward = clock.of_attention(inside.forward_flops, moved, 1)
    # Five products instead of two: the scores are made again.
    return forward, clock.of_attention(5 * inside.forward_flops // 2, 2 * moved, 2)


def num_kernels(micro_batch: MicroBatch, plan: RecomputePlan) -> int:
    """Operations that the host issues for one micro-batch, eager."""
    stage = _whole(micro_batch)
    return sum(_stage_kernels(micro_batch, plan, stage, each) for each in DIRECTIONS)


def _stage_kernels(
    micro_batch: MicroBatch, plan: RecomputePlan, stage: Stage, direction: Direction
) -> int:
    blocks = micro_batch.blocks[stage.bottom : stage.top]
    works = list(_works(blocks))
    products = len(blocks) + sum(len(work.products) for work in works)
    if direction == "backward":
        repeated = round((products - len(blocks)) * second_run(micro_batch, plan))
        backward = sum(len(work.backward_products) for work in works)
        products = len(blocks) + backward + repeated
    found = products + _stage_passes(micro_batch, plan, stage, direction).eager.kernels
    if direction == "forward" and stage.is_last:
        found += sum(count for _, count in traffic.head_products(micro_batch))
        found += traffic.head_passes(micro_batch).eager.kernels
    return found
