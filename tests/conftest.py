"""What every test file may rely on: one CPU thread, and fp32 as the default dtype.

One thread, because the tensors are too small for a second to help, and two threads that share a
busy core wait for each other at every operation (a gradcheck took 17 s instead of 0.3). Where a
program that a test starts has two, the one that waits sleeps.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, and inherited

import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 kB of English and Python: text of the standard library."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of two finished runs, of CR-Net and of full rank; only to be read."""
    from test_train import run, tiny

    folder = tmp_path_factory.mktemp("runs")
    for linear in ("crnet", "full"):
        run(tiny(corpus, model={"linear": linear}), folder / linear)
    return [folder / "crnet", folder / "full"]


@pytest.fixture(scope="session")
def gathered(runs: list[Path]) -> dict[str, Any]:
    """What ``crnet report`` shows of them."""
    from crnet.report.gather import gather

    return gather(runs)
