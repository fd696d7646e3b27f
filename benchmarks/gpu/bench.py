"""How the suite measures: clocks, deadlines, and what is noted of the machine.

A section is a generator of entries ``(key, value)``. Between two entries the clock is looked at and
everything so far is written, so that a killed or slow run keeps what it has.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crnet.storage.manifest import describe_code, describe_device

Entry = tuple[str, Any]
"""A key and what JSON can hold."""


@dataclass(frozen=True)
class Bench:
    """One run of the suite."""

    device: torch.device
    out: Path
    """Folder of the reports."""
    tiny: bool
    """Shapes for a dry run on a CPU: the figures mean nothing."""
    rounds: int
    warm_up: int

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and products: bf16, but where a CPU has no products of it."""
        return torch.bfloat16 if self.is_gpu else torch.float32

    @property
    def precision(self) -> Any:
        """``dtype`` as ``--train.precision`` has it."""
        return "bf16" if self.is_gpu else "fp32"

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one call: between two CUDA events, or by the CPU's clock."""
        if not self.is_gpu:
            start_s = time.perf_counter()
            run()
            return time.perf_counter() - start_s
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def sides(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
        """Every side in turn, round after round, after a warm-up. A side that fails (no memory, no
        such kernel) is reported and left out; the others go on."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        failed: dict[str, str] = {}
        for number in range(self.warm_up + self.rounds):
            for name, run in runs.items():
                if name in failed:
                    continue
                try:
                    elapsed_s = self.seconds(run)
                except (RuntimeError, NotImplementedError) as error:
                    failed[name] = first_line(error)
                    continue
                if number >= self.warm_up:
                    times[name].append(elapsed_s)
        return {
            name: {"error": failed[name]} if name in failed else spread(each)
            for name, each in times.items()
        }

    def memory(self, run: Callable[[], object]) -> dict[str, int]:
        """Peaks above what was there before: allocated and reserved. Empty without a GPU."""
        if not self.is_gpu:
            return {}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronize()
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {
            "peak_bytes": peak - before,
            "allocated_bytes": peak,
            "reserved_bytes": reserved,
        }

    def free(self) -> None:
        """Give cached memory back, before the next model."""
        if self.is_gpu:
            torch.cuda.empty_cache()


def spread(times_s: list[float]) -> dict[str, Any]:
    """Median, least and most, in ms."""
    low, median, high = min(times_s), statistics.median(times_s), max(times_s)
    return {"ms": 1e3 * median, "least_ms": 1e3 * low, "most_ms": 1e3 * high}


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def ratio(entry: Any, *over: Any) -> float | None:
    """``ms`` of the first over the least ``ms`` of the others; None where one is missing."""
    times = [each["ms"] for each in (entry, *over) if isinstance(each, dict) and "ms" in each]
    return times[0] / min(times[1:]) if len(times) == 1 + len(over) else None


def run_section(
    entries: Callable[[Bench], Iterator[Entry]],
    bench: Bench,
    limit_s: float,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Take a section's entries until its time is over.

    Args:
        limit_s: no entry is begun after it.
        write: called with what there is, after every entry.
    Returns: the entries, and under ``status`` how it ended: whole, cut, or the error.
    """
    start_s = time.perf_counter()
    found: dict[str, Any] = {}
    status, steps = "whole", entries(bench)
    while True:
        if time.perf_counter() - start_s >= limit_s:
            status = "cut"
            break
        try:
            key, value = next(steps)
        except StopIteration:
            break
        except Exception as error:  # noqa: BLE001  # one section's failure is not the next one's
            status = first_line(error)
            break
        found[key] = value
        write(found | {"status": "cut"})
    steps.close()  # type: ignore[attr-defined]
    bench.free()
    return found | {"status": status, "elapsed_s": round(time.perf_counter() - start_s, 1)}


def machine(bench: Bench) -> dict[str, Any]:
    """Card, clocks, versions and code."""
    found = {
        "device": describe_device(bench.device),
        "code": describe_code(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "threads": torch.get_num_threads(),
    }
    for name in ("triton", "transformers", "liger_kernel"):
        found[name] = _version(name)
    if bench.is_gpu:
        found["gpu"] = _query("name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit")
    return found


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _query(fields: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
