"""What a resumed run keeps, what it may change, and which plugins it needs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crnet.config.resuming import Free, OnResume, changes, declared_rule
from crnet.config.sections import RunConfig
from crnet.config.serialize import from_dict, override, to_dict
from crnet.data.prepare import prepare
from crnet.errors import ConfigError
from crnet.storage import checkpoint
from crnet.storage.checkpoint import Checkpoint, Progress
from crnet.train.resume import check_same_run, say_changes
from crnet.train.step import learning_rate
from test_config import FIELDS, another, to_dict_value
from test_optimizer_state import assert_same
from test_train import rows_of, run, tiny, weights_of

# Every key


HASHES = {"tokenizer": "t", "corpus": "c"}


def saved_at(step: int, config: RunConfig) -> Checkpoint:
    progress = Progress(step=step, position=step * 8, tokens=step * 128)
    return Checkpoint(Path("/nowhere"), to_dict(config), progress, HASHES)


def declared(path: tuple[str, ...]) -> OnResume | None:
    section: Any = RunConfig()
    for key in path[:-1]:
        section = getattr(section, key)
    return declared_rule(type(section), path[-1])


@pytest.mark.parametrize("path", [path for path, _, _ in FIELDS], ids=".".join)
def test_every_key_is_refused_or_applied_and_said(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    ((default, hint),) = [(value, hint) for each, value, hint in FIELDS if each == path]
    rule = declared(path)
    assert rule is not None or len(path) == 3, "Fixed or Free? say it where the key is"
    plain = to_dict(RunConfig())
    inner = plain
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to_dict_value(another(default, hint))
    config, saved = from_dict(plain), saved_at(5, RunConfig())
    flag = "--" + ".".join(path).replace("_", "-")
    if rule is OnResume.APPLIED:
        first, *more = say_changes(saved, config, HASHES)
        assert first == f"resumed with {flag} {another(default, hint)} (was {default})"
        assert [f"crnet: {line}" for line in (first, *more)] == capsys.readouterr().err.splitlines()
    else:  # also what declares nothing: an option of a method, of a plugin's too
        with pytest.raises(ConfigError) as caught:
            check_same_run(saved, config, HASHES)
        (problem,) = caught.value.problems
        assert problem.startswith(f"{flag} was {default!r} and is now {another(default, hint)!r}")


def test_an_option_may_declare_itself_free() -> None:
    @dataclasses.dataclass(frozen=True)
    class Options:
        kept: int = 1
        free: Free[int] = 1

    # Types of a class inside a function are no names of its module.
    Options.__annotations__ = {"kept": int, "free": Free[int]}
    found = list(changes(Options(), Options(kept=2, free=2), "--model.mine."))
    assert [(each.flag, each.rule) for each in found] == [
        ("--model.mine.kept", OnResume.REFUSED),
        ("--model.mine.free", OnResume.APPLIED),
    ]


@pytest.mark.parametrize(
    ("changed", "jumps"),
    [
        ({"optimizer": {"lr": 3e-3}}, True),
        ({"optimizer": {"warmup_frac": 0.5}}, True),
        ({"optimizer": {"min_lr_frac": 0.5}}, True),
        ({"train": {"steps": 30}}, True),
        ({"optimizer": {"clip_norm": 0.5}}, False),
        ({"train": {"micro_batch_size": 4}}, False),
    ],
)
def test_a_jump_of_the_rate_is_said_with_both_rates(
    changed: dict[str, Any], jumps: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    old = override(RunConfig(), train={"steps": 20})
    new = override(old, **changed)
    (first, *more) = say_changes(saved_at(10, old), new, HASHES)
    before, after = learning_rate(10, old), learning_rate(11, new)
    said = [f"step 10 ran at learning rate {before:.4g}, step 11 runs at {after:.4g}"]
    assert more == (said if jumps else [])
    assert first in capsys.readouterr().err


def test_an_unchanged_run_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert say_changes(saved_at(10, RunConfig()), RunConfig(), HASHES) == []
    assert capsys.readouterr().err == ""


def test_fewer_steps_than_are_done_are_refused() -> None:
    config = override(RunConfig(), train={"steps": 9})
    with pytest.raises(ConfigError, match=r"--train\.steps 9: the run has done 10 steps; take 10"):
        check_same_run(saved_at(10, RunConfig()), config, HASHES)
    config = override(RunConfig(), train={"steps": 10})
    assert len(check_same_run(saved_at(10, RunConfig()), config, HASHES)) == 1


# Runs


def test_resume_refuses_another_model_data_or_seed_and_lists_all(
    corpus: Path, tmp_path: Path
) -> None:
    config = tiny(corpus, train={"steps": 4})
    run(config, tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = override(
        config,
        model={"hidden_size": 64, "norm_eps": 1e-5},
        data={"sequence_length": 32, "rows": "document"},
        train={"seed": 1, "precision": "bf16"},
    )
    with pytest.raises(ConfigError) as caught:
        run(changed, tmp_path / "run", resume=True)
    problems = caught.value.problems
    assert len(problems) == 6
    for flag, old, new in (
        ("--model.hidden-size", "32", "64"),
        ("--model.norm-eps", "1e-06", "1e-05"),
        ("--data.sequence-length", "16", "32"),
        ("--data.rows", "'packed'", "'document'"),
        ("--train.seed", "0", "1"),
        ("--train.precision", "'fp32'", "'bf16'"),
    ):
        (problem,) = (p for p in problems if p.startswith(flag + " "))
        assert old in problem
        assert new in problem
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_resume_refuses_a_corpus_that_has_changed(corpus: Path, tmp_path: Path) -> None:
    """Also where the tokenizer is the same: other rows would be read from there on."""
    text = tmp_path / "text.txt"
    text.write_text(corpus.read_text())
    tokenizer = prepare(tiny(corpus).data, progress=False).folder / "tokenizer.json"
    config = tiny(text, data={"tokenizer": str(tokenizer)}, train={"steps": 4})
    run(config, tmp_path / "run")
    text.write_text(corpus.read_text()[:20_000])
    with pytest.raises(ConfigError):
        run(override(config, train={"steps": 6}), tmp_path / "run", resume=True)


def test_resume_can_extend_a_run(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, train={"steps": 6})
    first = run(config, tmp_path / "run")
    assert (first.step, first.finished) == (6, True)
    longer = override(config, train={"steps": 10})
    second = run(longer, tmp_path / "run", resume=True)
    assert (second.step, second.finished, second.tokens) == (10, True, 10 * 8 * 16)
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert [row["lr"] for row in rows if "lr" in row] == [
        learning_rate(step, config if step <= 6 else longer) for step in range(1, 11)
    ]
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [start["from_step"] for start in (*manifest["earlier_starts"], manifest)] == [0, 6]
    assert manifest["config"]["train"]["steps"] == 10
    said = manifest["resumed_with"]
    assert said[0] == "resumed with --train.steps 10 (was 6)"
    assert f"runs at {learning_rate(7, longer):.4g}" in said[1]
    assert manifest["earlier_starts"][0]["resumed_with"] == []


def rates(schedule: str, steps: int) -> dict[str, dict[str, Any]]:
    """A run with a warm-up of two steps; of wsd the last fifth falls."""
    saved = {"save_every_steps": 3, "keep_checkpoints": 1, "eval_every_steps": 0}
    optimizer = {"schedule": schedule, "warmup_frac": 2 / steps}
    return {"train": {"steps": steps, **saved}, "optimizer": optimizer}


def assert_same_end(one: Path, other: Path) -> None:
    """Bit: weights, the optimizer's state, the figures of every step."""
    ours, wanted = checkpoint.newest(one), checkpoint.newest(other)
    assert ours is not None
    assert wanted is not None
    assert_same(ours.weights(), wanted.weights())
    assert_same(ours.state(), wanted.state())
    assert ours.progress == wanted.progress
    figures = ("step", "loss", "lr", "grad_norm", "val_loss")
    found, expected = (
        [{key: row[key] for key in figures if key in row} for row in rows_of(folder)]
        for folder in (one, other)
    )
    assert [row for row in found if "lr" in row] == [row for row in expected if "lr" in row]
    assert [row for row in found if "val_loss" in row][-1] == expected[-1]


@pytest.mark.parametrize(("schedule", "kept"), [("wsd", 8), ("constant", 10)])
def test_a_finished_run_extends_into_another_budget(
    schedule: str, kept: int, corpus: Path, tmp_path: Path
) -> None:
    """From the checkpoint before the fall, though newer ones are there and one alone is to stay."""
    short, long = (tiny(corpus, **rates(schedule, steps)) for steps in (10, 20))
    run(short, tmp_path / "run")
    steps = [10, 8] if schedule == "wsd" else [10]
    assert [path.name for path in checkpoint.found(tmp_path / "run")] == [
        f"step_{step}" for step in steps
    ]
    stopped = run(override(long, train={"stop_after_steps": 9}), tmp_path / "run", resume=True)
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["from_step"] == kept
    if schedule == "wsd":  # the end of the shorter run lies beside it, and is passed over again
        assert stopped.step == 9
        assert checkpoint.folder_of(tmp_path / "run", 10).exists()
    run(long, tmp_path / "run", resume=True)
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["from_step"] == (9 if schedule == "wsd" else 10)
    run(long, tmp_path / "whole")
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_run_whose_stable_checkpoint_is_gone_extends_from_its_end(
    corpus: Path, tmp_path: Path
) -> None:
    config = tiny(corpus, **rates("wsd", 10))
    run(config, tmp_path / "run")
    shutil.rmtree(checkpoint.folder_of(tmp_path / "run", 8))
    longer = override(config, train={"steps": 12})
    run(longer, tmp_path / "run", resume=True)
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["from_step"] == 10
    assert any("step 10 ran at learning rate" in line for line in manifest["resumed_with"])


def test_another_warmup_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """The share of more steps is more of them; with the share that is said nothing is."""
    old = override(RunConfig(), train={"steps": 100}, optimizer={"schedule": "wsd"})
    longer = override(old, train={"steps": 300})
    say_changes(saved_at(80, old), longer, HASHES)
    said = capsys.readouterr().err
    assert "the warm-up had 10 steps, and that of 300 steps has 30; --optimizer.warmup-frac" in said
    share = float(said.partition("--optimizer.warmup-frac ")[2].split()[0])
    say_changes(saved_at(80, old), override(longer, optimizer={"warmup_frac": share}), HASHES)
    assert "warm-up had" not in capsys.readouterr().err


def test_resume_of_a_finished_run_changes_no_figure(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, train={"steps": 5})
    first = run(config, tmp_path / "run")
    rows, weights = rows_of(tmp_path / "run"), weights_of(tmp_path / "run")
    again = run(config, tmp_path / "run", resume=True)
    assert (again.finished, again.step, again.after) == (True, 5, first.after)
    assert rows_of(tmp_path / "run") == rows
    for name, weight in weights_of(tmp_path / "run").items():
        assert torch.equal(weight, weights[name])


def test_a_second_run_in_the_same_folder_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, train={"steps": 2})
    run(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="a run is there already; go on with --resume"):
        run(config, tmp_path / "run")


def test_resume_refuses_what_the_state_of_the_optimizer_holds(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, train={"steps": 2})
    run(config, tmp_path / "run")
    changed = {"beta1": 0.5, "weight_decay": 0.3, "lr": 1e-4, "clip_norm": 0.5, "warmup_frac": 0.2}
    with pytest.raises(ConfigError) as caught:
        run(override(config, optimizer=changed), tmp_path / "run", resume=True)
    flags = [problem.split()[0] for problem in caught.value.problems]
    assert flags == ["--optimizer.beta1", "--optimizer.weight-decay"]


def test_resume_names_the_option_of_a_method(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, train={"steps": 2})
    run(config, tmp_path / "run")
    changed = override(config, model={"crnet": {"beta_init": 0.5}})
    with pytest.raises(ConfigError, match=r"^--model\.crnet\.beta-init was 1\.0 and is now 0\.5"):
        run(changed, tmp_path / "run", resume=True)


# Plugins


def plugin(name: str, sha256: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, path=Path(f"/there/{name}.py"), sha256=sha256)


def load(patch: pytest.MonkeyPatch, *plugins: SimpleNamespace) -> None:
    patch.setattr("crnet.registry.plugins", lambda: plugins)


def test_plugins_are_written_down_and_compared(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = tiny(corpus, train={"steps": 2}), tmp_path / "run"
    load(monkeypatch, plugin("mine", "aa"), plugin("yours", "bb"))
    run(config, folder)
    manifest = json.loads((folder / "run.json").read_text())
    wanted = [{"name": "mine", "sha256": "aa"}, {"name": "yours", "sha256": "bb"}]
    assert manifest["plugins"] == wanted
    before = (folder / "run.json").read_bytes()
    load(monkeypatch, plugin("mine", "cc"))
    with pytest.raises(ConfigError) as caught:
        run(config, folder, resume=True)
    changed, missing = caught.value.problems
    assert "/there/mine.py" in changed
    assert "aa" in changed
    assert "cc" in changed
    assert "yours" in missing
    assert "--plugins" in missing
    assert (folder / "run.json").read_bytes() == before
    load(monkeypatch, plugin("yours", "bb"), plugin("other", "dd"), plugin("mine", "aa"))
    assert run(config, folder, resume=True).finished
