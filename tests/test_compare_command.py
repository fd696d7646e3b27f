"""crnet compare, run: whole, killed, repeated, changed; with real processes on a small corpus."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from crnet.compare.comparison import FAILED, GRAVEYARD
from test_cli import program
from test_sweep_command import runs_under
from test_train import rows_of

STUDY = """
title = "A test"
seeds = [0, 1]
reference = "full"
[base]
model = {{ hidden_size = 32, intermediate_size = 48, num_layers = 3, num_heads = 2 }}
[base.data]
source = ["{corpus}"]
documents = "paragraph"
vocab_size = 300
sequence_length = 16
validation_tokens = 600
[base.train]
steps = 24
batch_size = 8
threads = 1
device = "cpu"
log_every_steps = 4
save_every_steps = 4
[tuning]
share = 0.25
finalists = 2
grid."optimizer.lr" = [1e-3, 1e-6, 1e20]
[rule]
level = 0.01
[compat]
batch_size = 8
[rows.full]
model.linear = "full"
[rows.crnet]
model = {{ linear = "crnet", rank = 8 }}
[rows.lowrank]
model.linear = "lowrank"
align = "flops"
align_to = "crnet"
"""


@pytest.fixture
def text(corpus: Path) -> str:
    return STUDY.format(corpus=corpus)


def compared(file: Path, out: Path, *more: str) -> dict[str, Any]:
    done = program("compare", str(file), "--out", str(out), *more, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def losses(found: dict[str, Any]) -> dict[str, list[float]]:
    return {name: [run["val_loss"] for run in row["runs"]] for name, row in found["rows"].items()}


def times(out: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in out.glob("*/*/metrics.jsonl")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_repeated_and_changed(text: str, tmp_path: Path) -> None:
    file, out = tmp_path / "mine.toml", tmp_path / "whole"
    file.write_text(text)
    whole = compared(file, out, "--jobs", "2")

    # Every row has every seed; what diverged is shown, and is no row's best.
    assert all(None not in each for each in losses(whole).values())
    for row in whole["rows"].values():
        assert row["best"] == {"optimizer.lr": 1e-3}
        better, worse, diverged = row["tuning"]["points"]
        assert "loss nan" in diverged["problems"][0]
        assert diverged["at_the_end"] == []
        assert better["at_the_end"] == [row["runs"][0]["val_loss"]]
        assert better["at_the_end"] < worse["at_the_end"]
        assert row["compat_perplexity"] < row["val_perplexity"]
    report = (out / "results.md").read_text()
    assert report.count("lr 1e+20: step") == 3
    assert "What is called better" in report
    assert (out / "report.html").read_text().count("data:image/svg") >= 2
    assert json.loads((out / "results.json").read_text()) == whole

    # A row's run is the run that crnet train makes of the same settings, to the bit.
    row = whole["rows"]["crnet"]["runs"][1]
    config = json.loads((out / row["folder"] / "run.json").read_text())["config"]
    assert (config["train"]["seed"], config["optimizer"]["lr"]) == (1, 1e-3)
    other = file.with_suffix(".json")
    del config["preset"]
    other.write_text(json.dumps({key: each for key, each in config.items() if key != "preset"}))
    words = ["--config", str(other), "--out", str(tmp_path / "alone"), "--json"]
    done = program("train", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["val_loss"] == row["val_loss"]

    # Repeated, it runs nothing: not what is finished, not what diverged.
    before = times(out)
    again = compared(file, out, "--jobs", "2")
    assert times(out) == before
    assert losses(again) == losses(whole)

    # Killed with what it began, the same command goes on.
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "crnet", "compare", str(file), "--out", str(out)]
    process = subprocess.Popen([*command, "--jobs", "1"], start_new_session=True)
    first = out / "crnet" / "lr=0.001,seed=0"
    while not (first / "metrics.jsonl").exists() or len(rows_of(first)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    for pid in runs_under(out):
        os.kill(pid, signal.SIGKILL)
    some = compared(file, out, "--jobs", "1", "--only", "crnet")
    assert losses(some) == losses(whole) | {"full": [], "lowrank": []} | {
        name: [None, None] for name in ("full", "lowrank") if some["rows"][name]["runs"]
    }
    assert losses(compared(file, out, "--jobs", "2")) == losses(whole)

    # Another rank: that row's runs go to the graveyard, the others stay.
    before = times(out)
    file.write_text(text.replace("rank = 8", "rank = 6"))
    changed = compared(file, out, "--jobs", "2", "--only", "crnet")
    assert losses(changed)["full"] == losses(whole)["full"]
    assert losses(changed)["crnet"] != losses(whole)["crnet"]
    buried = sorted(each.name for each in (out / GRAVEYARD / "crnet").iterdir())
    assert buried == ["lr=0.001,seed=0", "lr=0.001,seed=1", "lr=1e+20,seed=0", "lr=1e-06,seed=0"]
    assert {key: each for key, each in times(out).items() if "/full/" in key} == {
        key: each for key, each in before.items() if "/full/" in key
    }

    # Another study takes what is its own too, and makes the rest.
    other, taken = tmp_path / "other.toml", tmp_path / "taken"
    tuning = text[text.index("[tuning]") : text.index("[rule]")]
    words = text.replace(tuning, "").replace("[base]", "[base]\noptimizer.lr = 1e-3")
    other.write_text(words.replace("rank = 8", "rank = 6"))
    found = compared(other, taken, "--jobs", "2", "--reuse", str(tmp_path / "whole"))
    assert losses(found)["full"] == losses(whole)["full"]
    assert losses(found)["crnet"] != losses(whole)["crnet"]
    was = tmp_path / "whole" / "full" / "lr=0.001,seed=1" / "metrics.jsonl"
    assert times(taken)[str(taken / "full" / "seed=1" / "metrics.jsonl")] == was.stat().st_mtime_ns

    # What failed is tried once more where that is asked for.
    failed = out / "full" / "lr=1e+20,seed=0" / FAILED
    was = failed.stat().st_mtime_ns
    compared(file, out, "--jobs", "1", "--only", "full", "--retry")
    assert failed.stat().st_mtime_ns > was


@pytest.mark.slow
def test_an_orphan_is_waited_for_and_a_signal_is_said(text: str, tmp_path: Path) -> None:
    file, out = tmp_path / "mine.toml", tmp_path / "out"
    file.write_text(text.replace("steps = 24", "steps = 4000"))
    command = [sys.executable, "-m", "crnet", "compare", str(file), "--out", str(out)]
    process = subprocess.Popen([*command, "--jobs", "1"], start_new_session=True)
    first = out / "full" / "lr=0.001,seed=0"
    while not (first / "metrics.jsonl").exists() or len(rows_of(first)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()  # alone: its run trains on
    process.wait()
    done = program(*command[3:], "--jobs", "1")
    assert done.returncode == 2
    assert "of an earlier start, still trains there" in done.stderr
    for pid in runs_under(out):
        os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.05)

    process = subprocess.Popen(
        [*command, "--jobs", "1"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    count = len(rows_of(first))
    while len(rows_of(first)) < count + 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "SIGTERM stopped it; the same command goes on" in errors
    assert runs_under(out) == []
    assert json.loads((out / "results.json").read_text())["rows"]["full"]["runs"] == []


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    for words, said in (
        (["smal"], "is no study; there are"),
        (["smoke", "--jobs", "0"], "--jobs is 0"),
        (["smoke", "--only", "cola"], "no such row"),
        (["smoke", "--dry-run", "--report"], "do not go together"),
        (["smoke", "--report", "--out", str(tmp_path / "none")], "there is no such study"),
    ):
        done = program("compare", *words)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = program("compare", "smoke", "--out", str(tmp_path / "out"), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "hours with" in done.stdout
    assert list(tmp_path.iterdir()) == []
