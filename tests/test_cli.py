"""The command line: real programs for what a user does, ``main()`` for what a user gets wrong."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import crnet
from crnet import architectures, linears, optimizers, registry, schedules, streams
from crnet.cli.app import COMMANDS, build_app, main, take_plugins
from crnet.config import presets
from crnet.config.sections import RunConfig
from crnet.config.serialize import from_dict
from crnet.errors import ConfigError
from crnet.paper import tables
from crnet.storage import checkpoint
from crnet.train import run as training
from crnet.train import start
from test_train import rows_of, weights_of

Flags = dict[str, str]

EVALUATED = (
    *("val_loss", "val_perplexity", "val_bits_per_byte", "val_accuracy"),
    *("val_tokens", "val_bytes"),
)
"""The figures of an evaluation, in metrics.jsonl and printed."""

TINY: Flags = {
    "--model.hidden-size": "32",
    "--model.intermediate-size": "48",
    "--model.num-layers": "3",
    "--model.num-heads": "2",
    "--model.rank": "8",
    "--data.documents": "paragraph",
    "--data.vocab-size": "300",
    "--data.sequence-length": "16",
    "--data.validation-tokens": "600",
    "--train.batch-size": "8",
    "--train.steps": "12",
    "--train.threads": "1",
    "--train.device": "cpu",
    "--train.log-every-steps": "4",
    "--train.eval-every-steps": "6",
    "--train.save-every-steps": "6",
}


def words(flags: Flags) -> list[str]:
    return [word for pair in flags.items() for word in pair if word]


def train_words(corpus: Path, out: Path, **changes: str) -> list[str]:
    """``crnet train`` at a small size; a change is written model__rank="9"."""
    flags = TINY | {"--data.source": str(corpus), "--out": str(out)}
    for key, value in changes.items():
        flags["--" + key.replace("__", ".").replace("_", "-")] = value
    return ["train", *words(flags)]


def program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "crnet", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        **options,
    )


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``main()`` in this process: exit code, stdout, stderr without the frames of its messages."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = 0
        try:
            main(list(arguments))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capsys.readouterr()
        return code, out, " ".join(re.sub(r"[╭╮╰╯│─]", " ", err).split())

    return run


# A run


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of the real program, and what it printed with --json."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = program(*train_words(corpus, folder), "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_run_folder(trained: tuple[Path, dict[str, Any]], corpus: Path) -> None:
    folder, printed = trained
    assert {path.name for path in folder.iterdir()} == {
        "run.json",
        "metrics.jsonl",
        "checkpoints",
        "loss.png",
    }
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest.keys() >= {
        "config",
        "commit",
        "dirty",
        "crnet",
        "python",
        "torch",
        "numpy",
        "device",
        "threads",
        "command_line",
        "time",
        "parameters",
        "data",
    }
    config = from_dict(manifest["config"])
    assert config.preset == "tiny"
    assert config.model.vocab_size == 300
    assert config.model.hidden_size == 32
    assert config.data.source == (str(corpus),)
    assert config.train.steps == 12
    assert manifest["crnet"] == crnet.__version__
    assert manifest["torch"] == torch.__version__
    assert manifest["threads"] == 1
    assert manifest["command_line"][1:] == [*train_words(corpus, folder), "--json"]
    for what in ("tokenizer", "validation"):
        assert re.fullmatch("[0-9a-f]{64}", manifest["data"]["hashes"][what])
    weights = weights_of(folder)
    total = sum(weight.numel() for weight in weights.values())
    assert sum(manifest["parameters"].values()) == total == printed["parameters"]


def test_commit_is_the_one_of_the_working_tree(trained: tuple[Path, dict[str, Any]]) -> None:
    manifest = json.loads((trained[0] / "run.json").read_text())
    here = Path(crnet.__file__).parent
    tracked = subprocess.run(
        ["git", "-C", str(here), "ls-files", "--error-unmatch", "errors.py"], capture_output=True
    )
    if tracked.returncode:
        assert (manifest["commit"], manifest["dirty"]) == (None, None)
    else:
        assert re.fullmatch("[0-9a-f]{40}", manifest["commit"])
        assert manifest["dirty"] in (True, False)


def test_metrics(trained: tuple[Path, dict[str, Any]]) -> None:
    def strict(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    lines = (trained[0] / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=strict) for line in lines]
    training_rows = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "val_loss" in row]
    assert len(rows) == len(training_rows) + len(evaluations)
    for row in training_rows:
        measured = {"tokens_per_s", "peak_bytes"}
        assert set(row) == {"step", "tokens", "loss", "lr", "grad_norm"} | measured
        assert 2**26 < row["peak_bytes"] < 2**34  # Python and torch hold more than the model
        assert row["tokens"] == row["step"] * 8 * 16
        assert row["tokens_per_s"] > 0
        assert row["grad_norm"] > 0
    for row in evaluations:
        assert set(row) == {"step", "val_precision", *EVALUATED}
        assert 0 <= row["val_accuracy"] <= 1
        nats = row["val_loss"] * row["val_tokens"]
        assert row["val_bits_per_byte"] == nats / math.log(2) / row["val_bytes"]
        assert row["val_perplexity"] == math.exp(row["val_loss"])
    assert [row["step"] for row in training_rows] == [4, 8, 12]
    assert [row["step"] for row in evaluations] == [0, 6, 12]
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]


def test_picture(trained: tuple[Path, dict[str, Any]]) -> None:
    content = (trained[0] / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"IEND" in content[-12:]
    width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))
    assert min(width, height) >= 300


def test_json_of_train(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, all_printed = trained
    last = rows_of(folder)[-1]
    printed = dict(all_printed)
    assert printed.pop("tokens_per_s") > 0
    assert printed.pop("parameters") == sum(
        json.loads((folder / "run.json").read_text())["parameters"].values()
    )
    assert printed == {
        "run": str(folder),
        "finished": True,
        "step": 12,
        "tokens": 12 * 8 * 16,
        "checkpoint": str(folder / "checkpoints" / "step_12"),
        **{key: last[key] for key in EVALUATED if key not in ("val_tokens", "val_bytes")},
    }


def test_the_same_command_gives_the_same_run(
    trained: tuple[Path, dict[str, Any]], corpus: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    code, out, err = call(*train_words(corpus, tmp_path / "again"))
    assert code == 0, err
    assert "step 12, 1,536 tokens, validation perplexity" in out
    assert str(tmp_path / "again" / "checkpoints" / "step_12") in out
    theirs = weights_of(trained[0])
    for name, weight in weights_of(tmp_path / "again").items():
        assert torch.equal(weight, theirs[name])
    assert rows_of(tmp_path / "again")[-1] == rows_of(trained[0])[-1]


def test_evaluate_gives_the_last_figure_of_the_run(
    trained: tuple[Path, dict[str, Any]], call: Callable[..., Any]
) -> None:
    folder, _ = trained
    last = rows_of(folder)[-1]
    code, out, err = call("evaluate", str(folder), "--json")
    assert code == 0, err
    printed = json.loads(out)
    manifest = json.loads((folder / "run.json").read_text())
    assert printed == {
        "checkpoint": str(folder / "checkpoints" / "step_12"),
        "step": 12,
        **{key: last[key] for key in EVALUATED},
        "validation_hash": manifest["data"]["hashes"]["validation"],
    }


def test_evaluate_of_an_earlier_checkpoint_and_fewer_tokens(
    trained: tuple[Path, dict[str, Any]], call: Callable[..., Any]
) -> None:
    folder, _ = trained
    step_6 = folder / "checkpoints" / "step_6"
    (row,) = [row for row in rows_of(folder) if row["step"] == 6 and "val_loss" in row]
    code, out, err = call("evaluate", str(step_6), "--json")
    assert code == 0, err
    assert json.loads(out)["val_loss"] == row["val_loss"]
    code, out, err = call("evaluate", str(step_6), "--json", "--data.validation-tokens", "160")
    assert code == 0, err
    assert json.loads(out)["val_tokens"] == 160
    code, out, err = call("evaluate", str(step_6))
    assert code == 0, err
    assert f"loss {row['val_loss']:.6f}" in out


def test_evaluate_on_another_corpus(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, call: Callable[..., Any]
) -> None:
    folder, _ = trained
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"Paragraph {n} of another text." for n in range(400)))
    words = ["evaluate", str(folder), "--data.source", str(other)]
    code, out, err = call(*words, "--json")
    assert code == 0, err
    assert json.loads(out)["val_loss"] > rows_of(folder)[-1]["val_loss"]
    foreign = tmp_path / "tokenizer.json"  # the model's own, but for one merge
    mine = folder / "checkpoints" / "step_12"
    changed = json.loads((mine / "tokenizer.json").read_text())
    changed["model"]["merges"].pop()
    foreign.write_text(json.dumps(changed))
    code, _, err = call(*words, "--data.tokenizer", str(foreign))
    assert code == 2
    assert "another tokenizer" in err
    mend = f"--data.tokenizer {mine}"
    assert mend in err
    code, again, err = call(*words, *mend.split(), "--json")
    assert (code, again) == (0, out), err


def test_generate(trained: tuple[Path, dict[str, Any]], call: Callable[..., Any]) -> None:
    options = ["--prompt", "def ", "--max-tokens", "12", "--seed", "3", "--no-stop-at-end"]
    code, plain, err = call("generate", str(trained[0]), *options)
    assert code == 0, err
    assert plain.startswith("def ")
    assert len(plain.strip()) > len("def ")
    code, out, err = call("generate", str(trained[0]), *options, "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert printed["prompt"] == "def "
    assert plain == "def " + printed["text"] + "\n"


@pytest.mark.parametrize("options", [["--greedy"], ["--top-k", "5"], ["--prompt", ""], []])
def test_generate_options(
    trained: tuple[Path, dict[str, Any]], call: Callable[..., Any], options: list[str]
) -> None:
    code, out, err = call("generate", str(trained[0]), "--max-tokens", "5", "--json", *options)
    assert code == 0, err
    assert isinstance(json.loads(out)["text"], str)


def test_list(call: Callable[..., Any]) -> None:
    code, out, err = call("list", "--json")
    assert code == 0, err
    known = json.loads(out)
    assert list(known["presets"]) == list(presets.PRESETS)
    seams = {
        "parameterizations": linears,
        "streams": streams,
        "architectures": architectures,
        "optimizers": optimizers,
        "schedules": schedules,
    }
    assert list(known) == ["presets", "paper", *seams]
    assert list(known["paper"]) == list(presets.PAPER)
    code, out, err = call("list")
    assert code == 0, err
    for title, seam in seams.items():
        assert list(known[title]) == seam.names()
    for name in (
        *presets.PRESETS,
        *presets.PAPER,
        *(name for seam in seams.values() for name in seam.names()),
    ):
        assert f"  {name} " in out


def test_prepare(corpus: Path, call: Callable[..., Any]) -> None:
    data_words = words({k: v for k, v in TINY.items() if k.startswith("--data")})
    code, out, err = call("prepare", "--data.source", str(corpus), *data_words, "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert printed["vocab_size"] == 300
    assert Path(printed["folder"]).is_dir()
    code, out, err = call("prepare", "--data.source", str(corpus), *data_words)
    assert code == 0, err
    assert printed["folder"] in out
    for split in ("train", "validation"):
        part = printed["parts"][split]
        assert re.search(rf"{split} +{part['documents']:,} documents +{part['tokens']:,} t", out)


def test_without_out_a_folder_is_made_and_resumed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = words(TINY | {"--data.source": str(corpus), "--train.steps": "2"})
    assert call("train", *flags)[0] == 0
    assert call("train", *flags)[0] == 0
    first, second = sorted(
        (tmp_path / "crnet-runs").iterdir(), key=lambda path: path.stat().st_mtime_ns
    )
    assert first.name.startswith("tiny-crnet-")
    os.utime(first / "run.json", (0, 0))
    code, _, err = call("train", "--resume", "--train.steps", "3")
    assert code == 0, err
    assert rows_of(second)[-1]["step"] == 3
    assert rows_of(first)[-1]["step"] == 2


# Layers of settings


class Stopped(Exception):
    """Raised instead of training."""


@pytest.fixture
def settings(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any], tmp_path: Path
) -> Callable[..., RunConfig]:
    """What ``crnet train`` would run with."""
    seen: list[RunConfig] = []

    def take(config: RunConfig, *_: object, **__: object) -> None:
        seen.append(config)
        raise Stopped

    monkeypatch.setattr(training, "run", take)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> RunConfig:
        with contextlib.suppress(Stopped):
            code, _, err = call("train", *arguments)
            raise AssertionError(f"ended with {code}: {err}")
        return seen[-1]

    return run


@pytest.mark.parametrize("name", [*presets.PRESETS, *presets.PAPER])
def test_a_preset_is_taken_whole(settings: Callable[..., RunConfig], name: str) -> None:
    assert settings(name) == presets.get(name)


def test_the_command_line_over_a_preset(settings: Callable[..., RunConfig]) -> None:
    found = settings("llama-60m", "--train.batch-size", "4", "--model.crnet.beta-init", "0.25")
    plain = presets.get("llama-60m")
    assert (found.train.batch_size, found.model.crnet.beta_init) == (4, 0.25)
    assert (found.train.steps, found.train.eval_every_steps) == (10_000, 1000)
    assert (found.model.rank, found.data.vocab_size) == (plain.model.rank, 32_000)


YAML = """
optimizer:
  lr: 1e-3
  beta1: 0.5
train:
  steps: 33
  log_every_steps: 7
model:
  num_kv_heads: null
data:
  source: [a.txt, b.txt]
"""
TOML = """
[optimizer]
beta1 = 0.25
beta2 = 0.5
[train]
steps = 44
[model.crnet]
beta_init = 0.125
"""
JSON = '{"optimizer": {"beta2": 0.75}, "train": {"eval_every_steps": 9}, "model": {"rank": "16"}}'


def test_files_are_layered(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    for name, text in (("a.yaml", YAML), ("b.toml", TOML), ("c.json", JSON)):
        (tmp_path / name).write_text(text)
    files = ["--config", "a.yaml", "--config", "b.toml", "--config", "c.json"]
    found = settings(*files, "--train.log-every-steps", "8")
    optimizer, train = found.optimizer, found.train
    # 1e-3 is a string to YAML 1.1; beta1: b over a; beta2: c over b.
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2) == (1e-3, 0.25, 0.75)
    assert (train.steps, train.log_every_steps, train.eval_every_steps) == (44, 8, 9)
    assert (found.model.rank, found.model.crnet.beta_init) == ("16", 0.125)
    assert found.model.num_kv_heads is None
    assert found.data.source == ("a.txt", "b.txt")
    assert found.train.batch_size == presets.get("tiny").train.batch_size


def test_a_later_file_wins(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    for name, value in (("a.yaml", "0.3"), ("b.yml", "0.4")):
        (tmp_path / name).write_text(f"optimizer:\n  beta1: {value}\n")
    assert settings("--config", "a.yaml", "--config", "b.yml").optimizer.beta1 == 0.4
    assert settings("--config", "b.yml", "--config", "a.yaml").optimizer.beta1 == 0.3
    over = settings("--config", "b.yml", "--optimizer.beta1", "0.2")
    assert over.optimizer.beta1 == 0.2


def test_a_file_reaches_the_section_train(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text("train:\n  steps: 5\n  precision: bf16\n  seed: 3\n")
    train = settings("--config", "a.yaml").train
    assert (train.steps, train.precision, train.seed) == (5, "bf16", 3)


def test_a_file_over_a_preset(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"model": {"hidden_size": 768, "rank": "0.25h"}}')
    found = settings("llama-60m", "--config", "a.json")
    assert (found.model.hidden_size, found.model.num_layers) == (768, 8)
    assert found.train == presets.get("llama-60m").train


def test_a_resumed_run_keeps_its_settings(
    trained: tuple[Path, dict[str, Any]], settings: Callable[..., RunConfig], corpus: Path
) -> None:
    folder, _ = trained
    manifest = json.loads((folder / "run.json").read_text())["config"]
    manifest["model"]["vocab_size"] = None
    assert settings("--resume", "--out", str(folder)) == from_dict(manifest)
    longer = settings("--resume", "--out", str(folder), "--train.steps", "20")
    assert longer.train.steps == 20
    assert longer.train.batch_size == 8


def test_a_resumed_run_keeps_the_name_of_its_preset(
    tmp_path: Path, settings: Callable[..., RunConfig], trained: tuple[Path, dict[str, Any]]
) -> None:
    manifest = json.loads((trained[0] / "run.json").read_text())
    manifest["config"]["preset"] = "llama-60m"
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    assert settings("--resume", "--out", str(tmp_path)).preset == "llama-60m"


def test_every_flag_is_in_the_help(call: Callable[..., Any]) -> None:
    from test_config import FIELDS

    _, text, _ = call("train", "--help")
    for path, _, _ in FIELDS:
        if path != ("preset",):
            assert f"--{'.'.join(path).replace('_', '-')}" in text


def test_calls_of_main_do_not_touch_each_other(
    settings: Callable[..., RunConfig], tmp_path: Path, call: Callable[..., Any]
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("optimizer:\n  no_such_key: 1\n")
    code, _, err = call("train", "--config", str(broken))
    assert code == 2
    assert "no_such_key" in err
    broken.unlink()
    assert settings("tiny") == presets.get("tiny")


# Signals


LONG = {"train__steps": "100000", "train__log_every_steps": "1", "train__eval_every_steps": "0"}


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(
    corpus: Path, tmp_path: Path, call: Callable[..., Any], sign: signal.Signals
) -> None:
    folder = tmp_path / "run"
    as_json = ["--json"] if sign == signal.SIGINT else []
    arguments = train_words(corpus, folder, **LONG, train__save_every_steps="0")

    def send() -> None:
        while len(rows_of(folder)) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), sign)

    def unanswered(*_: object) -> None:
        raise AssertionError("the signal came to nobody")

    before = signal.signal(sign, unanswered)  # not the test program's end
    try:
        threading.Thread(target=send, daemon=True).start()
        code, out, err = call(*arguments, *as_json)
        assert signal.getsignal(sign) is unanswered, "the handler was not put back"
    finally:
        signal.signal(sign, before)
    assert code == 0, err
    assert f"{sign.name}: saving after this step" in err
    assert "Traceback" not in err
    saved = checkpoint.newest(folder)
    assert saved is not None
    step = saved.progress.step
    assert rows_of(folder)[-1]["step"] == step
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    if as_json:
        printed = json.loads(out)
        assert (printed["finished"], printed["step"]) == (False, step)
    else:
        assert f"stopped at step {step}" in out
        assert f"crnet train --resume --out {folder}" in out
    code, _, err = call("train", "--resume", "--out", str(folder), "--train.steps", str(step + 2))
    assert code == 0, err
    assert rows_of(folder)[-1]["step"] == step + 2


def test_a_second_signal_ends_at_once(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # A step of many micro-batches, long enough for both signals to come during one.
    arguments = train_words(
        corpus, folder, **LONG | {"train__batch_size": "300", "train__micro_batch_size": "1"}
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "crnet", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not rows_of(folder) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    time.sleep(0.3)  # from the row of the first evaluation into the step
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "SIGINT: saving" not in (line := process.stderr.readline()):
        assert line, "the first signal went unanswered"
    time.sleep(0.05)  # nobody presses faster; the handler has its own few instructions to finish
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert time.monotonic() - start < 2
    assert checkpoint.found(folder) == []


def test_a_non_finite_loss_ends_with_one(
    corpus: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    changes = {"optimizer__lr": "1e30", "optimizer__warmup_frac": "0", "train__steps": "40"}
    code, _, err = call(*train_words(corpus, tmp_path / "run", **changes))
    assert code == 1
    assert re.search(r"crnet: step \d+: loss .* sequences at positions \d+ to \d+", err)
    assert "--optimizer.lr" in err
    assert "Traceback" not in err


# Help


def test_help_is_quick() -> None:
    # The best of three, of a core: others use the machine too.
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = program("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f" {name} " in done.stdout
    assert min(times) < 0.9


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["list"], 0),
        (["--version"], 0),
        (["train", "--train.stepz", "3"], 2),
        (["trian"], 2),
        (["paper", "2"], 0),
    ],
)
def test_nothing_heavy_is_imported(arguments: list[str], code: int) -> None:
    script = (
        "import sys\n"
        "from crnet.__main__ import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as end:\n"
        f"    assert (end.code or 0) == {code}, end.code\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'tokenizers', 'safetensors', 'transformers'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert bool(done.stderr) == bool(code)


def test_version(call: Callable[..., Any]) -> None:
    code, out, _ = call("--version")
    assert (code, out.strip()) == (0, crnet.__version__)


def test_paper_knows_the_tables_that_there_are(call: Callable[..., Any]) -> None:
    known = ", ".join(f'"{number}"' for number in sorted([*tables.TABLES, 10]))
    code, _, err = call("paper", "5")
    assert code == 2
    assert f'{known}, "all"' in err


# Plugins


PLUGIN = """
class Mine:
    name = "mine"
METHODS = [Mine()]
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one method of no seam; the registry forgets it afterwards."""
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setitem(sys.modules, "crnet_plugin_my_methods", types.ModuleType("none"))
    path = tmp_path / "my_methods.py"
    path.write_text(PLUGIN)
    return path


@pytest.mark.parametrize(
    ("words", "kept", "files"),
    [
        ("train tiny", "train tiny", ""),
        ("--plugins a.py train tiny", "train tiny", "a.py"),
        ("train --plugins=a.py tiny --plugins b/c.py", "train tiny", "a.py b/c.py"),
        ("generate run -- --plugins a.py", "generate run -- --plugins a.py", ""),
        ("train --pluginsx a.py", "train --pluginsx a.py", ""),
    ],
)
def test_plugins_are_taken_from_the_words(words: str, kept: str, files: str) -> None:
    assert take_plugins(words.split()) == (kept.split(), [Path(it) for it in files.split()])


@pytest.mark.parametrize("words", ["train --plugins", "train --plugins=", "--plugins --json list"])
def test_plugins_without_a_file(words: str) -> None:
    with pytest.raises(ConfigError, match="--plugins names no file; say --plugins my_methods"):
        take_plugins(words.split())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_plugins_are_loaded(plugin: Path, call: Callable[..., Any], place: int) -> None:
    arguments = ["list", "--json"]
    arguments[place:place] = ["--plugins", str(plugin)]
    code, out, err = call(*arguments)
    assert code == 0, err
    assert json.loads(out)["presets"]
    assert [it.path for it in registry.plugins()] == [plugin]


def test_a_printed_command_keeps_its_plugins(plugin: Path, call: Callable[..., Any]) -> None:
    plan = ["plan", "llama-60m", "--parameters", "45e6", "--multiple", "32"]
    code, plain, err = call(*plan)
    assert code == 0, err
    code, out, err = call(*plan, "--plugins", str(plugin))
    assert code == 0, err
    assert out == plain.rstrip("\n") + f" --plugins {plugin}\n"


@pytest.mark.parametrize("words", [["--plugins", "a.py", "list"], ["check-plugin", "a.py"]])
def test_plugins_come_before_the_configuration(tmp_path: Path, words: list[str]) -> None:
    """Its classes are made from the methods that are known when it is imported."""
    (tmp_path / "a.py").write_text(
        "import sys\n"
        "late = [it for it in sys.modules if it.startswith(('crnet.config', 'crnet.linears'))]\n"
        "print('late:', late)\n"
        "raise SystemExit(3)\n"
    )
    done = program(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "late: []\n")
    assert "a.py: fails when it is loaded (SystemExit: 3)" in done.stderr


@dataclass
class Finding:
    """As ``crnet.measure.contract`` gives them."""

    name: str
    ok: bool
    detail: str


@pytest.mark.parametrize("ok", [True, False])
def test_check_plugin(
    plugin: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any], ok: bool
) -> None:
    contract = types.ModuleType("crnet.measure.contract")
    contract.check = lambda method: [  # type: ignore[attr-defined]
        Finding("bytes", True, "as declared"),
        Finding("replay", ok, f"of {type(method).__name__}"),
    ]
    monkeypatch.setitem(sys.modules, "crnet.measure.contract", contract)
    code, out, err = call("check-plugin", str(plugin))
    assert (code, err) == (0 if ok else 1, "")
    assert out.splitlines() == [
        "ok      mine, bytes: as declared",
        f"{'ok' if ok else 'failed':8}mine, replay: of Mine",
    ]
    code, out, err = call("check-plugin", str(plugin), "--json")
    assert (code, err) == (0 if ok else 1, "")
    assert json.loads(out)[1] == {
        "method": "mine",
        "name": "replay",
        "ok": ok,
        "detail": "of Mine",
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_does(name: str) -> None:
    app = build_app()
    assert app[name].help == build_app(name)[name].help
    assert app[name].help.splitlines()[0].endswith(".")


# Bad input


def text(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def settings_file(name: str, content: str | bytes) -> Callable[[Path], dict[str, str]]:
    return lambda folder: {"config": text(folder / name, content)}


def source(name: str, content: str | bytes, **more: str) -> Callable[[Path], dict[str, str]]:
    return lambda folder: {"data__source": text(folder / name, content), **more}


def flags(**changes: str) -> Callable[[Path], dict[str, str]]:
    return lambda folder: changes


PARAGRAPHS = "\n\n".join(f"This is paragraph {n} of a short text." for n in range(200))

BAD: dict[str, tuple[Callable[[Path], dict[str, str]], list[str]]] = {
    # kind: (changes to a good command, what the message holds)
    "unknown flag": (flags(train__stepz="3"), ["--train.stepz", "--train.steps"]),
    "unknown section": (flags(trian__steps="3"), ["--trian.steps", "--train.steps"]),
    "a word for a number": (flags(train__steps="many"), ["--train.steps", "many", "int"]),
    "a fraction for a whole number": (flags(train__steps="2.5"), ["--train.steps", "2.5"]),
    "a word for a rate": (flags(optimizer__lr="fast"), ["--optimizer.lr", "fast", "float"]),
    "an unknown choice": (
        flags(train__precision="fp16"),
        ["--train.precision", "fp16", "bf16-mixed"],
    ),
    "an unknown choice of a method": (
        flags(model__crnet__init="svd"),
        ["--model.crnet.init", "svd", "spectral"],
    ),
    "no value": (flags(train__steps=""), ["--train.steps"]),
    "an unknown parameterization": (flags(model__linear="crnt"), ["'crnt'", "did you mean crnet"]),
    "an unknown optimizer": (flags(optimizer__name="adam"), ["'adam'", "did you mean adamw"]),
    "rank above the width": (flags(model__rank="33"), ["rank 33", "32 or less"]),
    "unreadable rank": (flags(model__rank="a lot"), ["'a lot'", "96x3,112x4"]),
    "too many ranks": (flags(model__rank="8x5"), ["gives 5 ranks", "2 blocks"]),
    "ranks of no published shape": (
        flags(model__rank="aligned-parameters"),
        ["aligned-parameters", "give numbers"],
    ),
    "heads that do not divide": (
        flags(model__num_heads="5"),
        ["--model.num-heads 5", "nearest number of heads that divides it is 4"],
    ),
    "key/value heads that do not divide": (
        flags(model__num_heads="4", model__num_kv_heads="3"),
        ["--model.num-heads 4", "--model.num-kv-heads 3"],
    ),
    "heads of odd size": (flags(model__num_heads="32"), ["odd size 1", "even"]),
    "zero steps": (flags(train__steps="0"), ["--train.steps is 0", "above zero"]),
    "negative steps": (flags(train__steps="-3"), ["--train.steps", "-3"]),
    "micro-batch that does not divide": (
        flags(train__micro_batch_size="3"),
        ["--train.batch-size 8", "--train.micro-batch-size 3"],
    ),
    "rate of zero": (flags(optimizer__lr="0"), ["--optimizer.lr is 0", "above zero"]),
    "rate that is no number": (flags(optimizer__lr="nan"), ["--optimizer.lr is nan", "above zero"]),
    "share above one": (flags(optimizer__warmup_frac="3"), ["--optimizer.warmup-frac is 3.0"]),
    "vocabulary below the bytes": (flags(data__vocab_size="200"), ["is 200", "at least 257"]),
    "model vocabulary below the tokenizer's": (
        flags(model__vocab_size="299"),
        ["--model.vocab-size 299", "tokenizer's 300", "leave it out"],
    ),
    "a device that is not there": (
        flags(train__device="cuda:99"),
        ["--train.device cuda:99", "say cpu, cuda or auto"],
    ),
    "a device that is none": (flags(train__device="gpu"), ["--train.device gpu", "say cpu"]),
    "missing source": (
        lambda folder: {"data__source": str(folder / "no.txt")},
        ["no.txt", "no such file", "check the path"],
    ),
    "mistyped source": (
        lambda folder: {"data__source": text(folder / "corpus.txt", "x") and f"{folder}/crpus.txt"},
        ["crpus.txt", "did you mean", "/corpus.txt"],
    ),
    "empty source": (source("empty.txt", ""), ["empty.txt", "holds no text", "name a corpus"]),
    "source of blanks": (source("blank.txt", " \n\n\t\n"), ["blank.txt", "holds no text"]),
    "undecodable source": (
        source("latin.txt", "caf\xe9 ".encode("latin-1") * 50),
        ["latin.txt", "byte 3 (0xe9)", "iconv -f LATIN1"],
    ),
    "packed source cut off": (
        lambda folder: {"data__source": text(folder / "cut.txt.gz", gzip.compress(b"x" * 99)[:20])},
        ["cut.txt.gz", "not a whole .gz file", "again"],
    ),
    "records that are none": (
        source("bad.jsonl", '{"text": "good"}\n{"text": \n'),
        ["bad.jsonl:2", "is not a JSON record", "jq"],
    ),
    "records without text": (
        source("bad.jsonl", '{"number": 1}\n'),
        ["bad.jsonl:1", "number", "--data.text-key"],
    ),
    "no document to validate on": (
        source("short.txt", "one document", data__documents="file"),
        ["short.txt", "none of them for validation", "--data.validation-source"],
    ),
    "corpus below one batch": (
        source("short.txt", PARAGRAPHS, train__batch_size="4000"),
        ["rows of 16 tokens where 4000 are needed", "--train.batch-size"],
    ),
    "validation below one row": (
        source("short.txt", PARAGRAPHS, data__sequence_length="400", train__batch_size="1"),
        ["the validation part", "0 rows of 400 tokens", "--data.validation-source"],
    ),
    "missing validation source": (
        lambda folder: {"data__validation_source": str(folder / "none.txt")},
        ["--data.validation-source", "none.txt", "no such file"],
    ),
    "missing tokenizer": (
        lambda folder: {"data__tokenizer": str(folder / "none.json")},
        ["--data.tokenizer", "none.json", "no such file"],
    ),
    "a tokenizer that is none": (
        lambda folder: {"data__tokenizer": text(folder / "tokenizer.json", "{}")},
        ["tokenizer.json"],
    ),
    "missing settings": (
        lambda folder: {"config": str(folder / "none.yaml")},
        ["--config", "none.yaml", "No such file"],
    ),
    "settings of another kind": (settings_file("a.ini", "x"), ["a.ini", ".yaml, .toml or .json"]),
    "settings that are not well-formed": (
        settings_file("a.yaml", "train: ["),
        ["a.yaml", "not well-formed", "line"],
    ),
    "toml that is not well-formed": (
        settings_file("a.toml", "[train\n"),
        ["a.toml", "not well-formed", "line 1"],
    ),
    "json that is not well-formed": (
        settings_file("a.json", '{"a": }'),
        ["a.json", "not well-formed", "line 1"],
    ),
    "settings that are not text": (
        settings_file("a.yaml", b"\xff\xfe\x00"),
        ["a.yaml", "not UTF-8"],
    ),
    "settings that are a list": (settings_file("a.yaml", "- 1\n"), ["a.yaml", "sections"]),
    "settings that are empty": (settings_file("a.yaml", ""), ["a.yaml", "holds no sections"]),
    "settings with an unknown section": (
        settings_file("a.yaml", "trainer:\n  steps: 3\n"),
        ["a.yaml", "trainer"],
    ),
    "settings with an unknown key": (
        settings_file("a.yaml", "optimizer:\n  learning_rate: 3\n"),
        ["a.yaml", "learning_rate"],
    ),
    "settings with an unknown key of train": (
        settings_file("a.yaml", "train:\n  stepz: 3\n"),
        ["a.yaml", "stepz"],
    ),
    "settings of a wrong type": (
        settings_file("a.yaml", "optimizer:\n  beta1: much\n"),
        ["a.yaml", "beta1", "much"],
    ),
    "settings of a wrong type in train": (
        settings_file("a.yaml", "train:\n  seed: many\n"),
        ["a.yaml", "seed", "many"],
    ),
    "a value where a section should be": (
        settings_file("a.yaml", "optimizer: 5\n"),
        ["optimizer", "5"],
    ),
    "a number where the section train should be": (
        settings_file("a.yaml", "train: 5\n"),
        ["train", "5"],
    ),
    "a fraction for a whole number in settings": (
        settings_file("a.yaml", "data:\n  max_documents: 2.5\n"),
        ["max_documents", "2.5"],
    ),
    "a cache that cannot be written": (
        lambda folder: {"data__cache_dir": text(folder / "file", "x") + "/cache"},
        ["prepared tokens cannot be written", "Not a directory", "--data.cache-dir"],
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input(corpus: Path, tmp_path: Path, call: Callable[..., Any], kind: str) -> None:
    changes, holds = BAD[kind]
    out = tmp_path / "out"
    code, printed, err = call(*train_words(corpus, out, **changes(tmp_path)))
    assert code == 2, (printed, err)
    for part in holds:
        assert part in err
    assert "Traceback" not in err
    assert printed == ""
    assert not out.exists(), "a run folder was left behind"
    assert not list(tmp_path.rglob("*unfinished*"))


BAD_COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "unknown command": (["trian"], ["trian", "train"]),
    "a section": (["train", "--model", "5"], ["--model is a section", "--model.KEY VALUE"]),
    "a plugin that is not there": (
        ["train", "--plugins", "{tmp}/none.py"],
        ["--plugins {tmp}/none.py", "No such file"],
    ),
    "a flag that is gone": (["cost", "--paper-table", "2"], ["--paper-table"]),
    "a table as Markdown": (["paper", "2", "--markdown"], ["--markdown prints all", "leave out 2"]),
    "two forms": (["paper", "--markdown", "--json"], ["leave one out"]),
    "unknown preset": (["train", "llama-6m"], ["'llama-6m'", "llama-60m"]),
    "two presets": (["train", "tiny", "llama-60m"], ["llama-60m"]),
    "resume of nothing": (["train", "--resume"], ["--resume", "no run under", "--out"]),
    "resume of an empty folder": (
        ["train", "--resume", "--out", "{tmp}"],
        ["nothing to resume", "no run.json"],
    ),
    "resume of a broken run": (
        ["train", "--resume", "--out", "{tmp}/broken"],
        ["broken/run.json", "not valid JSON"],
    ),
    "resume of a run.json without settings": (
        ["train", "--resume", "--out", "{tmp}/hollow"],
        ["hollow/run.json"],
    ),
    "resume of a run.json that is a list": (
        ["train", "--resume", "--out", "{tmp}/list"],
        ["list/run.json"],
    ),
    "a file where the run folder should be": (
        ["train", "--out", "{tmp}/file"],
        ["{tmp}/file is not a folder", "choose another --out"],
    ),
    "a file above the run folder": (
        ["train", "--out", "{tmp}/file/run"],
        ["{tmp}/file is not a folder", "choose another --out"],
    ),
    "evaluate nothing": (["evaluate"], ["CHECKPOINT"]),
    "evaluate what is not there": (["evaluate", "{tmp}/none"], ["none", "it is not there"]),
    "evaluate a folder without checkpoints": (
        ["evaluate", "{tmp}"],
        ["holds no checkpoints/step_N"],
    ),
    "generate from nothing": (["generate", "{tmp}/none"], ["none", "it is not there"]),
    "generate at temperature zero": (
        ["generate", "{tmp}", "--temperature", "0"],
        ["--temperature is 0", "--greedy"],
    ),
    "generate no token": (["generate", "{tmp}", "--max-tokens", "0"], ["--max-tokens is 0"]),
    "generate with top-p above one": (["generate", "{tmp}", "--top-p", "2"], ["--top-p is 2.0"]),
    "generate with an unknown flag": (["generate", "{tmp}", "--topk", "2"], ["--topk", "--top-k"]),
    "consolidate without a place": (["consolidate", "{tmp}"], ["--out"]),
    "consolidate what is not there": (
        ["consolidate", "{tmp}/none", "--out", "{tmp}/new"],
        ["none", "it is not there"],
    ),
    "prepare what is not there": (
        ["prepare", "--data.source", "{tmp}/none.txt"],
        ["none.txt", "no such file"],
    ),
    "prepare with a bad vocabulary": (["prepare", "--data.vocab-size", "3"], ["is 3", "257"]),
    "demo of zero steps": (["demo", "--steps", "0", "--quick"], ["--train.steps is 0"]),
}


@pytest.mark.parametrize("kind", BAD_COMMANDS)
def test_bad_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any], kind: str
) -> None:
    words, holds = BAD_COMMANDS[kind]
    (tmp_path / "file").write_text("x")
    for name, content in (("broken", "{"), ("hollow", "{}"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    code, printed, err = call(*(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert code == 2, (printed, err)
    for part in holds:
        assert part.replace("{tmp}", str(tmp_path)) in err
    assert "Traceback" not in err
    assert printed == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_is_there_is_left_alone(
    trained: tuple[Path, dict[str, Any]], corpus: Path, call: Callable[..., Any]
) -> None:
    folder, _ = trained
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, _, err = call(*train_words(corpus, folder))
    assert code == 2
    assert "go on with --resume, or choose another --out" in err
    code, _, err = call("train", "--resume", "--out", str(folder), "--model.rank", "9")
    assert code == 2
    assert "--model.rank was '8' and is now '9'" in err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_all_problems_at_once(corpus: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    changes = {
        "model__num_heads": "5",
        "model__linear": "nothing",
        "optimizer__lr": "-1",
        "optimizer__beta1": "1",
        "data__sequence_length": "1",
        "train__steps": "0",
        "train__micro_batch_size": "3",
    }
    code, _, err = call(*train_words(corpus, tmp_path / "out", **changes))
    assert code == 2
    problems = err.split("crnet: ")[1:]
    assert len(problems) == 7
    for key in changes:  # a flag in whole: a method's name may hold a part of one
        flag = "--" + key.replace("__", ".").replace("_", "-")
        assert sum(flag in problem for problem in problems) == 1
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoint_is_passed_over_with_a_warning(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, call: Callable[..., Any]
) -> None:
    folder = shutil.copytree(trained[0], tmp_path / "run")
    weights = folder / "checkpoints" / "step_12" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, out, err = call("evaluate", str(folder), "--json")
    assert code == 0, err
    assert json.loads(out)["step"] == 6
    assert err.count(f"crnet: warning: {weights}: truncated") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "holds"),
    [
        (["train", "--train.steps", "0", "--model.num-heads", "5"], ["is 0", "nearest number"]),
        (["train", "--train.stepz", "3"], ["--train.stepz", "--train.steps"]),
    ],
)
def test_bad_input_of_the_real_program(tmp_path: Path, words: list[str], holds: list[str]) -> None:
    done = program(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for part in holds:
        assert part in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(autouse=True)
def _no_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad command that is taken for a good one must fail here, not train for an hour."""
    build = start.build

    def small(spec: Any, *arguments: Any) -> Any:
        assert spec.shape.hidden_size <= 64, "this test would train a large model"
        return build(spec, *arguments)

    monkeypatch.setattr(start, "build", small)


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    done = program("demo", "--quick", "--steps", "6", "--out", str(tmp_path / "demo"), "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert set(figures["rows"]) == {"crnet", "full"}
    assert figures["rows"]["crnet"]["parameters"] < figures["rows"]["full"]["parameters"]
    assert Path(figures["picture"]).read_bytes().startswith(b"\x89PNG")
    for linear, row in figures["rows"].items():
        assert rows_of(tmp_path / "demo" / linear)[-1]["val_perplexity"] == row["perplexity_after"]


def test_evaluate_proves_the_checkpoint_whole_once(
    trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each proof reads and hashes all of it; a damaged one would be warned of twice."""
    proofs = []
    load = checkpoint.load
    monkeypatch.setattr(
        checkpoint, "load", lambda folder, **how: proofs.append(folder) or load(folder, **how)
    )
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(trained[0]), "--json"])
    assert ended.value.code == 0
    assert len(proofs) == 1
