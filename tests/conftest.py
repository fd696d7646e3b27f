"""What every test file may rely on: one CPU thread, and fp32 as the default dtype.

One thread, because the tensors are too small for a second to help, and two threads that share a
busy core wait for each other at every operation (a gradcheck took 17 s instead of 0.3).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
