"""Trackers get every figure, a resumed run goes on with the run of before, and none can stop it.

The real packages, without a network: what they wrote is read back. Figures are equal by bits, but
for TensorBoard's event files, which hold fp32.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crnet import trackers
from crnet.cli.app import main
from crnet.config.serialize import override
from crnet.errors import ConfigError
from crnet.trackers import Place, Trackers
from test_train import losses_of, rows_of, run, tiny, weights_of


class Recorded:
    """A tracker that writes down what it is told, and raises where it is to."""

    PACKAGE = "json"

    def __init__(self, fails_at: str = "", step: int = 0):
        self.fails_at, self.step = fails_at, step
        self.calls: list[tuple[str, Any]] = []

    def start(self, place: Place) -> Recorded:
        self._note("start", place)
        return self

    def config(self, values: Any) -> None:
        self._note("config", values)

    def log(self, row: Any, step: int) -> None:
        self._note("log" if step >= self.step else "", (step, row))

    def close(self) -> None:
        self._note("close", None)

    def _note(self, name: str, what: Any) -> None:
        self.calls.append((name or "log", what))
        if name and name == self.fails_at:
            raise OSError("the server is gone\nsecond line")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put trackers in the place of the real ones."""

    def put(**named: Any) -> None:
        monkeypatch.setattr(trackers, "NAMES", tuple(named))
        monkeypatch.setattr(trackers, "_module", named.__getitem__)

    return put


def test_the_trackers_are_files_of_the_folder() -> None:
    assert trackers.NAMES == ("tensorboard", "trackio", "wandb")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            "wandb,mlflow",
            "'mlflow' is no tracker; write one or more of tensorboard, trackio, wandb",
        ),
        ("wandb,wandb", "one stands there twice"),
        ("", "'' is no tracker"),
    ],
)
def test_names_are_checked(words: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", f"--train.trackers={words}"])
    assert end.value.code == 2
    assert problem in capsys.readouterr().err


def test_what_is_not_installed_is_named(corpus: Path, tmp_path: Path, install: Any) -> None:
    """Before anything is made."""
    install(one=SimpleNamespace(PACKAGE="no_such_package"), two=Recorded())
    with pytest.raises(ConfigError, match=r"one needs the no_such_package package: pip install"):
        run(tiny(corpus, train={"trackers": "one,two"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_row_goes_to_every_tracker(corpus: Path, tmp_path: Path, install: Any) -> None:
    one, two = Recorded(), Recorded()
    install(one=one, two=two)
    config = tiny(corpus, train={"trackers": "one, two"})
    run(config, tmp_path / "run")
    for each in (one, two):
        names = [name for name, _ in each.calls]
        assert names == ["start", "config", *["log"] * (len(names) - 3), "close"]
        assert each.calls[1][1]["train"]["steps"] == 12
        logged = [what for name, what in each.calls if name == "log"]
        assert logged == [
            (row["step"], {k: v for k, v in row.items() if k not in ("step", "val_precision")})
            for row in rows_of(tmp_path / "run")
        ]


@pytest.mark.parametrize("at", ["start", "config", "log", "close"])
def test_a_tracker_that_fails_is_named_once_and_changes_nothing(
    at: str, corpus: Path, tmp_path: Path, install: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, good = Recorded(at, step=5), Recorded()
    install(broken=broken, good=good)
    run(tiny(corpus, train={"trackers": "broken,good"}), tmp_path / "tracked")
    said = [line for line in capsys.readouterr().err.splitlines() if "broken" in line]
    assert said == [
        "crnet: warning: tracker broken failed and is left out from here on (the server is gone); "
        "metrics.jsonl has every figure"
    ]
    assert broken.calls[-1][0] == at  # it is not called again
    assert good.calls[-1][0] == "close"
    run(tiny(corpus), tmp_path / "plain")
    assert losses_of(tmp_path / "tracked") == losses_of(tmp_path / "plain")
    wanted = weights_of(tmp_path / "plain")
    assert all(bool((w == wanted[n]).all()) for n, w in weights_of(tmp_path / "tracked").items())


def test_a_resumed_run_is_the_same_run(corpus: Path, tmp_path: Path, install: Any) -> None:
    first, second = Recorded(), Recorded()
    config = tiny(corpus, train={"trackers": "one"})
    install(one=first)
    run(config, tmp_path / "run")
    install(one=second)
    more = override(config, train={"steps": 16})
    run(more, tmp_path / "run", resume=True)
    begun, gone_on = first.calls[0][1], second.calls[0][1]
    assert begun.identity == gone_on.identity
    assert (begun.first_step, gone_on.first_step) == (0, 13)
    assert min(step for name, (step, _) in _logged(second)) == 13
    assert second.calls[1][1]["train"]["steps"] == 16


def _logged(tracker: Recorded) -> list[tuple[str, Any]]:
    return [call for call in tracker.calls if call[0] == "log"]


def test_without_trackers_nothing_is_made(runs: list[Path]) -> None:
    assert not (runs[0] / trackers.IDENTITY).exists()
    assert trackers.parse(None) == []


# The real ones, each in a process of its own: they start threads and processes


def tracked(name: str, corpus: Path, folder: Path, **environment: str) -> Path:
    """A run of 8 steps, and 4 more after a resume."""
    program = (
        "import sys; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import torch; torch.set_num_threads(1)\n"
        "from crnet.config.serialize import override\n"
        "from test_train import run, tiny\n"
        "name, corpus, out = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])\n"
        "config = tiny(corpus, train={'trackers': name, 'steps': 8})\n"
        "run(config, out)\n"
        "run(override(config, train={'steps': 12}), out, resume=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent), name, str(corpus), str(folder)],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    assert "failed and is left out" not in done.stderr, done.stderr
    return folder


def wanted(folder: Path, key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows_of(folder) if key in row]


KEYS = ("loss", "lr", "grad_norm", "tokens", "val_loss", "val_perplexity")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # tensorboard's own, by its version
def test_tensorboard(corpus: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tracked("tensorboard", corpus, tmp_path / "run")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for key in KEYS:
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert [step for step, _ in found] == [step for step, _ in wanted(folder, key)]
        assert [v for _, v in found] == pytest.approx([v for _, v in wanted(folder, key)], rel=1e-6)
    assert len(events.Tensors("config/text_summary")) == 2


def pieces(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    content, block, at, whole = file.read_bytes(), 32_768, 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:  # what is left of a block is filled
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield whole
            whole = b""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # wandb's own, by its version
def test_wandb(corpus: Path, tmp_path: Path) -> None:
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    folder = tracked(
        "wandb", corpus, tmp_path / "run", WANDB_MODE="offline", WANDB_SILENT="true",
        WANDB_CACHE_DIR=str(tmp_path), WANDB_CONFIG_DIR=str(tmp_path),
        WANDB_DATA_DIR=str(tmp_path),
    )  # fmt: skip
    identity = (folder / trackers.IDENTITY).read_text().strip()
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda f: f.stat().st_mtime)
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    rows, configured = [], {}
    for piece in (piece for file in files for piece in pieces(file)):
        record = internal.Record()
        record.ParseFromString(piece)
        for items, target in ((record.history.item, {}), (record.config.update, configured)):
            for item in items:
                target[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            if items and target is not configured:
                rows.append(target)
    for key in KEYS:
        assert [(row["step"], row[key]) for row in rows if key in row] == wanted(folder, key)
    assert configured["train"]["steps"] == 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # trackio's own, by its version
def test_trackio(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    folder = tracked(
        "trackio", corpus, tmp_path / "run", TRACKIO_DIR=str(tmp_path / "trackio"),
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    (database,) = (tmp_path / "trackio").glob("crnet*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute(
            "SELECT run_name, step, metrics FROM metrics ORDER BY id"
        ).fetchall()
    identity = (folder / trackers.IDENTITY).read_text().strip()
    assert {name for name, _, _ in found} == {f"run-{identity}"}
    rows = [(step, json.loads(figures)) for _, step, figures in found]
    for key in KEYS:
        assert [(step, row[key]) for step, row in rows if key in row] == wanted(folder, key)
    assert all(math.isfinite(row["loss"]) for _, row in rows if "loss" in row)


def test_trackers_have_no_effect_on_random_numbers(tmp_path: Path, install: Any) -> None:
    install(one=Recorded())
    before = torch.get_rng_state()
    made = Trackers(["one"], Place(tmp_path, trackers.identity_of(tmp_path), 0), {})
    made.close()
    assert bool((torch.get_rng_state() == before).all())
