"""What the processes of ``test_parallel.py`` do.

    torchrun ... parallel_runs.py FOLDER

As ``shared_runs.py`` says; what a process sees of a run has also how many graphs it compiled, how
many files of a checkpoint it compared with their checksums, how often gradients were scattered, and
how many gradients lay elsewhere, after the last step's first micro-batch, than the step before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

from crnet.parallel.engine import Engine
from crnet.storage import checkpoint
from shared_runs import Seen, train_all


def places(model: torch.nn.Module) -> set[int]:
    """Of the gradients in memory."""
    return {each.grad.data_ptr() for each in model.parameters() if each.grad is not None}


@contextlib.contextmanager
def watched(_: str) -> Iterator[Seen]:
    seen: Seen = {"verified": 0, "scattered": 0, "moved": 0}
    verify, scattered = checkpoint._verify_file, torch.distributed.reduce_scatter_single

    def counted(path: Path, wanted: Any) -> None:
        seen["verified"] += 1
        verify(path, wanted)

    def scatter(*args: Any, **more: Any) -> Any:
        seen["scattered"] += 1
        return scattered(*args, **more)

    reducing, before, first = Engine._reducing, set(), True

    @contextlib.contextmanager
    def looked_at(self: Engine, last: bool) -> Iterator[None]:
        nonlocal before, first
        if first:
            before = places(self.model)
        with reducing(self, last):
            yield
        if first and not last:
            seen["moved"] = len(places(self.model) - before)
        first = last

    counters.clear()
    with (
        mock.patch.object(checkpoint, "_verify_file", counted),
        mock.patch.object(torch.distributed, "reduce_scatter_single", scatter),
        mock.patch.object(Engine, "_reducing", looked_at),
    ):
        yield seen
    seen["graphs"] = counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    train_all(watched)
