"""What the suite switches in the package, and what it asks the cost model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from crnet.cost import hardware
from crnet.cost.stage_clock import step_seconds
from crnet.cost.workload import Workload
from crnet.kernels import compiled, loss_chunks
from crnet.recompute.plan import RecomputePlan

KERNELS = ("eager", "auto")
"""``eager``: torch's own operations; ``auto``: fused ones where the device has them."""


@contextlib.contextmanager
def kernels(mode: str) -> Iterator[None]:
    """Meanwhile maps, norms and activations take that mode."""
    compiled.choose(mode)
    try:
        yield
    finally:
        compiled.choose("auto")


@contextlib.contextmanager
def loss_chunk(num_items: int) -> Iterator[None]:
    """Meanwhile the loss holds so many logits at once."""
    names = ("CPU_ROWS", "CPU_ITEMS", "CUDA_ITEMS")
    before = [getattr(loss_chunks, name) for name in names]
    for name in names:
        setattr(loss_chunks, name, num_items)
    try:
        yield
    finally:
        for name, was in zip(names, before, strict=True):
            setattr(loss_chunks, name, was)


def predicted_ms(work: Workload, plan: RecomputePlan, device: str, mode: str) -> float:
    """What the cost model says of a step on a device by name, with kernels of that mode."""
    way = "eager" if mode == "eager" else "fused"
    return 1e3 * step_seconds(work, plan, hardware.device(device))[f"{way}: total"]
