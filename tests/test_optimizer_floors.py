"""runs/optimizer_floors.py: what is swept, how far a grid goes, and what stands beside a loss."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from crnet import optimizers
from crnet.compare.sweep import Search, Sweep, trials
from crnet.config import presets
from crnet.config.check import check
from crnet.config.serialize import override
from crnet.errors import ConfigError

BASE = override(presets.get("tiny"), model={"vocab_size": 64}, train={"steps": 100})


@pytest.fixture
def floors(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1] / "runs")])
    import optimizer_floors

    return optimizer_floors


def test_every_optimizer_is_swept_after_its_floor(floors: Any) -> None:
    entries = floors.entries()
    assert len(entries) == len({*entries})
    assert {entry.partition("/")[2] for entry in entries} == {*optimizers.names()}
    for idx, entry in enumerate(entries):
        linear, _, name = entry.partition("/")
        assert entries.index(f"{linear}/sgd") <= idx
        assert optimizers.get(name).steps_pairs <= (linear == "lowrank")
        check(floors.base_of(BASE, entry, 192))


def test_intervals_are_shorter_than_the_run(floors: Any) -> None:
    """Every option that counts steps, of every optimizer."""
    for entry in floors.entries():
        optimizer = floors.base_of(BASE, entry, 192).optimizer
        options = getattr(optimizer, optimizer.name.replace("-", "_"), None)
        for name, value in vars(options or object).items():
            if name.endswith("_every"):
                assert value <= BASE.train.steps / 4, (entry, name)


@pytest.mark.parametrize(
    ("losses", "more"),
    [
        ([3.0, 2.0, 4.0], None),
        ([2.0, 3.0, 4.0], 1e-3 / 3),
        ([4.0, 3.0, 2.0], 9e-3 * 3),
        ([None, None, None], 1e-3 / 3),
        ([None, 2.0, None], None),
    ],
)
def test_a_grid_goes_on_at_its_edge(
    losses: list[float | None], more: float | None, floors: Any, tmp_path: Path
) -> None:
    found = trials(BASE, {"optimizer.lr": ["1e-3", "3e-3", "9e-3"]})
    study = Sweep(BASE, found, Search(), tmp_path)
    for trial, loss in zip(found, losses, strict=True):
        known = {"val_loss": loss, "val_bits_per_byte": loss}
        study._note(trial, 1.0, known if loss else {"problem": "diverged"})
    assert floors.beyond(study) == (None if more is None else pytest.approx(more))


def test_a_loss_stands_beside_sgds_on_the_same_maps(floors: Any) -> None:
    losses = {"full/sgd": 3.0, "lowrank/sgd": 2.5, "full/lion": 2.75, "lowrank/adamw": None}
    told = floors.with_floors({name: {"val_loss": loss} for name, loss in losses.items()})
    assert [each["floor"] for each in told.values()] == [3.0, 2.5, 3.0, 2.5]
    assert [each["below_floor"] for each in told.values()] == [0.0, 0.0, 0.25, None]


def test_a_corpus_that_is_not_there_is_named(floors: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.txt.xz, .*valid.txt.xz: not there; --wikitext"):
        floors.wikitext(tmp_path)
    with pytest.raises(ValueError, match="or say --quick"):
        floors.wikitext(None)


def test_a_search_that_was_stopped_stops_the_program(
    floors: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It does not go on to the next optimizer."""
    begun = []

    def stopped(base: Any, out: Path, jobs: int) -> None:
        begun.append(out)
        raise ConfigError("SIGTERM stopped it; the same command goes on")

    monkeypatch.setattr(floors, "swept", stopped)
    monkeypatch.setattr(sys, "argv", ["optimizer_floors.py", "--quick", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="SIGTERM stopped it"):
        floors.main()
    assert len(begun) == 1
