"""Seconds of an optimizer step on a device, in three ways: eager, compiled, fused.

A product takes its FLOPs at what the device reaches or the bytes of its operands, whichever is
slower; every other kernel its bytes; and each kernel a launch. Nothing overlaps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from crnet.cost import traffic
from crnet.cost.flops import block_flops
from crnet.cost.hardware import Device, is_gpu
from crnet.cost.micro_batch import MicroBatch
from crnet.cost.workload import Workload
from crnet.recompute.plan import RecomputePlan
from crnet.specs import Passes, Product, Traffic, Work

Way = Literal["eager", "compiled", "fused"]
WAYS: tuple[Way, ...] = ("eager", "compiled", "fused")


@dataclass(frozen=True)
class _Clock:
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
    device_type = "cuda" if is_gpu(on) else work.micro_batch.device_type
    clock = _Clock(on, dataclasses.replace(work.micro_batch, device_type=device_type))
    ways: list[Way] = [way for way in WAYS if way != "compiled" or plan.policy in ("none", "block")]
    found: dict[str, float] = {}
    for way in ways:
        parts = _micro_batch_parts(clock, plan, way)
        terms = {term: work.num_micro_batches * seconds for term, seconds in parts.items()}
        terms["optimizer"] = _optimizer(work, clock)
        total = sum(terms.values())
        if way == "eager":
            kernels = work.num_micro_batches * num_kernels(clock.micro_batch, plan)
            total = max(total, kernels * on.issue_s)
        found |= {f"{way}: {term}": seconds for term, seconds in (terms | {"total": total}).items()}
    return found


def _optimizer(work: Workload, clock: _Clock) -> float:
    """Weights and state read and written, gradients read."""
    states = work.state_bytes
    moved = 2 * (states["weights"] + states["optimizer state"]) + states["gradients"]
    return clock.of_bytes(moved)


def _micro_batch_parts(clock: _Clock, plan: RecomputePlan, way: Way) -> dict[str, float]:
    micro_batch = clock.micro_batch
    repeated_frac = second_run(micro_batch, plan)
    forward, backward = _product_seconds(clock)
    passes = traffic.forward_passes(micro_batch) * (2 if plan.policy != "none" else 1)
    passes += traffic.backward_passes(micro_batch) + traffic.weight_passes(micro_batch)
    passes += traffic.outside_passes(micro_batch)
    head = sum(count * clock.of_product(it) for it, count in traffic.head_products(micro_batch))
    attention_runs = 2 if plan.policy != "none" and not plan.keep_attention else 1
    return {
        "products": forward * (1 + repeated_frac) + backward,
        "attention": _attention_seconds(clock, attention_runs),
        "passes": clock.of_traffic(_of(passes, way)),
        "head": head + clock.of_traffic(_of(traffic.head_passes(micro_batch), way)),
    }


def _of(passes: Passes, way: Way) -> Traffic:
    return getattr(passes, way)


def _product_seconds(clock: _Clock) -> tuple[float, float]:
    """Of the maps of all blocks, forward and backward."""
    works = list(_works(clock.micro_batch))
    forward = sum(clock.of_map(each, each.products, each.forward_flops) for each in works)
    backward = sum(
        clock.of_map(each, each.backward_products, each.backward_flops) for each in works
    )
    return forward, backward


def _works(micro_batch: MicroBatch) -> Iterable[Work]:
    return (work for block in micro_batch.blocks for work in block.works.values())


def second_run(micro_batch: MicroBatch, plan: RecomputePlan) -> float:
    """Products computed again, as a share of the forward pass's."""
    flops = block_flops(micro_batch, plan)
    inside = len(micro_batch.blocks) * micro_batch.inside.forward_flops
    repeated = flops["recompute"]
    if plan.policy != "none" and not plan.keep_attention:
        repeated -= inside
    return max(repeated, 0) / max(flops["forward"] - inside, 1)


def _attention_seconds(clock: _Clock, runs: int) -> float:
    inside, count = clock.micro_batch.inside, len(clock.micro_batch.blocks)
    moved = inside.attention_moved_bytes
    forward = clock.of_attention(inside.forward_flops, moved, 1)
    # Five products instead of two: the scores are made again.
    backward = clock.of_attention(5 * inside.forward_flops // 2, 2 * moved, 2)
    return count * (runs * forward + backward)


def num_kernels(micro_batch: MicroBatch, plan: RecomputePlan) -> int:
    """Operations that the host issues for one micro-batch, eager."""
    works, blocks = list(_works(micro_batch)), len(micro_batch.blocks)
    forward = sum(len(work.products) for work in works)
    backward = sum(len(work.backward_products) for work in works)
    repeated_frac = second_run(micro_batch, plan)
    passes = traffic.micro_batch_passes(micro_batch)
    if plan.policy != "none":
        passes += traffic.forward_passes(micro_batch)
    head = sum(count for _, count in traffic.head_products(micro_batch))
    products = backward + head + 2 * blocks + round(forward * (1 + repeated_frac))
    return products + passes.eager.kernels
