"""Cores of this machine that a process may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def num_cores() -> int:
    """Cores that this process may use: its affinity, and what its control group is granted."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return min(count, _granted(Path("/sys/fs/cgroup/cpu.max")) or count)


def _granted(file: Path) -> int | None:
    """Whole cores of a control group's quota; None: no quota."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = file.read_text(encoding="ascii").split()
        if quota != "max":
            return max(1, -(-int(quota) // int(period)))
    return None
