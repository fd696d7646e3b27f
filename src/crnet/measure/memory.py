"""What a step really keeps, and needs at its peak: bytes counted, not estimated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crnet.model.language_model import LanguageModel


def saved_bytes(model: LanguageModel, tokens_BT: Tensor, targets_BT: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, parameters not counted.

    Each storage counts once, whole, however many tensors look at it. What an operation hides
    from autograd's hooks is not seen; nothing of ours does.

    Args:
        tokens_BT, targets_BT: one micro-batch.
    Cost: one forward pass.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # The memory is held, or its address could be given to another tensor meanwhile.
            seen[storage.data_ptr()] = (storage.nbytes(), tensor.detach())
        return tensor.detach()  # with its node, a node that keeps its own output would never go

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_sum, _ = model(tokens_BT, targets_BT)
    total = sum(size for size, _ in seen.values())
    del loss_sum
    return total


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes allocated at once during ``run``, above what was allocated before.

    On a CPU by a trace of every allocation (torch's profiler: slow, exact), on a GPU by the
    allocator's own count.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    assert profile.profiler is not None
    results: Any = profile.profiler.kineto_results
    events = [it for it in results.events() if it.name() == "[memory]"]
    changes = sorted(((it.start_ns(), it.nbytes()) for it in events), key=lambda it: it[0])
    now = highest = 0
    for _, change in changes:
        now += change
        highest = max(highest, now)
    return highest
