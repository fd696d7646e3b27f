"""runs/sweep.py: words arrive as they were written, an interrupted sweep goes on, and no old figure
passes for a new one."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from test_cli import TINY, words
from test_train import rows_of

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def specs(tmp_path: Path, corpus: Path) -> dict[str, str]:
    """Three short runs of a corpus whose name has a blank."""
    source = tmp_path / "my corpus.txt"
    source.write_text(corpus.read_text(encoding="utf-8"), encoding="utf-8")
    flags = TINY | {"--data.source": str(source), "--train.log-every-steps": "1"}
    return {
        f"lr{lr}": shlex.join(words(flags | {"--optimizer.lr": lr, "--train.steps": "60"}))
        for lr in ("1e-3", "2e-3", "3e-3")
    }


def start(specs: dict[str, Any], out: Path) -> subprocess.Popen[str]:
    file = out.parent / "specs.json"
    file.write_text(json.dumps(specs), encoding="utf-8")
    command = [sys.executable, str(ROOT / "runs" / "sweep.py"), str(file), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--jobs", "2"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(specs: dict[str, Any], out: Path) -> tuple[dict[str, Any], str]:
    process = start(specs, out)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads((out / "sweep.json").read_text(encoding="utf-8")), printed


def test_an_interrupted_sweep_goes_on(specs: dict[str, str], tmp_path: Path) -> None:
    whole, _ = finished(specs, tmp_path / "whole")
    out = tmp_path / "stopped"
    process = start(specs, out)
    first = out / "lr1e-3"
    while len(rows_of(first)) < 6 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "stopped; the same command goes on" in errors
    assert "Traceback" not in errors
    assert not (out / "sweep.json").exists()
    assert not (out / "lr3e-3").exists(), "another run was begun"
    saved = rows_of(first)[-1]["step"]
    assert 5 <= saved < 60
    again, _ = finished(specs, out)
    assert set(again) == set(specs)
    for name, figures in again.items():
        assert figures["val_loss"] == whole[name]["val_loss"]  # bit for bit
    starts = json.loads((first / "run.json").read_text(encoding="utf-8"))
    assert starts["from_step"] == saved


def test_words_arrive_and_old_figures_are_not_taken_for_new(
    specs: dict[str, str], tmp_path: Path
) -> None:
    name, line = next(iter(specs.items()))
    out = tmp_path / "out"
    given = {name: shlex.split(line), "bad": "tiny --train.stepz 3"}
    found, printed = finished(given, out)
    config = json.loads((out / name / "run.json").read_text(encoding="utf-8"))["config"]
    assert config["data"]["source"] == [str(tmp_path / "my corpus.txt")]
    assert config["optimizer"]["lr"] == 1e-3
    assert found[name]["step"] == 60
    assert "--train.stepz" in found["bad"]["failed"]
    assert "Did you mean" in printed
    changed = {name: line.replace("--optimizer.lr 1e-3", "--optimizer.lr 5e-3")}
    assert changed[name] != line
    again, _ = finished(changed, out)
    assert "was begun with other words" in again[name]["failed"]
