"""What the processes of ``test_tensor.py`` do.

    torchrun ... tensor_runs.py FOLDER

As ``shared_runs.py`` says; what a process sees of a run has also the bytes of every sum over
processes that compute a block in parts, in the last step, a hash of the weights that each of them
has whole, and the bytes of those that it has.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist

from crnet.parallel.whole import is_split, whole
from crnet.train.step import Step
from shared_runs import Seen, train_all

SUMS: list[int] = []
"""Bytes of each sum of the step that is under way, or was the last one."""
HELD = [0]
"""Bytes of the weights that this process has after the latest step. (After an evaluation torch
leaves what is around the blocks whole.)"""
GROUPS: list[Any] = [None]
MODELS: list[Any] = [None]
"""That of the latest step."""


def count_sums() -> None:
    """Note every sum over the processes of ``--parallel.tensor``, step by step."""
    all_reduce, call = dist.all_reduce, Step.__call__

    def counting(tensor: torch.Tensor, *args: Any, group: Any = None, **more: Any) -> Any:
        if group is not None and group is GROUPS[0]:
            SUMS.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, group=group, **more)

    def stepping(self: Step, *args: Any) -> Any:
        GROUPS[0], MODELS[0] = self.world.parts, self.model
        SUMS.clear()
        try:
            return call(self, *args)
        finally:
            GROUPS[0] = None
            HELD[0] = held_bytes()

    dist.all_reduce, Step.__call__ = counting, stepping


def hash_of_whole_weights() -> str:
    """Of the bits of what is no part."""
    model, found = MODELS[0], hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name not in model.spec.split_dims:
            found.update(whole(parameter.detach()).numpy().tobytes())
    return found.hexdigest()


def held_bytes() -> int:
    parameters = MODELS[0].parameters()
    return sum((it.to_local() if is_split(it) else it).nbytes for it in parameters)


@contextlib.contextmanager
def watched(_: str) -> Iterator[Seen]:
    seen: Seen = {}
    yield seen
    if "told" in seen:
        seen |= {"sums": [*SUMS], "whole weights": hash_of_whole_weights(), "held": HELD[0]}


if __name__ == "__main__":
    count_sums()
    train_all(watched)
