"""Where the suite meets kernels and costs that may not be there: one function each."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

from crnet.cost.workload import Workload
from crnet.kernels import loss, loss_chunks
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
    """Meanwhile the chunked loss holds so many logits at once, and takes every case."""
    modules = [each for each in (loss, loss_chunks) if hasattr(each, "LOSS_CHUNK_ITEMS")]
    before = [each.LOSS_CHUNK_ITEMS for each in modules]
    for each in modules:
        each.LOSS_CHUNK_ITEMS = num_items
    try:
        with loss.chunked_everywhere():
            yield
    finally:
        for each, was in zip(modules, before, strict=True):
            each.LOSS_CHUNK_ITEMS = was


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
