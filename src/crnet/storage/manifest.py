"""run.json: what was run, on what, from which code. Written before the first step."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import crnet
from crnet.config.sections import RunConfig
from crnet.config.serialize import read_json, to_dict
from crnet.storage.files import write_atomically

MANIFEST = "run.json"

VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME",
    "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD",
    "CRNET_TUNED",
)  # fmt: skip
"""Of the environment, what changes a run's time; the last names those that crnet set itself."""


def write_manifest(
    run_dir: Path,
    config: RunConfig,
    *,
    device: torch.device,
    start: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write ``run.json``. That of an earlier start is not lost: its start is listed in the new one.

    Args:
        config: resolved.
        start: of this start alone: the step it goes on from, what it changes.
        facts: what else is to be in it, whatever JSON can hold.
    """
    path = run_dir / MANIFEST
    start = {
        **start,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command_line": sys.argv,
        **describe_code(),
        "plugins": describe_plugins(),
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "environment": describe_environment(),
    }
    earlier = []
    if path.exists():
        last = read_json(path)
        before = last.get("earlier_starts", [])
        before = before if isinstance(before, list) else [before]
        earlier = [*before, {key: last.get(key) for key in start}]
    manifest = {"config": to_dict(config), **start, **facts, "earlier_starts": earlier}
    write_atomically(path, json.dumps(manifest, indent=1) + "\n")


def describe_code() -> dict[str, Any]:
    """Version, commit and whether the working tree differs from it, and the libraries' versions."""
    import numpy

    return {
        "crnet": crnet.__version__,
        **git(Path(__file__)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def describe_plugins() -> list[dict[str, str]]:
    """Name and hash of every file of methods from outside the package."""
    from crnet.registry import plugins

    return [{"name": plugin.name, "sha256": plugin.sha256} for plugin in plugins()]


def describe_environment() -> dict[str, str]:
    """The variables of ``VARIABLES`` that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def describe_device(device: torch.device) -> str:
    """A name a reader recognises: the GPU's, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git(file: Path) -> dict[str, Any]:
    """Commit of the repository that tracks a file, and whether a tracked file differs from it; both
    None without one: installed from a wheel inside another repository, its commit is not ours."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(file.parent), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", str(file)) is None:
        return {"commit": None, "dirty": None}
    status = ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(status)}
