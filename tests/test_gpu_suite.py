"""The GPU suite's dry run: every section, what a slow or failing one leaves, its goals."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "benchmarks" / "gpu_suite.py"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import gpu_suite

    return gpu_suite


def bench(suite: Any, out: Path) -> Any:
    return suite.Bench(torch.device("cpu"), out, tiny=True, rounds=1, warm_up=0)


def given(seconds: float) -> argparse.Namespace:
    return argparse.Namespace(seconds=seconds, tiny=True)


def quick(_: Any) -> Iterator[tuple[str, Any]]:
    yield "one", 1


def test_a_section_that_fails_or_is_slow_leaves_the_rest(suite: Any, tmp_path: Path):
    def failing(_: Any) -> Iterator[tuple[str, Any]]:
        yield "before", 1
        raise ValueError("no such kernel")

    def slow(_: Any) -> Iterator[tuple[str, Any]]:
        for number in range(100):
            yield f"entry {number}", number
            time.sleep(0.02)

    sections = {"failing": (1, failing), "slow": (1, slow), "quick": (8, quick)}
    report = suite.run_suite(bench(suite, tmp_path), given(2), sections)
    written = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert written["sections"] == report["sections"]
    found = report["sections"]
    assert found["failing"] | {"elapsed_s": 0} == {
        "before": 1,
        "status": "ValueError: no such kernel",
        "elapsed_s": 0,
    }
    assert found["slow"]["status"] == "cut"
    assert 1 <= sum(key.startswith("entry") for key in found["slow"]) < 100
    assert (found["quick"]["one"], found["quick"]["status"]) == (1, "whole")


def test_a_killed_run_keeps_what_it_had(suite: Any, tmp_path: Path):
    class Killed(BaseException):
        pass

    def killed(_: Any) -> Iterator[tuple[str, Any]]:
        yield "before", 1
        raise Killed

    with pytest.raises(Killed):
        suite.run_suite(bench(suite, tmp_path), given(9), {"q": (1, quick), "k": (1, killed)})
    written = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert written["sections"]["q"]["status"] == "whole"
    assert written["sections"]["k"] == {"before": 1, "status": "cut"}


def test_goals_are_read_from_what_was_measured(suite: Any):
    side = {"mfu": 0.3, "peak_bytes": 98, "predicted_peak_bytes": 100}
    side |= {"reserved_bytes": 120, "allocated_bytes": 100}
    sections = {
        "eager": {
            "350m, eager kernels": {
                "full": side | {"ms": 100},
                "crnet": side | {"ms": 90},
            },
            "350m, auto kernels": {"full": side | {"ms": 80}, "crnet": side | {"ms": 70}},
        },
        "compiled": {"350m, crnet": {"mfu": 0.5, "ms": 60}},
    }
    rows = {row["goal"]: row for row in suite.goals(sections)}
    assert len(rows) == len(suite.goals(sections))
    best = rows["step time, CR-Net to full rank, both at their best, 350m"]
    assert (best["measured"], best["met"]) == (60 / 80, True)
    assert rows["MFU, crnet, 350m"]["measured"] == 0.5
    assert rows["peak to prediction, farthest from 1"]["measured"] == pytest.approx(0.02)
    assert rows["reserved to allocated, the most"]["met"] is False
    missing = rows["decoding 7B, CR-Net to full rank"]
    assert (missing["measured"], missing["met"]) == (None, None)


@pytest.mark.slow
def test_the_dry_run_takes_every_section_to_its_end(tmp_path: Path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(PROGRAM), "--tiny", "--seconds", "3000"]
    command += ["--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "out" / "gpu_suite.json").read_text())
    names = ["ceilings", "numerics", "eager", "policies", "compiled", "peers", "loss", "decode"]
    assert list(report["sections"]) == [*names, "kernels"]
    for name, section in report["sections"].items():
        assert section["status"] == "whole", (name, section["status"])
        assert len(section) > 2, name
    sections = report["sections"]
    tests = sections["numerics"]["tests"]
    assert tests["failed"] == {}
    assert tests["number"] > 0
    errors = sections["numerics"]["errors, eager kernels"]
    assert all(0 < error < 1e-4 for error in errors.values())
    for side in sections["eager"]["tiny, eager kernels"].values():
        assert side["tokens_per_s"] > 0
        assert side["predicted_peak_bytes"] > 0
        assert side["predicted_ms"] > 0
    assert sections["peers"]["plain"]["plain"]["ms"] > 0
    assert sections["kernels"]["tiny, eager kernels"]["kernels"]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"gpu_suite.json", "table.txt", "tests.xml"}
    assert done.stdout.strip() == (tmp_path / "out" / "table.txt").read_text().strip()
