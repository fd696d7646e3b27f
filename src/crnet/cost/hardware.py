"""What a step takes on hardware: a roofline, and the bytes between devices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crnet.cost.kept import kept_bytes
from crnet.cost.step import step_flops
from crnet.cost.workload import Workload
from crnet.errors import ConfigError
from crnet.recompute.plan import RecomputePlan


@dataclass(frozen=True)
class Device:
    """A roofline: what products can reach, and how fast memory is read and written."""

    name: str
    flops_per_s: float
    bytes_per_s: float


DEVICES = {
    device.name: device
    for device in (
        # Vendors' data sheets: dense bf16 tensor products, memory bandwidth.
        Device("a100-40g", 312e12, 1.555e12),
        Device("a100-80g", 312e12, 2.039e12),
        Device("h100", 989e12, 3.35e12),
        Device("h200", 989e12, 4.8e12),
        # Two cores with AVX-512, fp32: what benchmarks/block_time.py reaches at full rank.
        Device("cpu", 0.3e12, 20e9),
    )
}


def device(text: str) -> Device:
    """A device by name, or by ``FLOPS,GBPS`` (312e12,2039).

    Raises:
        ConfigError: neither.
    """
    if text in DEVICES:
        return DEVICES[text]
    try:
        flops, gigabytes = (float(word) for word in text.split(","))
    except ValueError:
        flops = gigabytes = 0.0
    if not (0 < flops < math.inf and 0 < gigabytes < math.inf):
        raise ConfigError(
            f"--device {text!r} is unknown; take {', '.join(DEVICES)}, or FLOPS,GBPS such as "
            "312e12,2039"
        )
    return Device(text, flops, gigabytes * 1e9)


def is_gpu(on: Device) -> bool:
    """Whether it is one of the GPUs above; a roofline in figures is no one's."""
    return on.name in DEVICES and on.name != "cpu"


def device_of(kind: str, name: str) -> Device:
    """The entry of a device that is there: by torch's kind (cpu, cuda) and the vendor's name."""
    words = name.lower()
    if kind == "cpu":
        return DEVICES["cpu"]
    if "a100" in words:
        return DEVICES["a100-40g" if "40g" in words else "a100-80g"]
    return DEVICES["h200" if "h200" in words else "h100"]


def communication_bytes(work: Workload, ranks: int) -> dict[str, float]:
    """Bytes that one rank sends in one optimizer step, by kind of parallelism over ``ranks``.

    ``data``: gradients all-reduced in a ring, 2 (n - 1)/n of them. ``sharded``: weights gathered
    for the forward and again for the backward pass of every micro-batch, gradients scattered,
    (n - 1)/n each. ``pipeline``: what crosses one boundary between blocks, all micro-batches:
    forward, backward and once more where the block above is run again (eq. 48's factor 3). With a
    carry from block to block that is the stream and what blocks hand on (6 h + 2 f wide for CR-Net
    where keys are not grouped, eq. 48's "communication dimension"), else the stream.
    """
    if ranks < 2:
        return {}
    micro_batch, states = work.micro_batch, work.state_bytes
    share, num_micro = (ranks - 1) / ranks, work.num_micro_batches
    weights = states["weights"] // (2 if micro_batch.is_mixed else 1)
    top = micro_batch.blocks[-1]
    carries = sum(
        top.outputs[name] if read.of == "output" else top.bottlenecks[name]
        for name, read in top.reads.items()
    )
    boundary = 3 * num_micro * (micro_batch.stream_size + carries)
    return {
        "data": 2 * share * states["gradients"],
        "sharded": share * (2 * num_micro * weights + states["gradients"]),
        "pipeline, a boundary": boundary,
        "pipeline, all boundaries": boundary * (ranks - 1),
    }


def step_seconds(work: Workload, plan: RecomputePlan, on: Device) -> dict[str, float]:
    """Least seconds of one optimizer step on a device: a roofline, nothing overlapped.

    ``products``: FLOPs at the device's rate, or the weights read three times a micro-batch where
    that is slower. ``activations``: what autograd would keep is written once and read twice.
    ``optimizer``: weights and state read and written, gradients read.
    """
    states, num_micro = work.state_bytes, work.num_micro_batches
    flops = step_flops(work, plan)["total"]
    kept = sum(kept_bytes(work.micro_batch, RecomputePlan()).values())
    moved = 2 * (states["weights"] + states["optimizer state"]) + states["gradients"]
    parts = {
        "products": max(flops / on.flops_per_s, 3 * num_micro * states["weights"] / on.bytes_per_s),
        "activations": 3 * num_micro * kept / on.bytes_per_s,
        "optimizer": moved / on.bytes_per_s,
    }
    return parts | {"total": sum(parts.values())}
