"""What the processes of ``test_parallel.py`` do.

    torchrun ... parallel_runs.py FOLDER

As ``shared_runs.py`` says; what a process sees of a run has also how many graphs it compiled, how
many files of a checkpoint it compared with their checksums, and how often gradients were scattered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

from crnet.storage import checkpoint
from shared_runs import Seen, train_all


@contextlib.contextmanager
def watched(_: str) -> Iterator[Seen]:
    seen: Seen = {"verified": 0, "scattered": 0}
    verify, scattered = checkpoint._verify_file, torch.distributed.reduce_scatter_single

    def counted(path: Path, wanted: Any) -> None:
        seen["verified"] += 1
        verify(path, wanted)

    def scatter(*args: Any, **more: Any) -> Any:
        seen["scattered"] += 1
        return scattered(*args, **more)

    counters.clear()
    with (
        mock.patch.object(checkpoint, "_verify_file", counted),
        mock.patch.object(torch.distributed, "reduce_scatter_single", scatter),
    ):
        yield seen
    seen["graphs"] = counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    train_all(watched)
