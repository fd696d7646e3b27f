"""crnet sweep: what is tried, ranked and said; killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crnet.cli.sweep import values_of
from crnet.compare import processes, sweep
from crnet.compare.sweep import Search, Sweep
from crnet.config import presets
from crnet.config.serialize import override, with_text
from crnet.cost.step import step_flops
from crnet.cost.workload import workload
from crnet.errors import ConfigError
from test_cli import TINY, program, words
from test_train import losses_of, rows_of, run, tiny

BASE = override(presets.get("tiny"), train={"steps": 100}, model={"vocab_size": 64})
RATES = {"optimizer.lr": ["1e-3", "3e-3", "1e-2"]}


def study(out: Path, over: dict[str, list[str]], search: Search | None = None) -> Sweep:
    return Sweep(BASE, sweep.trials(BASE, over), search or Search(), out)


def noted(of: Sweep, share: float, losses: dict[str, float | None]) -> Sweep:
    """The search with results made up for it."""
    by_name = {trial.name: trial for trial in of.trials}
    for name, loss in losses.items():
        known = {"val_loss": loss, "val_bits_per_byte": loss}
        of._note(by_name[name], share, known if loss else {"problem": "diverged"})
    return of


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optimizer.lr", "3e-3", 3e-3),
        ("model.rank", "8", "8"),
        ("model.rank", "8x2,4x3", "8x2,4x3"),
        ("train.steps", "7", 7),
        ("train.compile", "true", True),
        ("train.epochs", "none", None),
        ("model.crnet.beta-init", "1", 1.0),
    ],
)
def test_a_value_is_read_as_the_command_line_reads_it(key: str, text: str, value: Any) -> None:
    found: Any = with_text(BASE, key, text)
    for name in key.replace("-", "_").split("."):
        found = getattr(found, name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"optimizer.lrr": ["1"]}, "no key optimizer.lrr; did you mean optimizer.lr"),
        ({"train.steps": ["2.5"]}, "train.steps is '2.5', which is not a int"),
        ({"optimizer": ["1"]}, "no key optimizer"),
        ({"model.linear": ["crnet", "foo"]}, "linear=foo: --model.linear is 'foo'"),
        ({"optimizer.lr": ["1e-3", "-1"]}, "lr=-1.0: --optimizer.lr"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is(
    over: dict[str, list[str]], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep.trials(BASE, over)


@pytest.mark.parametrize(
    ("search", "base", "said"),
    [
        (Search(share=0), {}, "--share is 0"),
        (Search(share=1.5), {}, "--share is 1.5"),
        (Search(share=0.1, halving=1), {}, "--halving is 1"),
        (Search(halving=2), {}, "say --share 0.1"),
        (Search(), {"epochs": 1}, "say --train.steps"),
        (Search(), {"stop_after_steps": 3}, "say --share"),
    ],
)
def test_a_search_that_cannot_be_made(search: Search, base: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep.check_search(override(BASE, train=base), RATES, search)


def test_over_is_read() -> None:
    assert values_of(["optimizer.lr=1e-3, 3e-3", "model.rank=8x2,4x3;16"]) == {
        "optimizer.lr": ["1e-3", "3e-3"],
        "model.rank": ["8x2,4x3", "16"],
    }
    assert values_of(["train.seed=0", "train.seed=0,1"]) == {"train.seed": ["0", "1"]}
    for wrong in ("optimizer.lr", "optimizer.lr=1,,2", "optimizer.lr="):
        with pytest.raises(ConfigError, match="say KEY=VALUE,VALUE"):
            values_of([wrong])
    with pytest.raises(ConfigError, match="names nothing"):
        sweep.check_search(BASE, {}, Search())


def test_trials_are_every_combination_once() -> None:
    found = sweep.trials(
        BASE, {"optimizer.lr": ["1e-3", "0.001", "2e-3"], "train.seed": ["0", "1"]}
    )
    names = ["lr=0.001,seed=0", "lr=0.001,seed=1", "lr=0.002,seed=0", "lr=0.002,seed=1"]
    assert [trial.name for trial in found] == names
    assert found[-1].config == override(BASE, optimizer={"lr": 2e-3}, train={"seed": 1})


def test_a_trial_keeps_its_schedule() -> None:
    (trial,) = sweep.trials(BASE, {"optimizer.lr": ["1e-3"]})
    stopped = trial.stopped(0.1).train
    assert (stopped.steps, stopped.stop_after_steps, stopped.eval_every_steps) == (100, 10, 10)


@pytest.mark.parametrize(
    ("search", "points", "rungs"),
    [
        (Search(0.1), 9, [(0.1, 9)]),
        (Search(0.1, 3), 9, [(0.1, 9), (pytest.approx(0.3), 3), (pytest.approx(0.9), 1)]),
        (Search(0.25, 2), 5, [(0.25, 5), (0.5, 3), (1.0, 2)]),
        (Search(0.5, 4), 3, [(0.5, 3), (1.0, 1)]),
    ],
)
def test_rungs(search: Search, points: int, rungs: list[Any]) -> None:
    assert search.rungs(points) == rungs


def test_points_are_ranked_by_the_mean_over_seeds(tmp_path: Path) -> None:
    over = {"optimizer.lr": ["1e-3", "3e-3", "1e-2"], "train.seed": ["0", "1"]}
    of = noted(
        study(tmp_path, over),
        1.0,
        {
            "lr=0.001,seed=1": 3.0,
            "lr=0.001,seed=0": 5.0,  # as it ends, not as it is named
            "lr=0.003,seed=0": 3.5,
            "lr=0.003,seed=1": 3.7,
            "lr=0.01,seed=0": 1.0,
            "lr=0.01,seed=1": None,
        },
    )
    ranked = of.ranked()
    assert [row["values"]["optimizer.lr"] for row in ranked] == [3e-3, 1e-3, 1e-2]
    assert [row["val_loss"] for row in ranked] == [pytest.approx(3.6), 4.0, None]
    assert ranked[1]["losses"] == [5.0, 3.0]
    assert ranked[2]["problems"] == ["diverged"]
    assert of.edges() == []
    table = sweep.table(of).splitlines()
    assert table[2] == "| 0.003 | 100 | 3.6000 | 3.6000 | 3.5000 / 3.7000 |"
    assert table[4] == "| 0.01 | 100 | - | - | diverged |"


@pytest.mark.parametrize(("best", "side"), [("0.001", "least"), ("0.01", "largest")])
def test_a_winner_at_the_edge_is_said(best: str, side: str, tmp_path: Path) -> None:
    losses = dict.fromkeys(["lr=0.001", "lr=0.003", "lr=0.01"], 4.0) | {f"lr={best}": 3.0}
    (said,) = noted(study(tmp_path, RATES), 1.0, losses).edges()
    assert f"optimizer.lr {best} is the {side} that was tried" in said


def test_a_rate_beyond_which_all_diverge_is_no_edge(tmp_path: Path) -> None:
    losses = {"lr=0.001": 4.0, "lr=0.003": 3.0, "lr=0.01": None}
    assert noted(study(tmp_path, RATES), 1.0, losses).edges() == []


def test_those_that_went_farthest_come_first(tmp_path: Path) -> None:
    of = noted(study(tmp_path, RATES), 0.5, {"lr=0.001": 3.0, "lr=0.003": 4.0, "lr=0.01": 5.0})
    noted(of, 1.0, {"lr=0.003": 3.9})
    assert [row["values"]["optimizer.lr"] for row in of.ranked()] == [3e-3, 1e-3, 1e-2]


def test_the_budget_is_counted(tmp_path: Path) -> None:
    """A trial that went on counts once, and each with its own FLOPs."""
    over = {"model.linear": ["full", "lowrank"]}
    of = noted(study(tmp_path, over), 0.1, {"linear=full": 3.0, "linear=lowrank": 4.0})
    noted(of, 0.5, {"linear=full": 2.0})
    flops = {}
    for name in ("full", "lowrank"):
        work = workload(override(BASE, model={"linear": name}))
        flops[name] = step_flops(work, work.plan)["total"]
    assert flops["full"] > flops["lowrank"]
    tokens = BASE.train.batch_size * BASE.data.sequence_length
    cost = of.budget()
    assert (cost["trials"], cost["tokens"]) == (2, 60 * tokens)
    assert cost["flops"] == 50 * flops["full"] + 10 * flops["lowrank"]


def test_what_will_be_trained_is_foreseen(tmp_path: Path) -> None:
    of = study(tmp_path, RATES, Search(0.25, 3))
    assert of.foreseen()["whole_runs"] == pytest.approx(2 * 0.25 + 0.75)
    assert not list(tmp_path.iterdir())


def test_another_base_is_refused(tmp_path: Path) -> None:
    noted(study(tmp_path, RATES), 1.0, {"lr=0.001": 3.0})
    other = override(BASE, train={"batch_size": 3})
    with pytest.raises(ConfigError, match=r"begun with train.batch_size 8 \(now 3\)"):
        next(Sweep(other, sweep.trials(other, RATES), Search(), tmp_path).run(1))


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    of = noted(study(tmp_path, RATES), 1.0, {"lr=0.001": 3.0, "lr=0.003": 2.0, "lr=0.01": None})
    assert sweep.picture(of) == tmp_path / "sweep.png"
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    assert sweep.picture(study(tmp_path, RATES)) is None  # nothing ended


HALVING = Search(0.5, 2)


def in_process(out: Path, corpus: Path, rates: list[str]) -> Sweep:
    base = tiny(corpus, train={"steps": 4, "save_every_steps": 0})
    return Sweep(base, sweep.trials(base, {"optimizer.lr": rates}), HALVING, out)


def test_trials_in_this_process(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other: the rows of a search, a trial that goes on has the losses of one that
    was never stopped, and what is finished is not run again."""
    rows = list(in_process(tmp_path / "a", corpus, ["1e-3", "2e-3"]).run(0))
    assert [row["step"] for row in rows] == [2, 2, 4]
    best = rows[-1]["trial"]
    base = tiny(corpus, train={"steps": 4}, optimizer={"lr": rows[-1]["values"]["optimizer.lr"]})
    run(base, tmp_path / "alone")
    assert losses_of(tmp_path / "a" / best) == losses_of(tmp_path / "alone")

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("was run again")

    monkeypatch.setattr(processes.training, "run", never)
    assert list(in_process(tmp_path / "a", corpus, ["1e-3", "2e-3"]).run(0)) == rows


def test_a_trial_that_fails_in_this_process(corpus: Path, tmp_path: Path) -> None:
    of = in_process(tmp_path / "a", corpus, ["1e20", "1e-3"])
    rows = list(of.run(0))
    assert [row["val_loss"] is None for row in rows] == [True, False, False]
    assert "loss" in rows[0]["problem"]
    assert of.ranked()[0]["values"] == {"optimizer.lr": 1e-3}


@pytest.mark.parametrize(("step", "said"), [(2, "SIGTERM stopped it"), (1, "a signal stopped it")])
def test_a_signal_stops_trials_in_this_process(
    step: int, said: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One between two runs, and one that a run has seen: it ended before its step."""
    begun = []

    def run(config: Any, folder: Path, **options: Any) -> Any:
        begun.append(folder.name)
        if step == 2 and len(begun) == 1:
            signal.raise_signal(signal.SIGTERM)
        return SimpleNamespace(step=step, tokens=1)

    monkeypatch.setattr(processes.training, "run", run)
    with pytest.raises(ConfigError, match=f"{said}; the same command goes on"):
        list(in_process(tmp_path / "a", corpus, ["1e-3", "2e-3"]).run(0))
    assert len(begun) == 1


@pytest.fixture
def told(corpus: Path) -> list[str]:
    flags = TINY | {"--data.source": str(corpus), "--train.steps": "40"}
    return ["sweep", *words(flags)]


def swept(out: Path, told: list[str], *more: str) -> dict[str, Any]:
    done = program(*told, "--out", str(out), *more, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_with_all_it_started_it_goes_on(told: list[str], tmp_path: Path) -> None:
    over = ["--over", "optimizer.lr=1e-3,2e-3,1e20", "--jobs", "2"]
    whole = swept(tmp_path / "whole", told, *over)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "crnet", *told, "--out", str(out), *over]
    process = subprocess.Popen(command, start_new_session=True)
    first = out / "lr=0.001"
    while not (first / "metrics.jsonl").exists() or len(rows_of(first)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    for pid in runs_under(out):  # a sweep that is killed leaves its runs behind
        os.kill(pid, signal.SIGKILL)
    again = swept(out, told, *over)
    assert [row["losses"] for row in again["ranked"]] == [row["losses"] for row in whole["ranked"]]
    assert [row["val_loss"] is None for row in again["ranked"]] == [False, False, True]
    assert "loss nan" in again["ranked"][2]["problems"][0]
    assert json.loads((out / "sweep.json").read_text())["ranked"] == again["ranked"]

    before = {file: file.stat().st_mtime_ns for file in out.glob("lr=*/metrics.jsonl")}
    more = swept(out, told, "--over", "optimizer.lr=1e-3,2e-3,3e-3", "--jobs", "1")
    assert {row["values"]["optimizer.lr"] for row in more["ranked"]} == {1e-3, 2e-3, 3e-3}
    same = [file for file, when in before.items() if file.stat().st_mtime_ns == when]
    assert {file.parent.name for file in same} >= {"lr=0.001", "lr=0.002"}, "was run again"


def runs_under(out: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_text()
        except OSError:
            continue
        if str(out) in line and "train" in line:
            found.append(int(process.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_halving_goes_on_from_where_a_trial_stands(told: list[str], tmp_path: Path) -> None:
    over = ["--over", "optimizer.lr=1e-4,2e-3", "--share", "0.5", "--halving", "2"]
    halved = swept(tmp_path / "halved", told, *over)
    best = halved["ranked"][0]
    assert best["values"]["optimizer.lr"] == 2e-3
    assert [row["step"] for row in halved["rows"]] == [20, 20, 40]
    alone = swept(tmp_path / "alone", told, "--over", "optimizer.lr=2e-3")
    assert alone["ranked"][0]["losses"] == best["losses"]  # bit for bit


@pytest.mark.slow
def test_a_signal_stops_it_and_all_it_started(told: list[str], tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "crnet", *told, "--out", str(out)]
    command += ["--over", "optimizer.lr=1e-3,2e-3,3e-3", "--jobs", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    first = out / "lr=0.001"
    while not (first / "metrics.jsonl").exists() or len(rows_of(first)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "SIGTERM stopped it; the same command goes on" in errors
    assert runs_under(out) == []
    assert not (out / "lr=0.003").exists()
    assert list((first / "checkpoints").iterdir()), "it has not saved"
