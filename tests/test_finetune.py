"""Beginning with given weights, ending within a schedule, epochs, and ``crnet finetune``.

Equality is by bits.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import crnet
from crnet.cli.app import main
from crnet.config.serialize import override
from crnet.data.prepare import prepare
from crnet.data.rows import Rows
from crnet.errors import ConfigError
from crnet.storage import checkpoint
from crnet.train.run import Result
from test_train import rows_of, run, tiny, weights_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pretrained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tiny(corpus), tmp_path_factory.mktemp("pretrained") / "run")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text than ``corpus``."""
    import textwrap

    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_text(Path(textwrap.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


def same_weights(one: Path, two: Path) -> bool:
    weights, wanted = weights_of(one), weights_of(two)
    assert weights.keys() == wanted.keys()
    return all(torch.equal(weights[name], wanted[name]) for name in wanted)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


# Given weights


def test_a_run_begins_with_given_weights(pretrained: Result, corpus: Path, tmp_path: Path) -> None:
    """Before its first step it is the model that was trained, on the whole validation set."""
    config = tiny(corpus, train={"init_from": pretrained.run_dir, "steps": 2, "seed": 5})
    result = run(config, tmp_path / "run")
    assert pretrained.after is not None
    assert result.before == pretrained.after
    assert result.after != pretrained.after
    assert (result.step, result.tokens) == (2, 2 * 8 * 16)
    assert pretrained.checkpoint is not None
    began = manifest(tmp_path / "run")["init_from"]
    assert began == {
        "checkpoint": str(pretrained.checkpoint),
        "step": 12,
        "tokens": pretrained.tokens,
        "sha256": checkpoint.fingerprint(pretrained.checkpoint),
    }


def test_the_optimizer_is_new(pretrained: Result, corpus: Path, tmp_path: Path) -> None:
    """From the same weights, however they were come by, the same first step."""
    start = {"init_from": pretrained.checkpoint, "steps": 1}
    run(tiny(corpus, train=start), tmp_path / "one")
    copied = tmp_path / "copy"
    assert pretrained.checkpoint is not None
    shutil.copytree(pretrained.checkpoint, copied)
    run(tiny(corpus, train=start | {"init_from": copied}), tmp_path / "two")
    assert same_weights(tmp_path / "one", tmp_path / "two")
    saved = checkpoint.newest(tmp_path / "one")
    assert saved is not None
    steps = {float(state["step"]) for state in saved.state()["optimizer"]["state"].values()}
    assert steps == {1.0}


def test_a_stopped_run_goes_on_without_the_first_checkpoint(
    pretrained: Result, corpus: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    assert pretrained.checkpoint is not None
    shutil.copytree(pretrained.checkpoint, start)
    config = tiny(corpus, train={"init_from": start, "steps": 4})
    run(config, tmp_path / "whole")
    run(override(config, train={"stop_after_steps": 2}), tmp_path / "run")
    began = manifest(tmp_path / "run")["init_from"]
    shutil.rmtree(start)
    run(config, tmp_path / "run", resume=True)
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert manifest(tmp_path / "run")["init_from"] == began
    with pytest.raises(ConfigError, match=r"--train\.init-from was .* and is now None"):
        run(override(config, train={"init_from": None}), tmp_path / "run", resume=True)


def test_weights_of_another_model_or_tokenizer_are_refused(
    pretrained: Result, corpus: Path, other: Path, tmp_path: Path
) -> None:
    start = {"init_from": pretrained.run_dir}
    with pytest.raises(ConfigError) as caught:
        run(
            tiny(corpus, train=start, model={"norm_eps": 1e-5, "hidden_size": 64}),
            tmp_path / "run",
        )
    assert [
        re.sub(r" is .*, and .* has ", "|", each.partition(";")[0])
        for each in (caught.value.problems)
    ] == ["--model.hidden-size|32", "--model.norm-eps|1e-06"]
    with pytest.raises(ConfigError, match=r"another tokenizer .* give --data\.tokenizer"):
        run(tiny(other, train=start), tmp_path / "run")
    with pytest.raises(ConfigError, match="no checkpoint"):
        run(tiny(corpus, train={"init_from": tmp_path}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_take_the_precision_of_the_run(
    pretrained: Result, corpus: Path, tmp_path: Path
) -> None:
    """fp32 weights in a bf16 run: rounded once, gains still fp32."""
    config = tiny(corpus, train={"init_from": pretrained.run_dir, "precision": "bf16"})
    model = crnet.build(config, model={"vocab_size": 300})
    wanted = weights_of(pretrained.run_dir)
    dtypes = set()
    for name, parameter in model.named_parameters():
        dtypes.add(parameter.dtype)
        assert torch.equal(parameter, wanted[name].to(parameter.dtype))
    assert dtypes == {torch.bfloat16, torch.float32}


# Ends and epochs


def test_a_run_stops_within_its_schedule_and_goes_on(
    pretrained: Result, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the step that is named, the same words again too; then the run that was never stopped."""
    folder = tmp_path / "run"
    ends = [
        run(tiny(corpus, train={"stop_after_steps": stop}), folder, resume=bool(idx))
        for idx, stop in enumerate((5, 5, 10, 12))
    ]
    wanted = [(5, False), (5, False), (10, False), (12, True)]
    assert [(each.step, each.finished) for each in ends] == wanted
    assert same_weights(folder, pretrained.run_dir)
    rates = [row["lr"] for row in rows_of(folder) if "lr" in row]
    assert rates == [row["lr"] for row in rows_of(pretrained.run_dir) if "lr" in row]
    words = f"train --resume --out {folder} --train.steps 20 --train.stop-after-steps 13"
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert not end.value.code
    said = capsys.readouterr().out
    assert f"--resume --out {folder} --train.stop-after-steps 20" in said


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["packed", "document"])
def test_epochs_are_steps(corpus: Path, tmp_path: Path, mode: str) -> None:
    data = {"rows": mode, "source": (str(corpus),)}
    config = tiny(corpus, data=data, train={"epochs": 1, "batch_size": 64, "eval_every_steps": 0})
    rows = Rows(prepare(config.data, progress=False), "train", 16, config.data.rows)
    steps = math.ceil(len(rows) / 64)
    assert steps > 1
    config = override(config, train={"steps": 300})  # the preset's: nobody gave any
    result = run(config, tmp_path)
    assert (result.step, result.finished) == (steps, True)
    assert manifest(tmp_path)["config"]["train"]["steps"] == steps
    with pytest.raises(
        ConfigError, match=f"--train.steps 7 with --train.epochs 1, which are {steps}"
    ):
        run(override(config, train={"steps": 7}), tmp_path / "other")
    again = crnet.train(out=tmp_path, resume=True, epochs=2, progress=False)
    assert again.step == math.ceil(2 * len(rows) / 64)


# The command


@pytest.mark.slow
def test_finetune_is_the_function(
    pretrained: Result,
    other: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = crnet.finetune(
        pretrained.run_dir,
        out=tmp_path / "one",
        progress=False,
        source=other,
        documents="paragraph",
        lr=1e-3,
    )
    assert result.before is not None
    assert result.after is not None
    assert result.after.loss < result.before.loss
    words = f"finetune {pretrained.run_dir} --data.source {other} --data.documents paragraph "
    with pytest.raises(SystemExit) as end:
        main([*words.split(), "--optimizer.lr", "1e-3", "--out", str(tmp_path / "two"), "--json"])
    assert not end.value.code
    assert json.loads(capsys.readouterr().out)["val_loss"] == result.after.loss
    assert same_weights(tmp_path / "one", tmp_path / "two")
    config = manifest(tmp_path / "two")["config"]
    assert config["train"]["epochs"] == 1
    assert config["data"]["tokenizer"] == config["train"]["init_from"] == str(pretrained.checkpoint)
    assert config["model"] == manifest(pretrained.run_dir)["config"]["model"]


def test_finetune_wants_a_corpus(
    pretrained: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["finetune", str(pretrained.run_dir), "--out", str(tmp_path / "run")])
    assert end.value.code == 2
    assert "--data.source is empty; name a corpus" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--data\.source is empty"):
        crnet.finetune(pretrained.run_dir)


# What was measured


def test_the_page_has_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is the program's, of the kept report, whose runs all ended."""
    monkeypatch.syspath_prepend(str(ROOT / "runs"))
    import finetuning

    path = ROOT / "benchmarks" / "2026-11-26-table-14.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    runs = {**report["pretrained"], **report["tuned"]}
    assert [name for name, figures in runs.items() if "val_perplexity" not in figures] == []
    words = [f"--model.linear={name}" for name in finetuning.METHODS]
    assert [each[0] for each in report["words"].values()] == words
    assert all({*finetuning.WHOLE.common} <= {*each} for each in report["words"].values())
    finetuning.print_table(finetuning.WHOLE, report)
    table = capsys.readouterr().out.strip()
    assert table in (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
