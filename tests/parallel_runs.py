"""What the processes of ``test_parallel.py`` do.

    torchrun ... parallel_runs.py FOLDER

As ``shared_runs.py`` says; what a process sees of a run has also how many graphs it compiled, and
how many files of a checkpoint it compared with their checksums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from torch._dynamo.utils import counters

from crnet.storage import checkpoint
from shared_runs import Seen, train_all


@contextlib.contextmanager
def watched(_: str) -> Iterator[Seen]:
    seen: Seen = {"verified": 0}
    verify = checkpoint._verify_file

    def counted(path: Path, wanted: Any) -> None:
        seen["verified"] += 1
        verify(path, wanted)

    counters.clear()
    with mock.patch.object(checkpoint, "_verify_file", counted):
        yield seen
    seen["graphs"] = counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    train_all(watched)
