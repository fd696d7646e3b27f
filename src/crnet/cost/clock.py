"""Seconds of a micro-batch's kernels on a device.

A product takes its FLOPs at what the device reaches or the bytes of its operands, whichever is
slower; every other kernel its bytes; and each kernel a launch. Nothing overlaps.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from crnet.cost.flops import block_flops
from crnet.cost.hardware import Device, is_gpu
from crnet.cost.micro_batch import MicroBatch
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


def clock_of(micro_batch: MicroBatch, on: Device) -> Clock:
    """The clock of a micro-batch on a device."""
    if is_gpu(on) and micro_batch.device_type != "cuda":
        micro_batch = dataclasses.replace(micro_batch, device_type="cuda")
    return Clock(on, micro_batch)


def second_run(micro_batch: MicroBatch, plan: RecomputePlan) -> float:
    """Products computed again, as a share of the forward pass's."""
    flops = block_flops(micro_batch, plan)
    inside = len(micro_batch.blocks) * micro_batch.inside.forward_flops
    repeated = flops["recompute"]
    if not (plan.is_plain or plan.keep_attention):
        repeated -= inside
    return max(repeated, 0) / max(flops["forward"] - inside, 1)


def attention_seconds(clock: Clock) -> tuple[float, float]:
    """Of one block, forward and backward."""
    inside = clock.micro_batch.inside
    moved = inside.attention_moved_bytes
    forward = clock.of_attention(inside.forward_flops, moved, 1)
    # Five products instead of two: the scores are made again.
    return forward, clock.of_attention(5 * inside.forward_flops // 2, 2 * moved, 2)
