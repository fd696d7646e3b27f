"""Where the suite meets kernels and costs that may not be there: one function each."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

from crnet.cost.workload import Workload
from crnet.kernels import loss_chunks
from crnet.model.language_model import LanguageModel
from crnet.recompute.plan import RecomputePlan

KERNELS = ("eager", "auto")
"""``eager``: torch's own operations; ``auto``: fused ones where the device has them."""


@contextlib.contextmanager
def kernels(mode: str) -> Iterator[bool]:
    """Meanwhile maps, norms and activations take that mode; False where there is only ``eager``."""
    try:
        from crnet.kernels import compiled  # type: ignore[attr-defined]
    except ImportError:
        yield mode == "eager"
        return
    compiled.choose(mode)
    try:
        yield True
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


def compile_blocks(model: LanguageModel, backend: str = "inductor") -> None:
    """Every block by torch's compiler, as a run has it."""
    if "backend" in inspect.signature(model.compile_blocks).parameters:
        model.compile_blocks(backend=backend)  # type: ignore[call-arg]
        return
    for block in model.model.blocks():
        block.compile(backend=backend)


def predicted_ms(work: Workload, plan: RecomputePlan, device: str) -> float | None:
    """What the cost model says of a step on a device by name; None where it says nothing."""
    try:
        from crnet.cost import hardware

        seconds = hardware.step_seconds(work, plan, hardware.device(device))
        return 1e3 * seconds["total"]
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        return None
