"""What a resumed run keeps, what it may change, and which plugins it needs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crnet.config.serialize import override
from crnet.data.prepare import prepare
from crnet.errors import ConfigError
from crnet.train.step import learning_rate
from test_train import rows_of, run, tiny, weights_of


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
