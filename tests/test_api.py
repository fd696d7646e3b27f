"""The package from Python: the same numbers and the same errors as the command line.

Equality is by bits: the commands call the same functions.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import crnet
from crnet.cli.app import main
from crnet.config.sections import RunConfig
from crnet.config.serialize import from_dict
from crnet.data.prepare import prepare
from crnet.data.rows import Batches, Rows
from crnet.errors import ConfigError
from crnet.storage import checkpoint
from crnet.train.run import Result
from test_cli import train_words
from test_documented_commands import code_blocks
from test_train import rows_of, tiny, weights_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = tmp_path_factory.mktemp("api") / "run"
    return crnet.train(tiny(corpus), out=out, progress=False)


def functions() -> dict[str, Any]:
    from crnet import api

    return {name: getattr(api, name) for name in crnet.__all__ if hasattr(api, name)}


# Names


def test_import_is_free_of_torch_and_quick() -> None:
    program = (
        "import time; start = time.process_time(); import crnet, sys\n"
        "print(time.process_time() - start, 'torch' in sys.modules, 'crnet.api' in sys.modules)"
    )
    took = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        seconds, *heavy = done.stdout.split()
        assert heavy == ["False", "False"]
        took.append(float(seconds))
    assert min(took) < 0.2


def test_every_public_name_is_there_typed_and_documented() -> None:
    tree = ast.parse(inspect.getsource(crnet))
    (typed,) = [
        {alias.asname for each in node.body for alias in each.names}
        for node in tree.body
        if isinstance(node, ast.If)
    ]
    assert typed == set(crnet.__all__) <= set(dir(crnet))
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for name in crnet.__all__:
        assert getattr(crnet, name).__doc__, name
        assert f"`crnet.{name}" in page, name
    for name, function in functions().items():
        if inspect.isclass(function):
            continue
        hints = typing.get_type_hints(function)
        assert hints.keys() == {*inspect.signature(function).parameters, "return"}, name
    assert (Path(crnet.__file__).parent / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        crnet.trian  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "cost"])
@pytest.mark.parametrize("first", ["", "import crnet.train.run, crnet.cost.table"])
def test_a_folder_that_is_a_verb_is_called_like_one(name: str, first: str) -> None:
    """Whatever was imported before, and it stays the folder."""
    program = (
        f"{first}\nimport crnet, inspect, types\n"
        f"assert isinstance(crnet.{name}, types.ModuleType) and callable(crnet.{name})\n"
        f"from crnet import api\n"
        f"assert inspect.signature(crnet.{name}) == inspect.signature(api.{name})\n"
        f"try:\n    crnet.{name}('nothing')\n"
        "except crnet.ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("no preset is named 'nothing'"), done.stderr


# Keys


def test_keys_are_those_of_the_command_line() -> None:
    config = crnet.configure(
        "tiny",
        linear="full",
        rank=96,
        steps=3,
        lr=1,
        source="books",
        cache_dir="somewhere",
        train={"seed": 4},
        model={"vocab_size": 500, "init_std": 0.1},
    )
    assert (config.model.linear, config.model.rank, config.model.vocab_size) == ("full", "96", 500)
    assert (config.train.steps, config.train.seed, config.optimizer.lr) == (3, 4, 1.0)
    assert (config.data.source, config.data.cache_dir) == (("books",), Path("somewhere"))
    assert crnet.configure(config) == config == crnet.configure(config, steps=3)
    assert crnet.configure(crnet={"beta_init": 0.5}).model.crnet.beta_init == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stpes": 3}, "unknown key 'stpes'; did you mean 'steps'?"),
        ({"train": {"stpes": 3}}, "unknown key 'stpes' of TrainConfig; did you mean 'steps'?"),
        ({"vocab_size": 3}, "'vocab_size' is a key of model and data; say which"),
        ({"steps": 2.5}, "train.steps is 2.5, which is not a int"),
        ({"steps": 0}, "--train.steps is 0; it must be above zero"),
        ({"linear": "crent"}, "--model.linear is 'crent'; known are"),
        ({"crnet": {"betas": 1}}, "unknown key 'betas' of CRNetOptions"),
    ],
)
def test_a_wrong_key_is_a_config_error(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        crnet.configure("tiny", **keys)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        crnet.configure(steps=0, lr=-1.0, hidden_size=0)
    assert len(caught.value.problems) == 3


# Training


def test_training_is_the_command(
    trained: Result,
    corpus: Path,
    tmp_path: Path,
) -> None:
    every = {"log": "1", "eval": "5", "save": "4"}
    changes = {f"train__{what}_every_steps": steps for what, steps in every.items()}
    words = train_words(corpus, tmp_path / "run", **changes)
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code
    weights, wanted = weights_of(trained.run_dir), weights_of(tmp_path / "run")
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    config = json.loads((trained.run_dir / "run.json").read_text())["config"]
    assert config == json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert trained.after is not None
    assert trained.after.loss == rows_of(tmp_path / "run")[-1]["val_loss"]


def test_a_run_goes_on_by_its_folder(corpus: Path, tmp_path: Path) -> None:
    first = crnet.train(tiny(corpus), out=tmp_path, steps=4, progress=False)
    again = crnet.train(out=tmp_path, resume=True, steps=6, progress=False)
    assert (first.step, again.step) == (4, 6)
    assert (
        from_dict(json.loads((tmp_path / "run.json").read_text())["config"]).model.num_layers == 3
    )
    with pytest.raises(ConfigError, match="began from the preset tiny, not llama-60m"):
        crnet.train("llama-60m", out=tmp_path, resume=True)
    with pytest.raises(ConfigError, match="a run is there already"):
        crnet.train(tiny(corpus), out=tmp_path)


def test_a_run_without_a_folder_gets_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = crnet.train(tiny(corpus), steps=1, progress=False)
    assert result.run_dir.parts[0] == "crnet-runs"
    assert result.run_dir.name.startswith("tiny-crnet-")


def test_several_processes_are_refused_with_the_way(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="start it with torchrun"):
        crnet.train(tiny(corpus), out=tmp_path / "run", parallel={"data": 2})


# What was trained


def test_load_evaluate_and_generate(trained: Result) -> None:
    loaded = crnet.load(trained.run_dir)
    model, tokenizer = loaded
    saved = checkpoint.newest(trained.run_dir)
    assert saved is not None
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved.weights()[name])
    assert crnet.evaluate(trained.run_dir) == trained.after
    assert tokenizer.hash == crnet.tokenizer(trained.run_dir).hash
    assert tokenizer.hash == crnet.tokenizer(saved.folder).hash
    options = {"max_tokens": 20, "seed": 3, "stop_at_end": False}
    text = loaded.generate("The", **options)
    assert text == crnet.generate(trained.run_dir, "The", **options) != ""
    with pytest.raises(ConfigError, match="unknown key max_token"):
        loaded.generate("The", max_token=5)
    with pytest.raises(ConfigError, match="--temperature is 0"):
        loaded.generate("The", temperature=0)


def test_another_corpus_has_the_models_tokenizer(
    trained: Result,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As with the command, to the bit."""
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text()[:20_000])
    found = crnet.evaluate(trained.run_dir, source=other)
    assert trained.after is not None
    assert found.loss != trained.after.loss
    with pytest.raises(SystemExit):
        main(["evaluate", str(trained.run_dir), "--data.source", str(other), "--json"])
    assert json.loads(capsys.readouterr().out)["val_loss"] == found.loss
    foreign = prepare(tiny(other, data={"vocab_size": 280}).data, progress=False)
    with pytest.raises(ConfigError, match=r"give --data\.tokenizer"):
        crnet.evaluate(trained.run_dir, source=other, tokenizer=str(foreign.folder))


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *words, "--json"])
    assert not end.value.code
    return json.loads(capsys.readouterr().out)


def test_protocols_are_the_commands(
    trained: Result, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last bit, on the run's corpus and on another."""
    run, other = str(trained.run_dir), tmp_path / "other.txt"
    other.write_text(corpus.read_text()[:8_000])
    for protocol, cuts in (("document", {"window": 12}), ("sliding", {"window": 12, "stride": 5})):
        words = [word for key, value in cuts.items() for word in (f"--{key}", str(value))]
        wanted = printed(capsys, run, "--protocol", protocol, *words)
        found = crnet.evaluate(run, protocol=protocol, **cuts)  # type: ignore[call-overload]
        assert wanted | found.figures() == wanted
        assert (found.loss, found.perplexity) == (wanted["loss"], wanted["perplexity"])
        words = [run, "--protocol", protocol, "--data.source", str(other)]
        found = crnet.evaluate(run, protocol=protocol, source=other)  # type: ignore[call-overload]
        assert printed(capsys, *words)["word_perplexity"] == found.word_perplexity


def test_what_of_an_evaluation_has_no_effect_is_refused(trained: Result) -> None:
    """In the words of the command; nothing is opened before."""
    for keys, message in (
        ({"window": 8}, "--window has no effect with --protocol rows"),
        ({"protocol": "document", "stride": 3}, "--stride is of --protocol sliding"),
        ({"protocol": "slidign"}, "--protocol is 'slidign'; known are rows, document, sliding"),
        ({"limit": 3}, "--limit is of --tasks"),
        ({"tasks": "x", "protocol": "sliding"}, "has no effect on --tasks"),
        ({"tasks": "x", "limit": 0}, "--limit is 0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            crnet.evaluate(trained.run_dir, **keys)  # type: ignore[call-overload]


@pytest.mark.slow
def test_tasks_are_the_commands(trained: Result, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval's tasks need the extra eval")
    task = str(ROOT / "examples" / "last_word.yaml")
    words = ["--tasks", task, "--limit", "4", "--num-fewshot", "1", "--window", "16"]
    wanted = printed(capsys, str(trained.run_dir), *words)
    found = crnet.evaluate(trained.run_dir, tasks=task, limit=4, num_fewshot=1, window=16)
    assert found["tasks"]["last_word"]["documents"] == 4
    assert wanted | json.loads(json.dumps(found)) == wanted
    assert crnet.evaluate(trained.run_dir, tasks=[task], limit=4, num_fewshot=1, window=16) == found


# Models and data


def test_build_gives_the_weights_that_training_begins_with(corpus: Path, tmp_path: Path) -> None:
    """A run of one step at a rate of 0 in all but name leaves them as they were."""
    config = crnet.configure(tiny(corpus), steps=1, lr=1e-30)
    prepared = crnet.train(config, out=tmp_path, progress=False)
    size = crnet.load(prepared.run_dir).tokenizer.vocab_size
    model = crnet.build(config, model={"vocab_size": size})
    wanted = weights_of(tmp_path)
    assert {name for name, _ in model.named_parameters()} == wanted.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    other = crnet.build(config, model={"vocab_size": size}, seed=1)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_batches_are_those_of_the_run(corpus: Path) -> None:
    config = tiny(corpus)
    rows = Rows(prepare(config.data, progress=False), "train", 16)
    wanted = Batches(rows, config.train.seed, 8)
    found = list(crnet.batches(config, steps=3))
    assert len(found) == 3
    for tokens, targets in found:
        (batch,) = wanted.next()
        assert torch.equal(tokens, batch[0])
        assert torch.equal(targets, batch[1])
    held_out = list(crnet.batches(config, "validation"))
    assert 0 < sum(tokens.numel() for tokens, _ in held_out) <= config.data.validation_tokens


def test_cost_is_the_table_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main("cost llama-60m --model.linear full --device h100 --ranks 2 --json".split())
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = crnet.cost("llama-60m", linear="full", device="h100", ranks=2)
    assert [vars(row) for row in found] == rows
    with pytest.raises(ConfigError, match="--ranks is 0"):
        crnet.cost(ranks=0)


# What is shown


@pytest.mark.slow
def test_the_pages_programs_run(tmp_path: Path) -> None:
    """In their order, on a corpus of that name, at a small shape and two steps."""
    text = Path(typing.__file__).read_text(encoding="utf-8")
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    blocks = code_blocks(ROOT / "docs" / "python.md", "python")
    assert len(blocks) >= 2
    small = '"tiny", hidden_size=32, num_heads=2, intermediate_size=48, num_layers=2, rank=8,'
    for block in blocks:
        block = block.replace('"tiny",', f"{small} sequence_length=32,")
        run_program(["-c", block.replace("steps=100", "steps=2")], tmp_path)
    assert (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
def test_the_example_runs(corpus: Path, tmp_path: Path) -> None:
    example = ROOT / "examples" / "train.py"
    code = ast.parse(example.read_text(encoding="utf-8")).body[1:]
    assert code[-1].end_lineno is not None
    assert code[-1].end_lineno - code[0].lineno < 25
    said = run_program([str(example), str(corpus), str(tmp_path)], tmp_path).splitlines()
    assert re.fullmatch(r"crnet: [\d,]+ parameters, perplexity [\d.]+", said[0])
    assert re.fullmatch(r"full: [\d,]+ parameters, perplexity [\d.]+", said[1])


def run_program(words: list[str], folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_defaults_are_the_commands() -> None:
    assert crnet.configure() == RunConfig()
