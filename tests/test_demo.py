"""The demo: each method with its own rate and initial scale, said in the table and the JSON."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest

from crnet.compare import demo
from crnet.config import presets
from crnet.config.serialize import to_dict
from crnet.errors import ConfigError
from crnet.storage import checkpoint, metrics
from test_cli import program
from test_parallel import signalled


@pytest.mark.parametrize("linear", demo.TUNED)
def test_a_side_differs_in_its_method_and_its_own_values(linear: str, monkeypatch) -> None:
    tuned = demo.Tuned(lr=7e-3, init_std=0.07, seeds=1)
    monkeypatch.setitem(demo.TUNED, linear, tuned)
    base = presets.get("tiny")
    side = demo.side_config(base, linear)
    assert (side.model.linear, side.model.init_std, side.optimizer.lr) == (linear, 0.07, 7e-3)
    same = dataclasses.replace(
        side,
        model=dataclasses.replace(side.model, linear=base.model.linear, init_std=0.02),
        optimizer=dataclasses.replace(side.optimizer, lr=base.optimizer.lr),
    )
    assert to_dict(same) == to_dict(base)


def test_an_unknown_side_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    with pytest.raises(ConfigError, match="no side lowrnk; it has crnet, full, lowrank"):
        demo.run(presets.get("tiny"), out, sides=("crnet", "lowrnk"))
    assert not out.exists()


def test_where_the_values_come_from_is_said() -> None:
    assert demo.tuning(["lowrank"]).endswith("The preset's, not swept: lowrank.")
    assert "on this corpus: crnet (1 seed), full (1 seed)." in demo.tuning(["crnet", "full"])


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
        assert config["optimizer"]["lr"] == row["lr"] == demo.TUNED[linear].lr
        assert config["model"]["init_std"] == row["init_std"] == demo.TUNED[linear].init_std
        tokens = config["train"]["batch_size"] * config["data"]["sequence_length"]
        assert row["step_s"] * row["tokens_per_s"] == pytest.approx(tokens)
    text = demo.table(figures)
    assert text.count(f"{demo.TUNED['full'].lr:.2g}") >= 1
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
