"""What a hostile user does, in small; ``tests/hostile.py`` tries the whole command line."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crnet.cli import streams
from crnet.cli.arguments import print_json
from crnet.config.check import check
from crnet.config.sections import DataConfig, RunConfig
from crnet.config.serialize import build, from_dict, override, read_json, to_dict
from crnet.config.settings_file import read_config_file
from crnet.data import sources
from crnet.data.prepare import prepare
from crnet.data.shards import open_prepared
from crnet.errors import ConfigError
from crnet.inference.load import pick_device
from crnet.storage import files, metrics
from crnet.train.signals import signals

# Prepared tokens


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    (tmp_path / "a.txt").write_text("".join(f"line number {i}\n" for i in range(300)))
    return DataConfig(
        source=(str(tmp_path / "a.txt"),),
        documents="line",
        vocab_size=300,
        cache_dir=tmp_path / "cache",
    )


def flip(path: Path) -> None:
    """One bit, with the times as they were."""
    was = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.idx", "tokenizer.json"])
def test_a_flipped_bit_of_the_cache_is_noticed(name: str, data: DataConfig) -> None:
    made = prepare(data, progress=False)
    content = (made.folder / name).read_bytes()
    flip(made.folder / name)
    with pytest.warns(UserWarning, match=rf"{name}: altered .* preparing it again"):
        assert prepare(data, progress=False) == made
    assert (made.folder / name).read_bytes() == content


@pytest.mark.parametrize(
    ("key", "value"), [("eos_id", 7), ("vocab_size", "many"), ("parts", 3), ("more", 1)]
)
def test_an_edited_description_is_noticed(key: str, value: Any, data: DataConfig) -> None:
    made = prepare(data, progress=False)
    path = made.folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.warns(UserWarning, match=r"meta.json: altered .* preparing it again"):
        assert prepare(data, progress=False) == made


def test_files_are_hashed_once(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a copy, and not again; where nothing can be remembered, every time."""
    from crnet.data import shards

    made, hashed, real = prepare(data, progress=False), [], shards.file_of
    monkeypatch.setattr(shards, "file_of", lambda path: hashed.append(path.name) or real(path))
    open_prepared(made.folder)
    assert hashed == []
    copy = made.folder.with_name("copy")
    subprocess.run(["cp", "-a", str(made.folder), str(copy)], check=True)
    open_prepared(copy)
    assert sorted(hashed) == sorted(made.files)
    open_prepared(copy)
    assert len(hashed) == len(made.files)
    (copy / "verified.json").unlink()
    (copy / "verified.json").mkdir()
    open_prepared(copy)
    open_prepared(copy)
    assert len(hashed) == 3 * len(made.files)


def test_a_source_that_changes_while_it_is_read(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sources.documents

    def documents(config: DataConfig) -> Any:
        yield from real(config)
        Path(data.source[0]).write_text("".join(f"another line {i}\n" for i in range(300)))

    monkeypatch.setattr(sources, "documents", documents)
    with pytest.raises(ConfigError, match="changed while it was read"):
        prepare(data, progress=False)
    assert not list((data.cache_dir or Path()).iterdir())


def test_records_that_go_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ConfigError, match=r"a.jsonl:1: .*too deep"):
        list(sources.documents(DataConfig(source=(str(path),))))


def test_a_byte_order_mark_is_no_part_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "x"}\n{"text": "y"}\n')
    found = sources.documents(DataConfig(source=(str(path),)))
    assert [document.text for document in found] == ["x", "y"]


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ConfigError, match=r"pipe.txt: is neither a file nor a folder"):
        sources.identity(DataConfig(source=(str(tmp_path),)))


# Settings


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.yaml", "train: {steps: 1, steps: 2}", "key steps stands there twice"),
        ("a.yaml", "train: {steps: 1}\ntrain: {seed: 1}", "key train stands there twice"),
        ("a.json", '{"train": {"steps": 1, "steps": 2}}', "'steps' stands there twice"),
        ("a.yaml", "[" * 50_000, "too deep"),
        ("a.json", "[" * 50_000, "too deep"),
        ("a.toml", "a = " + "[" * 50_000, "too deep"),
        ("a.yaml", "model: &m\n  linear: *m", "holds itself"),
        ("a.yaml", "model: {1: 2}", "has the key 1"),
        ("a.yaml", "model: {rank: !!set {a}}", "model.rank is a set"),
        ("a.yaml", 'data: {source: ["a\\0b"]}', "data.source lists"),
        ("a.json", '{"data": {"source": ["\\ud800"]}}', "data.source lists"),
        ("a.yaml", "resume: true", "'resume' is no section"),
    ],
)
def test_settings_that_no_key_takes(name: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=says) as caught:
        read_config_file(tmp_path / name)
    assert all(name in problem for problem in caught.value.problems)


def test_a_billion_laughs(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="stand for too many values"):
        read_config_file(tmp_path / "a.yaml")


def test_settings_with_anchors_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("\ufefftrain: &t {steps: 1}\noptimizer:\n  <<: *t\n  lr: 2\n")
    found = read_config_file(tmp_path / "a.yaml")
    assert found == {"train": {"steps": 1}, "optimizer": {"steps": 1, "lr": 2}}


def test_a_configuration_that_is_none() -> None:
    assert from_dict(to_dict(RunConfig())) == RunConfig()
    with pytest.raises(ConfigError, match="is a list"):
        from_dict([])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="missing key sha256"):
        build(metrics_like(), {"bytes": 1})


def metrics_like() -> type:
    from crnet.data.shards import File

    return File


@pytest.mark.parametrize(
    ("content", "says"),
    [("[" * 100_000, "too deep"), ('{"a": 1, "a": 2}', "twice"), ("[]", "no JSON object")],
)
def test_json_that_is_refused(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=says):
        read_json(tmp_path / "a.json")


# Streams


def test_a_result_is_json_to_the_letter(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": "\udcff"})
    found = json.loads(capsys.readouterr().out)
    assert found == {"a": None, "b": [None, 1.5], "c": "\udcff"}


@pytest.mark.parametrize(
    ("encoding", "wanted"),
    [("utf-8", b"\xff\xe6\xbc\xa2"), ("latin-1", b"\\udcff\\u6f22"), ("ascii", b"\\udcff\\u6f22")],
)
def test_any_text_can_be_printed(
    encoding: str, wanted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding, write_through=True))
    with streams.steady():
        print("\udcff漢", end="")
    assert content.getvalue() == wanted


def test_a_message_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        with streams.steady():
            print("message\n" * 5000, file=sys.stderr)
            sys.stderr.flush()
        assert sys.stderr is full


@pytest.mark.parametrize(
    ("shell", "code", "says"),
    [
        (">/dev/full", 2, "standard output cannot be written (No space left on device)"),
        ("--json >/dev/full", 2, "standard output cannot be written"),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("| head -c 1 >/dev/null", 0, ""),
    ],
)
def test_streams_of_the_program(shell: str, code: int, says: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m crnet list {shell}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert says in done.stderr
    assert says or done.stderr == ""


# Runs


def test_a_device_without_numbers() -> None:
    with pytest.raises(ConfigError, match=r"meta: cannot be used .*say cpu"):
        pick_device("meta")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    script = "from pathlib import Path; from crnet.storage import files\n"
    script += f"with files.alone(Path({str(tmp_path)!r})): print('in', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"in\n"
    with (
        pytest.raises(ConfigError, match="another process is training there"),
        files.alone(tmp_path),
    ):
        pass
    other.kill()
    other.communicate()
    with files.alone(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line", [b"[1]", b"\xff", b'{"loss": 1}', b'{"step": 1.5}', b'{"step": 1, "loss": "1"}']
)
def test_a_row_of_metrics_that_is_none(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for content in (line + b'\n{"step": 2}\n', line + b"\n"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"metrics.jsonl, line 1: is no row"):
            metrics.read(path)
    path.write_bytes(b'{"step": 2}\n' + line)
    assert metrics.read(path) == [{"step": 2}]


def test_a_figure_that_is_not_finite_is_json_all_the_same(tmp_path: Path) -> None:
    log = metrics.Metrics(tmp_path)
    log.write({"step": 1, "loss": math.nan, "val_perplexity": math.inf})
    log.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "loss": null, "val_perplexity": null}\n'
    (row,) = metrics.read(tmp_path / "metrics.jsonl")
    assert math.isnan(row["loss"])
    again = metrics.Metrics(tmp_path, upto_step=1)
    again.close()
    assert (tmp_path / "metrics.jsonl").read_text() == line


@pytest.mark.parametrize(("handler", "stops"), [(signal.SIG_DFL, "SIGHUP"), (signal.SIG_IGN, None)])
def test_a_terminal_that_is_gone_stops_a_run(
    handler: Callable[..., Any] | int, stops: str | None
) -> None:
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested == stops
        assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", str(2**64)])
def test_no_number_of_an_option_is_without_bounds(value: str) -> None:
    """Of no method: the options are found on the configuration's own classes."""
    from crnet.config.sections import ModelConfig, OptimizerConfig

    tried = 0
    for name, section in (("model", ModelConfig()), ("optimizer", OptimizerConfig())):
        for method, options in vars(section).items():
            for key, now in vars(options).items() if dataclasses.is_dataclass(options) else ():
                if type(now) is not (int if value.isdigit() else float):
                    continue
                changed = dataclasses.replace(options, **{key: type(now)(value)})
                config = override(RunConfig(), **{name: {method: changed}})
                flag = f"--{name}.{method}.{key} is ".replace("_", "-")
                with pytest.raises(ConfigError) as caught:
                    check(config)
                assert any(problem.startswith(flag) for problem in caught.value.problems), flag
                tried += 1
    assert tried >= 2


@pytest.mark.parametrize("text", ["8x99999999999", "8x5"])
def test_too_many_ranks_are_not_listed(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"{text} gives \d+ ranks"):
        check(override(RunConfig(), model={"rank": text, "num_layers": 3}))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("model", key, 2**63) for key in ("hidden_size", "num_layers", "vocab_size")),
        *(("train", key, 2**64) for key in ("steps", "seed", "threads", "batch_size")),
        ("optimizer", "clip_norm", float("inf")),
        ("optimizer", "weight_decay", float("nan")),
    ],
)
def test_a_number_that_nothing_can_hold(section: str, key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--{section}.{key.replace('_', '-')} is"):
        check(override(RunConfig(), **{section: {key: value}}))


@pytest.mark.parametrize("name", ["..", ".", "", "../x", "/x", "a/../../x", "a\0b"])
def test_a_name_that_leads_out_of_a_folder(name: str, tmp_path: Path) -> None:
    from crnet.storage import checkpoint

    (tmp_path / "checksums.json").write_text(json.dumps({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(ConfigError, match=r"checksums.json: altered .* not the name of a file"):
        checkpoint.load(tmp_path)
