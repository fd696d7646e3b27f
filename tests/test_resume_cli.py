"""``--resume``, ``--resume auto`` and ``--no-resume`` of the real command line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crnet.cli.app import build_app
from crnet.storage import checkpoint
from test_cli import LONG, TINY, call, program, train_words, words  # noqa: F401
from test_train import rows_of, weights_of

Call = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], False),
        (["--resume"], True),
        (["--resume", "auto"], "auto"),
        (["--resume=auto"], "auto"),
        (["--no-resume"], False),
        (["llama-60m", "--resume", "auto"], "auto"),
        (["--resume", "--out", "run"], True),
    ],
)
def test_words(given: list[str], wanted: bool | str) -> None:
    _, bound, _ = build_app("train").parse_args(["train", *given], exit_on_error=False)
    assert bound.arguments.get("resume", False) == wanted


def test_auto_begins_and_then_goes_on(corpus: Path, tmp_path: Path, call: Call) -> None:  # noqa: F811
    """The same words, again and again, as a scheduler has it."""
    again = [*train_words(corpus, tmp_path / "run", train__steps="4"), "--resume", "auto"]
    assert call(*again)[0] == 0
    rows, weights = rows_of(tmp_path / "run"), weights_of(tmp_path / "run")
    code, out, err = call(*again)
    assert code == 0, err
    assert "step 4" in out
    assert rows_of(tmp_path / "run") == rows
    assert all(weights[name].equal(each) for name, each in weights_of(tmp_path / "run").items())
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (manifest["from_step"], len(manifest["earlier_starts"])) == (4, 1)


def test_auto_without_out_takes_the_newest_run_or_begins_one(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,  # noqa: F811
) -> None:
    monkeypatch.chdir(tmp_path)
    again = ["train", *words(TINY | {"--data.source": str(corpus), "--train.steps": "2"})]
    for _ in range(2):
        code, _, err = call(*again, "--resume", "auto")
        assert code == 0, err
    assert len(list((tmp_path / "crnet-runs").iterdir())) == 1
    assert call(*again, "--no-resume")[0] == 0
    assert len(list((tmp_path / "crnet-runs").iterdir())) == 2


@pytest.mark.slow
def test_auto_after_kill_9_is_the_uninterrupted_run(corpus: Path, tmp_path: Path) -> None:
    """Killed before the first checkpoint, and after one; weights and rows to the bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = LONG | {"train__steps": "40", "train__save_every_steps": "10"}
    assert program(*train_words(corpus, whole, **changes)).returncode == 0
    again = [*train_words(corpus, parts, **changes), "--resume", "auto"]
    for target in (3, 13):
        process = subprocess.Popen(
            [sys.executable, "-m", "crnet", *again], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline:
            if max((row["step"] for row in rows_of(parts)), default=0) >= target:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = program(*again)
    assert done.returncode == 0, done.stderr
    strip = [
        {k: v for k, v in row.items() if k not in ("tokens_per_s", "peak_bytes")}
        for row in rows_of(parts)
    ]
    assert strip == [
        {k: v for k, v in r.items() if k not in ("tokens_per_s", "peak_bytes")}
        for r in rows_of(whole)
    ]
    wanted = weights_of(whole)
    assert all(wanted[name].equal(each) for name, each in weights_of(parts).items())


def test_auto_where_nothing_was_saved_begins_again(
    corpus: Path,
    tmp_path: Path,
    call: Call,  # noqa: F811
) -> None:
    """run.json and half a checkpoint: what a kill during the first save leaves."""
    again = [*train_words(corpus, tmp_path / "run", train__steps="4"), "--resume", "auto"]
    assert call(*again)[0] == 0
    wanted, root = weights_of(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    (folder,) = root.iterdir()
    (folder / checkpoint.CHECKSUMS).unlink()
    folder.rename(root / f".unfinished-{folder.name}")
    code, _, err = call(*again)
    assert code == 0, err
    assert "no checkpoint was saved before; the run begins at step 0" in err
    assert all(wanted[name].equal(each) for name, each in weights_of(tmp_path / "run").items())
    shutil.rmtree(root)
    (tmp_path / "run" / "run.json").unlink()  # a folder without a run
    assert call(*again)[0] == 0


def test_auto_does_not_begin_anew_over_damaged_checkpoints(
    corpus: Path,
    tmp_path: Path,
    call: Call,  # noqa: F811
) -> None:
    """That would throw away what may still be saved."""
    again = [*train_words(corpus, tmp_path / "run", train__steps="4"), "--resume", "auto"]
    assert call(*again)[0] == 0
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    (folder / checkpoint.STATE).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, err = call(*again)
    assert code == 2
    assert "no whole checkpoint is left" in err
    code, out, err = call("evaluate", str(tmp_path / "run"), "--json")
    assert code == 0, err
    assert json.loads(out)["step"] == 4


def test_what_a_resumed_run_says(corpus: Path, tmp_path: Path, call: Call) -> None:  # noqa: F811
    folder = tmp_path / "run"
    assert call(*train_words(corpus, folder, train__steps="4"))[0] == 0
    base = ["train", "--resume", "--out", str(folder)]
    refused: dict[str, Any] = {
        "--train.batch-size 4": "--train.batch-size was 8 and is now 4; a resumed run keeps it",
        "--optimizer.schedule wsd": "--optimizer.schedule was 'cosine' and is now 'wsd'",
        "--model.crnet.beta-init 0.5": "--model.crnet.beta-init was 1.0 and is now 0.5",
        "--train.steps 3": "--train.steps 3: the run has done 4 steps",
    }
    for given, problem in refused.items():
        code, _, err = call(*base, *given.split())
        assert (code, problem in err) == (2, True), (given, err)
    code, _, err = call("train", "llama-60m", "--resume", "--out", str(folder))
    assert code == 2
    assert "began from the preset tiny, not llama-60m; leave the preset out" in err
    code, _, err = call(*base, "--train.steps", "8", "--optimizer.lr", "0.002")
    assert code == 0, err
    assert "crnet: resumed with --optimizer.lr 0.002 (was 0.0015)" in err
    assert "crnet: resumed with --train.steps 8 (was 4)" in err
    assert "crnet: step 4 ran at learning rate 0.00015, step 5 runs at 0.00" in err
    manifest = json.loads((folder / "run.json").read_text())
    assert [line.split(" (")[0] for line in manifest["resumed_with"][:2]] == [
        "resumed with --optimizer.lr 0.002",
        "resumed with --train.steps 8",
    ]
    code, _, err = call(*base)
    assert code == 0
    assert "resumed with" not in err
