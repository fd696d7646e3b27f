"""The same bits from the same run on a GPU, at a price in speed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.utils.deterministic

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def deterministic(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Meanwhile operations on a GPU add in a fixed order, or raise where they cannot.

    Attention takes the flash kernel (bf16) or the plain formula (fp32): the backward passes of the
    other two add in whatever order their blocks finish. On a CPU nothing changes: its operations
    are deterministic for a number of threads.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    # At once: cuBLAS reads it when it is first used. A value of the user's own stays.
    os.environ.setdefault(WORKSPACE, ":4096:8")
    return _in_fixed_order()


@contextlib.contextmanager
def _in_fixed_order() -> Iterator[None]:
    # pyright does not know the properties of this module, which replaces itself.
    cuda, filling = torch.backends.cuda, cast("Any", torch.utils.deterministic)
    was = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        filling.fill_uninitialized_memory,
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
    try:
        torch.use_deterministic_algorithms(True)
        filling.fill_uninitialized_memory = False  # every item is written before it is read
        cuda.enable_mem_efficient_sdp(False)
        cuda.enable_cudnn_sdp(False)
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        filling.fill_uninitialized_memory = was[2]
        cuda.enable_mem_efficient_sdp(was[3])
        cuda.enable_cudnn_sdp(was[4])
