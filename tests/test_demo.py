"""The demo: each method with its own rate and initial scale, said in the table and the JSON."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from crnet.compare import demo
from crnet.compare.study import read
from crnet.config.serialize import flags
from crnet.errors import ConfigError
from crnet.storage import checkpoint, metrics
from test_cli import program
from test_parallel import signalled

ROWS = read(demo.STUDY).rows
"""What the demo can train."""
ROOT = Path(__file__).parent.parent
OWN = {"model.linear", "model.init_std"}
"""Keys that are a side's own."""


def test_sides_differ_in_their_method_and_what_suits_it() -> None:
    sides = [dict(flags(config)) for config in demo.sides_of(list(ROWS)).values()]
    differs = {key for key in sides[0] if len({str(side[key]) for side in sides}) > 1}
    assert differs == OWN


def test_an_unknown_side_is_refused() -> None:
    with pytest.raises(ConfigError, match="no side lowrnk; it has crnet, full, lowrank"):
        demo.sides_of(["crnet", "lowrnk"])


def test_where_the_values_come_from_is_said() -> None:
    assert demo.tuning(["lowrank"]).endswith("lowrank: best of a sweep on this corpus, 1 seed.")
    assert "crnet: best of a sweep on this corpus, 1 seed; full: " in demo.tuning(["crnet", "full"])


@pytest.mark.parametrize("side", ROWS)
def test_each_side_has_the_best_point_of_its_sweep(side: str) -> None:
    sweeps = json.loads((ROOT / "benchmarks/2026-11-27-demo-rates.json").read_text())
    best = min(sweeps["sides"][side]["ranked"], key=lambda point: point["val_loss"])
    known = dict(flags(demo.sides_of([side])[side]))
    assert {key: known[key] for key in best["values"]} == best["values"]


@pytest.mark.slow
def test_three_sides(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    words = "demo --quick --steps 4 --side lowrank --side crnet --side full --json".split()
    done = program(*words, "--out", str(out))
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert list(figures["rows"]) == ["lowrank", "crnet", "full"]
    for linear, row in figures["rows"].items():
        config = json.loads((out / linear / "run.json").read_text(encoding="utf-8"))["config"]
        assert config["model"]["linear"] == linear
        assert config["optimizer"]["lr"] == row["lr"] == ROWS[linear].config.optimizer.lr
        assert config["model"]["init_std"] == row["init_std"] == ROWS[linear].config.model.init_std
        tokens = config["train"]["batch_size"] * config["data"]["sequence_length"]
        assert row["step_s"] * row["tokens_per_s"] == pytest.approx(tokens)
    text = demo.table(figures)
    assert text.count(f"{ROWS['full'].config.optimizer.lr:.2g}") >= 1
    assert demo.tuning(list(figures["rows"])) in text


QUICK = "demo --quick --steps 4000 --out".split()


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_side_once(sign: signal.Signals, tmp_path: Path) -> None:
    """Each saves after its step; a second signal would have ended it before."""
    logs = [tmp_path / "demo" / linear / "metrics.jsonl" for linear in ("crnet", "full")]

    def are_training() -> bool:
        return all(log.exists() and log.read_text().count("\n") > 2 for log in logs)

    words = ["-m", "crnet", *QUICK, str(tmp_path / "demo")]
    code, said = signalled(words, sign, are_training)
    assert code == 2
    assert f"{sign.name} stopped it" in said
    assert "Traceback" not in said
    for log in logs:
        saved = checkpoint.newest(log.parent)
        assert saved is not None
        assert metrics.read(log)[-1]["step"] <= saved.progress.step < 4000


@pytest.mark.slow
def test_a_side_that_fails_stops_the_other(tmp_path: Path) -> None:
    """The failed one says why; the other one has saved."""
    (tmp_path / "demo" / "full").mkdir(parents=True)
    (tmp_path / "demo" / "full" / "run.json").write_text("{}")
    done = program(*QUICK, str(tmp_path / "demo"))
    assert done.returncode != 0
    assert str(tmp_path / "demo" / "full") in done.stderr
    assert "Traceback" not in done.stderr
