"""``crnet watch``: what it shows is what the files say, whatever the terminal, and it ends."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crnet.cli.app import main
from crnet.errors import ConfigError
from crnet.report.watch import coloured, curve, duration, frame, look
from crnet.storage import files
from test_cli import train_words
from test_train import rows_of

ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@pytest.fixture
def stopped(runs: list[Path], tmp_path: Path) -> Path:
    """A run that was killed an hour ago, behind its eighth of twelve steps."""
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    rows = [row for row in rows_of(folder) if row["step"] <= 8]
    for row in rows:
        row |= {"tokens_per_s": 64.0} if "loss" in row else {"val_bits_per_byte": 2.25}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    then = time.time() - 3600
    os.utime(folder / "metrics.jsonl", (then, then))
    shutil.rmtree(folder / "checkpoints" / "step_12")
    return folder


def test_a_frame_says_what_the_files_say(runs: list[Path]) -> None:
    rows = rows_of(runs[0])
    training, last = [row for row in rows if "loss" in row], rows[-1]
    shown = frame(look(runs[0]))
    for words in (
        "finished",
        "step 12 of 12 (100%)",
        f"{training[-1]['tokens']:,} tokens",
        f"loss {training[-1]['loss']:.4f}",
        f"validation {last['val_loss']:.4f} at step 12",
        f"perplexity {last['val_perplexity']:,.2f}",
        "checkpoint of step 12",
    ):
        assert words in shown
    assert "left" not in shown


def test_a_run_that_stopped(stopped: Path) -> None:
    state = look(stopped)
    assert state.has_ended
    shown = frame(state)
    assert "stopped: no process here trains it, last figures 1 h 0 min ago" in shown
    assert "step 8 of 12 (67%)" in shown
    assert "bits per byte 2.250" in shown
    assert "checkpoint of step 8" in shown


def test_a_run_that_is_trained(stopped: Path) -> None:
    """Time is left as its rates say: 4 steps of 8 x 16 tokens, 64 a second."""
    with files.alone(stopped):
        state = look(stopped)
        assert not state.has_ended
        assert state.left_s == 8.0
        shown = frame(state)
    assert f"training, process {os.getpid()}" in shown
    assert "about 8 s left" in shown
    os.utime(stopped / "metrics.jsonl")
    state = look(stopped)  # of another machine, that writes into the same folder
    assert not state.has_ended
    assert "training elsewhere" in frame(state)


@pytest.mark.parametrize("width", [1, 20, 33, 80, 400])
def test_no_line_is_longer_than_the_terminal(stopped: Path, width: int) -> None:
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write("broken\n" * 2)
    state = look(stopped)
    for ascii_only in (False, True):
        lines = frame(state, width, ascii_only=ascii_only).split("\n")
        assert max(map(len, lines)) <= max(20, min(width, 100))
    assert "is no row of figures" in " ".join(frame(state, width).split())
    assert frame(state, width, ascii_only=True).isascii()


def test_colours_change_no_word(stopped: Path) -> None:
    state = look(stopped)
    painted = frame(state, 60, coloured)
    assert "\x1b[" in painted
    assert ESCAPES.sub("", painted) == frame(state, 60)


def test_a_curve_goes_from_its_highest_to_its_lowest() -> None:
    falling = curve([5.0, 4.0, 3.0, 2.0, math.nan], 20, 4)
    assert len(falling) == 4
    assert falling[0].startswith("  5.000 ")
    assert falling[-1].startswith("  2.000 ")
    assert falling[0][8] != "\u2800"
    assert falling[0][-1] == "\u2800" != falling[-1][-1]
    twice = curve([10.0, 8.0, 6.0, 4.0], 20, 4)
    assert [line[8:] for line in falling] == [line[8:] for line in twice]
    assert curve([1.0], 20, 4) == curve([math.nan, math.inf], 20, 4) == []
    assert len(curve([2.0, 2.0], 20, 4)) == 4
    long = curve([float(idx % 97) for idx in range(100_000)], 60, 6)
    assert {len(line) for line in long} == {60}


def test_durations_are_read() -> None:
    wanted = {4.4: "4 s", 61: "1 min 1 s", 7500: "2 h 5 min", 180_000: "2 d 2 h"}
    assert {seconds: duration(seconds) for seconds in wanted} == wanted


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"there is no run\.json in it"):
        look(tmp_path)
    (tmp_path / "run.json").write_text('{"config": {"model": {"rnak": 3}}}')
    with pytest.raises(ConfigError, match=r"run\.json: unknown key model\.rnak"):
        look(tmp_path)
    for every in ("0", "nan", "-1"):
        with pytest.raises(SystemExit) as end:
            main(["watch", str(tmp_path), f"--every-s={every}"])
        assert end.value.code == 2
        assert "--every-s" in capsys.readouterr().err


def test_into_a_pipe_it_is_shown_once(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with files.alone(stopped), pytest.raises(SystemExit) as end:
        main(["watch", str(stopped)])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.count("step 8 of 12") == 1
    assert "\x1b" not in out


@pytest.mark.slow
def test_it_follows_a_run_to_its_end_and_loads_no_torch(corpus: Path, tmp_path: Path) -> None:
    """A real run, watched in a terminal."""
    out = tmp_path / "run"
    words = train_words(corpus, out, train__log_every_steps="1", train__steps="40")
    training = subprocess.Popen([sys.executable, "-m", "crnet", *words], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out / "run.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        watched = _in_a_terminal("--every-s", "0.1", str(out))
    finally:
        assert training.wait(120) == 0
    frames = re.split(r"\x1b\[\d+F\x1b\[J", watched)
    assert len(frames) > 1
    assert f"training, process {training.pid}" in frames[0]
    assert look(out).is_finished
    assert "Traceback" not in watched
    assert "torch" not in watched.splitlines()[-1]


def _in_a_terminal(*words: str) -> str:
    """What ``crnet watch`` writes to a terminal, and the modules of torch that it imported."""
    program = (
        "import sys; from crnet.cli.app import main\n"
        f"try: main(['watch', *{words!r}])\n"
        "finally: print([name for name in sys.modules if name == 'torch'])"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL
    )
    os.close(theirs)
    found = b""
    try:
        while piece := _read(ours):
            found += piece
    finally:
        os.close(ours)
    assert process.wait(60) == 0
    return found.decode()


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 65536)
    except OSError:  # the terminal's other side is closed
        return b""
