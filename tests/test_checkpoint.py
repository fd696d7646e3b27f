"""Checkpoints: what an interruption, a damaged file or a full disk leaves behind.

Equality of weights, optimizer states and figures is by bits throughout.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from crnet.config.sections import RunConfig
from crnet.config.serialize import override, to_dict
from crnet.data.prepare import prepare
from crnet.data.rows import Batches, validation_batches
from crnet.errors import ConfigError
from crnet.hub import files as hub
from crnet.inference.load import load_model, load_tokenizer
from crnet.storage import checkpoint, metrics, parts
from crnet.storage.checkpoint import CHECKSUMS, DESCRIPTION, STATE, WEIGHTS, Contents
from crnet.train import start
from test_train import run, tiny, weights_of

TOKENIZER = "tokenizer.json"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics without the one figure that a clock decides."""
    rows = metrics.read(folder / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_s", "peak_bytes")} for row in rows
    ]


def assert_same(found: Any, wanted: Any, where: str = "") -> None:
    """Equal by bits, through dicts, lists and tensors."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}/{key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), where
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype, where
        assert torch.equal(found, wanted), where
    else:
        assert found == wanted, where


def assert_same_run(folder: Path, reference: Path) -> None:
    ours, theirs = checkpoint.newest(folder), checkpoint.newest(reference)
    assert ours is not None
    assert theirs is not None
    assert ours.progress == theirs.progress
    assert_same(ours.weights(), theirs.weights(), "weights")
    states = [saved.state() for saved in (ours, theirs)]
    for state in states:
        # The loop draws no number from torch's own generator: it stands where this process, or
        # the process that was killed, had left it. That it is brought back has a test of its own.
        del state["torch_rng"]
    assert_same(*states, "state")
    assert rows_of(folder) == rows_of(reference)


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps: checkpoints at 8 and 12, evaluations at 0, 5, 10, 12."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert run(tiny(corpus), folder).finished
    return folder


@pytest.fixture
def copy(reference: Path, tmp_path: Path) -> Path:
    """The reference run, to be damaged."""
    return shutil.copytree(reference, tmp_path / "copy")


class Crash(BaseException):
    """Stands for a death that nothing in the loop handles."""


def at_batch(patch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Do something as the loop asks for its ``number``-th batch (from 1) of this start."""
    plain, count = Batches.next, iter(range(1, 10_000))

    def counted(self: Batches, *arguments: Any) -> Any:
        if next(count) == number:
            action()
        return plain(self, *arguments)

    patch.setattr(Batches, "next", counted)


def crashed(config: RunConfig, folder: Path, number: int) -> None:
    def crash() -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, number, crash)
        with pytest.raises(Crash):
            run(config, folder)


# Interruption


@pytest.mark.parametrize(
    ("number", "sign"),
    [
        pytest.param(number, sign, marks=[] if fast else [pytest.mark.slow])
        for number, sign, fast in (
            (1, signal.SIGTERM, True),
            (5, signal.SIGINT, True),
            (11, signal.SIGTERM, True),
            (4, signal.SIGTERM, False),
            (7, signal.SIGINT, False),
            (12, signal.SIGINT, False),
        )
    ],
)
def test_stopped_by_a_signal_and_resumed(
    corpus: Path, reference: Path, tmp_path: Path, number: int, sign: signal.Signals
) -> None:
    config = tiny(corpus)
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, number, lambda: os.kill(os.getpid(), sign))
        result = run(config, tmp_path / "run")
    # The step that the signal found running is finished, and saved; evaluations can wait.
    assert (result.step, result.finished) == (number, False)
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / f"step_{number}"
    again = run(config, tmp_path / "run", resume=True)
    assert (again.step, again.finished) == (12, True)
    assert_same_run(tmp_path / "run", reference)


def test_stopped_by_a_signal_during_an_evaluation(
    corpus: Path, reference: Path, tmp_path: Path
) -> None:
    """Before the first step, too: the evaluation is made up for, once."""
    plain = validation_batches

    def signalled(*arguments: Any) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    for resume in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("crnet.inference.evaluate.validation_batches", signalled)
            result = run(tiny(corpus), tmp_path / "run", resume=resume)
        assert (result.step, result.finished) == (0, False)
    assert run(tiny(corpus), tmp_path / "run", resume=True).finished
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.parametrize("number", [1, 4, 5, 8, 9, 12])
def test_died_between_checkpoints_and_resumed(
    corpus: Path, reference: Path, tmp_path: Path, number: int
) -> None:
    """Figures written after the last checkpoint are dropped and written again."""
    config = tiny(corpus)
    crashed(config, tmp_path / "run", number)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "tok')  # a line that was being written
    assert run(config, tmp_path / "run", resume=True).finished
    assert_same_run(tmp_path / "run", reference)


def test_the_state_of_other_random_numbers_comes_back(
    corpus: Path, reference: Path, tmp_path: Path
) -> None:
    config = tiny(corpus)
    crashed(config, tmp_path / "run", 6)
    torch.manual_seed(12345)
    saved = checkpoint.newest(tmp_path / "run")
    assert saved is not None
    result = run(override(config, train={"steps": 4}), tmp_path / "run", resume=True)
    assert result.step == saved.progress.step == 4
    assert torch.equal(torch.get_rng_state(), saved.state()["torch_rng"])


# Kill -9


def flags(config: RunConfig) -> list[str]:
    """The configuration as words of the command line, whatever is not a default."""
    words = []
    default = to_dict(RunConfig())
    for section in ("model", "data", "optimizer", "train"):
        for key, value in to_dict(config)[section].items():
            if value != default[section][key]:
                for each in value if isinstance(value, list) else [value]:
                    words += [f"--{section}.{key.replace('_', '-')}", str(each)]
    return words


def being_written(root: Path) -> set[str]:
    """Names of files in unfinished folders, which may go while one looks."""
    names: set[str] = set()
    with contextlib.suppress(FileNotFoundError):
        for folder in os.listdir(root):
            if folder.startswith(".unfinished-"):
                names |= set(os.listdir(root / folder))
    return names


def killed_and_resumed(config: RunConfig, folder: Path, kills: int, seed: int) -> int:
    """Kill the real program again and again, resume it each time; returns the kills that hit it."""
    chance = random.Random(seed)
    steps, hits = config.train.steps, 0
    command = [sys.executable, "-m", "crnet", "train", "--out", str(folder), *flags(config)]
    log = folder / "metrics.jsonl"
    for number in range(kills):
        resume = ["--resume"] if (folder / "run.json").exists() else []
        target = steps * (number + 1) // (kills + 2)
        # In turn: after so many rows; while a checkpoint is written; while one is published.
        kind = ("rows", "writing", "state")[number % 3]
        process = subprocess.Popen(
            [*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            step = max((row["step"] for row in metrics.read(log)), default=0)
            names = being_written(folder / "checkpoints")
            if step >= target and (
                kind == "rows"
                or (kind == "writing" and names)
                or (kind == "state" and names & {STATE, CHECKSUMS})
            ):
                break
            time.sleep(0 if step >= target else 0.002)
        time.sleep(chance.choice([0, 0, 0.001, 0.005, 0.02]))
        process.send_signal(signal.SIGKILL)
        hits += process.wait() == -signal.SIGKILL
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return hits


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_resumed(corpus: Path, tmp_path: Path, kills: int) -> None:
    config = tiny(corpus, train={"steps": 20 * kills, "save_every_steps": 5})
    hits = killed_and_resumed(config, tmp_path / "killed", kills, seed=kills)
    assert hits >= kills - 1  # the last one may come after the end on a fast machine
    run(config, tmp_path / "reference")
    assert_same_run(tmp_path / "killed", tmp_path / "reference")
    names = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert {name for name in names if not name.startswith(".")} == {
        f"step_{config.train.steps - 5}",
        f"step_{config.train.steps}",
    }


# Damage


def truncate(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def empty(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(b"") and None


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) * 2 // 3] ^= 1
        (folder / name).write_bytes(content)

    return damage


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def with_new_sums(folder: Path, name: str) -> None:
    sums = json.loads((folder / CHECKSUMS).read_text())
    path = folder / name
    sums[name] = {"bytes": path.stat().st_size, "sha256": checkpoint.sha256(path)}
    (folder / CHECKSUMS).write_text(json.dumps(sums))


def other_format(folder: Path) -> None:
    description = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(description | {"format": 999}))
    with_new_sums(folder, DESCRIPTION)


def no_progress(folder: Path) -> None:
    description = json.loads((folder / DESCRIPTION).read_text())
    del description["position"]
    (folder / DESCRIPTION).write_text(json.dumps(description))
    with_new_sums(folder, DESCRIPTION)


def unspoken(folder: Path) -> None:
    sums = json.loads((folder / CHECKSUMS).read_text())
    del sums[STATE]
    (folder / CHECKSUMS).write_text(json.dumps(sums))


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "weights truncated": (truncate(WEIGHTS), WEIGHTS, "truncated"),
    "weights empty": (empty(WEIGHTS), WEIGHTS, "truncated"),
    "weights flipped": (flip(WEIGHTS), WEIGHTS, "altered"),
    "weights missing": (lose(WEIGHTS), WEIGHTS, "missing"),
    "state truncated": (truncate(STATE), STATE, "truncated"),
    "state flipped": (flip(STATE), STATE, "altered"),
    "state missing": (lose(STATE), STATE, "missing"),
    "state unspoken of": (unspoken, STATE, "does not speak of"),
    "description truncated": (truncate(DESCRIPTION), DESCRIPTION, "truncated"),
    "description flipped": (flip(DESCRIPTION), DESCRIPTION, "altered"),
    "description missing": (lose(DESCRIPTION), DESCRIPTION, "missing"),
    "description of another format": (other_format, "step_12", "format 999; this version reads 1"),
    "description without the position": (no_progress, "step_12", "position"),
    "tokenizer flipped": (flip(TOKENIZER), TOKENIZER, "altered"),
    "tokenizer missing": (lose(TOKENIZER), TOKENIZER, "missing"),
    "checksums missing": (lose(CHECKSUMS), CHECKSUMS, "No such file"),
    "checksums empty": (empty(CHECKSUMS), CHECKSUMS, "not valid JSON"),
    "checksums truncated": (truncate(CHECKSUMS), CHECKSUMS, "not valid JSON"),
    "checksums without a file": (write(CHECKSUMS, "{}"), CHECKSUMS, "does not speak of"),
    "checksums a list": (write(CHECKSUMS, "[]"), CHECKSUMS, ""),
    "checksums of another kind": (write(CHECKSUMS, f'{{"{WEIGHTS}": 5}}'), CHECKSUMS, ""),
    "checksums binary": (
        lambda folder: (folder / CHECKSUMS).write_bytes(b"\xff\xfe\x00") and None,
        CHECKSUMS,
        "not valid JSON",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_and_named(copy: Path, kind: str) -> None:
    damage, name, says = DAMAGES[kind]
    folder = copy / "checkpoints" / "step_12"
    checkpoint.load(folder)
    damage(folder)
    with pytest.raises(ConfigError) as caught:
        checkpoint.load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert name in message
    assert says in message
    with pytest.warns(UserWarning, match="trying the one before it") as warned:
        saved = checkpoint.newest(copy)
    assert saved is not None
    assert saved.folder == copy / "checkpoints" / "step_8"
    (warning,) = warned
    assert message in str(warning.message)


def test_every_checkpoint_damaged(copy: Path) -> None:
    flip(WEIGHTS)(copy / "checkpoints" / "step_12")
    truncate(STATE)(copy / "checkpoints" / "step_8")
    with pytest.warns(UserWarning, match="step_"), pytest.raises(ConfigError) as caught:
        checkpoint.newest(copy)
    assert len(caught.value.problems) == 3
    first, newer, older = caught.value.problems
    assert first == f"{copy}: no whole checkpoint is left"
    assert str(copy / "checkpoints" / "step_12" / WEIGHTS) in newer
    assert str(copy / "checkpoints" / "step_8" / STATE) in older


@pytest.mark.parametrize("kind", ["weights flipped", "state truncated", "checksums missing"])
def test_resuming_past_a_damaged_checkpoint(
    corpus: Path, reference: Path, copy: Path, kind: str
) -> None:
    DAMAGES[kind][0](copy / "checkpoints" / "step_12")
    with pytest.warns(UserWarning, match="step_12"):
        result = run(tiny(corpus), copy, resume=True)
    assert (result.step, result.finished) == (12, True)
    assert_same_run(copy, reference)


def test_the_checkpoint_just_written_is_kept(corpus: Path, copy: Path) -> None:
    """Also where damaged ones of later steps stand beside it and only one is to be kept."""
    flip(WEIGHTS)(copy / "checkpoints" / "step_12")
    config = tiny(corpus, train={"keep_checkpoints": 1})
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.warns(UserWarning, match="step_12"):
            result = run(config, copy, resume=True)
    assert result.checkpoint == copy / "checkpoints" / "step_9"
    assert checkpoint.load(result.checkpoint).progress.step == 9


def test_leftovers_are_ignored_and_replaced(corpus: Path, copy: Path, reference: Path) -> None:
    root = copy / "checkpoints"
    shutil.rmtree(root / "step_12")
    (root / ".unfinished-step_12").mkdir()
    (root / ".unfinished-step_12" / WEIGHTS).write_bytes(b"half")
    (root / ".unfinished-step_12" / "stray").write_bytes(b"half")
    (copy / ".unfinished-run.json").write_text("{")
    (copy / ".unfinished-metrics.jsonl").write_text("{")
    assert [path.name for path in checkpoint.found(copy)] == ["step_8"]
    assert run(tiny(corpus), copy, resume=True).finished
    assert_same_run(copy, reference)
    assert sorted(path.name for path in root.iterdir()) == ["step_12", "step_8"]
    assert not list(copy.glob("*unfinished*"))
    assert not list(copy.glob(".unfinished*"))


def test_leftovers_of_a_removal_go(corpus: Path, copy: Path) -> None:
    """Killed while it removed an old checkpoint, a run must not keep that one's space for ever."""
    root = copy / "checkpoints"
    shutil.rmtree(root / "step_12")
    shutil.copytree(root / "step_8", root / ".unfinished-step_4-old")
    shutil.copytree(root / "step_8", root / ".unfinished-step_7")
    assert run(tiny(corpus), copy, resume=True).finished
    assert sorted(path.name for path in root.iterdir()) == ["step_12", "step_8"]


def test_things_that_are_no_checkpoints(copy: Path, tmp_path: Path) -> None:
    root = copy / "checkpoints"
    (root / "step_99").write_text("a file")
    (root / "step_x").mkdir()
    (root / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match="step_99"):
        saved = checkpoint.newest(copy)
    assert saved is not None
    assert saved.progress.step == 12
    assert checkpoint.newest(tmp_path) is None
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="no checkpoint"):
            checkpoint.resolve(path)


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_the_state_is_verified_by_who_reads_it(corpus: Path, copy: Path, damage: str) -> None:
    """Evaluating and generating read the weights; a damaged state is no matter to them."""
    shutil.rmtree(copy / "checkpoints" / "step_8")
    folder = copy / "checkpoints" / "step_12"
    flip(STATE)(folder) if damage == "flipped" else (folder / STATE).unlink()
    for path in (copy, folder):
        saved = checkpoint.resolve(path)
        assert saved.progress.step == 12
        assert_same(dict(load_model(saved).state_dict()), saved.weights())
        with pytest.raises(ConfigError, match=str(folder / STATE)):
            saved.state()
    with pytest.warns(UserWarning, match="step_12"), pytest.raises(ConfigError) as caught:
        run(tiny(corpus), copy, resume=True)
    assert "no whole checkpoint is left" in caught.value.problems[0]
    assert str(folder / STATE) in caught.value.problems[1]


def test_a_user_may_name_a_run_or_a_checkpoint(copy: Path) -> None:
    assert checkpoint.resolve(copy).progress.step == 12
    assert checkpoint.resolve(copy / "checkpoints" / "step_8").progress.step == 8


# Disks


def save_again(run_dir: Path, step: int = 13, keep: int = 0) -> Path:
    """Write the newest checkpoint of a run once more, as another step."""
    saved = checkpoint.load(checkpoint.found(run_dir)[0])
    return checkpoint.save(
        run_dir,
        checkpoint.Contents(
            weights=saved.weights(),
            state=saved.state(),
            config=saved.config,
            progress=checkpoint.Progress(step, saved.progress.position, saved.progress.tokens),
            extra=saved.extra,
            files={"tokenizer": load_tokenizer(saved).save},
        ),
        keep,
    )


def in_parts(source: checkpoint.Checkpoint, run_dir: Path) -> checkpoint.Checkpoint:
    """The same, its weights written as processes write their parts."""
    weights = {f"{checkpoint.IN_WEIGHTS}{name}": it for name, it in source.weights().items()}

    def write(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process
            parts.write(folder, weights)

    checkpoint.begin(run_dir, source.progress.step)
    tokenizer = {"tokenizer": load_tokenizer(source).save}
    state, extra = source.state(), source.extra
    progress, beside = source.progress, source.beside
    found = Contents({}, state, source.config, progress, extra, tokenizer, write, beside)
    return checkpoint.load(checkpoint.save(run_dir, found, keep=0))


def test_parts_become_the_files_of_one_process(reference: Path, tmp_path: Path) -> None:
    """Byte for byte, also into an empty folder, and again where a killed process left something."""
    source = checkpoint.load(checkpoint.found(reference)[0])
    saved = in_parts(source, tmp_path / "run")
    assert saved.in_parts
    before = contents(saved.folder)
    target = tmp_path / "handed on"
    target.mkdir()
    (tmp_path / ".unfinished-handed on").mkdir()
    (tmp_path / ".unfinished-handed on" / WEIGHTS).write_text("half")
    checkpoint.consolidate(saved, target)
    found = {path.name: content for path, content in contents(target).items()}
    assert found == {path.name: content for path, content in contents(source.folder).items()}
    assert contents(saved.folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["handed on", "run"]
    load_model(checkpoint.resolve(target))


def test_what_is_there_is_not_overwritten(reference: Path, tmp_path: Path) -> None:
    saved = checkpoint.load(checkpoint.found(reference)[0])
    (tmp_path / "file").write_text("mine")
    for target in (reference, saved.folder, tmp_path, tmp_path / "file"):
        before = contents(target)
        with pytest.raises(ConfigError, match="not an empty folder; choose another"):
            checkpoint.consolidate(saved, target)
        assert contents(target) == before


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "crnet.storage.checkpoint.sync"])
def test_a_full_disk_leaves_no_half_of_it(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    saved = checkpoint.load(checkpoint.found(reference)[0])

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, full)
    with pytest.raises(ConfigError, match=r"new: .*No space left on device.*is untouched"):
        checkpoint.consolidate(saved, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "where",
    [
        "safetensors.torch.save_file",
        "torch.save",
        "crnet.storage.checkpoint.write_json",
        "crnet.storage.checkpoint.sync",
    ],
)
def test_full_disk_leaves_the_earlier_checkpoints(
    copy: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    before = contents(copy)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, full)
    with pytest.raises(ConfigError, match=r"step_13: .*No space left on device.*Earlier check"):
        save_again(copy, keep=1)
    monkeypatch.undo()
    assert contents(copy) == before
    assert not (copy / "checkpoints" / ".unfinished-step_13").exists()
    assert checkpoint.newest(copy) is not None


@pytest.mark.parametrize("limit", [1_000, 120_000, 160_000, 250_000])
def test_a_file_that_the_system_cuts_off(copy: Path, limit: int) -> None:
    """A real failure of the write itself, of the weights (150 kB) or the state (330 kB)."""
    before = contents(copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ConfigError, match="step_13: the checkpoint could not be written"):
            save_again(copy, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(copy) == before
    assert not (copy / "checkpoints" / ".unfinished-step_13").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many kB."""
    where = tmp_path / "disk"
    where.mkdir()

    def mount(size_kb: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "crnet-test", str(where)],
            capture_output=True,
        )
        if done.returncode:
            pytest.skip("mounting needs rights that this user does not have")
        return where

    yield mount
    subprocess.run(["umount", "--lazy", str(where)], capture_output=True)


@pytest.mark.parametrize("size_kb", [600, 700, 1100, 1200])
def test_a_run_that_fills_its_disk(
    corpus: Path, reference: Path, small_disk: Callable[[int], Path], size_kb: int
) -> None:
    """A checkpoint has 500 kB: one or two fit. With room, the run goes on as if never stopped."""
    folder = small_disk(size_kb) / "run"
    config = tiny(corpus, train={"keep_checkpoints": 0})
    with pytest.raises(ConfigError, match="No space left on device"):
        run(config, folder)
    kept = checkpoint.found(folder)
    assert [path.name for path in kept] == ["step_8", "step_4"][-len(kept) :]
    assert len(kept) == (1 if size_kb < 1000 else 2)
    for path in kept:
        checkpoint.load(path)
    assert not list((folder / "checkpoints").glob(".unfinished-*"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(folder.parent)], check=True)
    assert run(config, folder, resume=True).finished
    assert_same_run(folder, reference)


def test_a_disk_that_is_full_from_the_start(
    corpus: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(40)
    free = os.statvfs(disk)
    (disk / "other").write_bytes(bytes(free.f_bavail * free.f_frsize))
    with pytest.raises(ConfigError, match="No space left on device"):
        run(tiny(corpus), disk / "run")


def test_metrics_that_cannot_be_written(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills between two checkpoints: a clear error, and the checkpoint is whole."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_batch(monkeypatch, 6, lambda: monkeypatch.setattr(metrics.Metrics, "write", full))
    with pytest.raises(ConfigError, match="No space left on device"):
        run(tiny(corpus), tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "step_4").progress.step == 4


@pytest.fixture
def without_rights() -> Iterator[None]:
    """Root may write anywhere: for this test it is nobody."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)  # os.access asks for the real user, open for the effective one
    yield
    os.setresuid(0, 0, 0)


def open_to_all(path: Path) -> None:
    for each in (path, *path.parents):
        if each != Path(each.anchor) and each.stat().st_uid == os.geteuid():
            each.chmod(each.stat().st_mode | 0o055)
    for each in path.rglob("*"):
        each.chmod(each.stat().st_mode | 0o055)


def test_unwritable_folder(copy: Path, request: pytest.FixtureRequest) -> None:
    open_to_all(copy)
    before = contents(copy)
    root = copy / "checkpoints"
    root.chmod(0o555)
    request.getfixturevalue("without_rights")
    with pytest.raises(ConfigError, match=r"step_13: .*Permission denied.*make the folder writ"):
        save_again(copy)
    assert contents(copy) == before


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_unwritable_run_folder(
    corpus: Path, tmp_path: Path, request: pytest.FixtureRequest, mode: int
) -> None:
    """A folder above that may be read but not written, and one that may not even be entered."""
    config = tiny(corpus)
    prepare(config.data, progress=False)
    open_to_all(tmp_path)
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(mode)
    request.getfixturevalue("without_rights")
    with pytest.raises(ConfigError, match=r"closed/run: .*choose another --out"):
        run(config, closed / "run")


# What is in one


@pytest.mark.parametrize(("keep", "left"), [(0, 6), (1, 1), (2, 2), (5, 5), (9, 6)])
def test_the_newest_are_kept(corpus: Path, tmp_path: Path, keep: int, left: int) -> None:
    train_keys = {"save_every_steps": 2, "keep_checkpoints": keep, "eval_every_steps": 0}
    run(tiny(corpus, train=train_keys), tmp_path / "run")
    found = [path.name for path in checkpoint.found(tmp_path / "run")]
    assert found == [f"step_{step}" for step in (12, 10, 8, 6, 4, 2)][:left]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == left


def test_saved_only_at_the_end(corpus: Path, tmp_path: Path) -> None:
    run(tiny(corpus, train={"save_every_steps": 0}), tmp_path / "run")
    assert [path.name for path in checkpoint.found(tmp_path / "run")] == ["step_12"]


def test_files_of_a_checkpoint(reference: Path) -> None:
    folder = reference / "checkpoints" / "step_12"
    sums = json.loads((folder / CHECKSUMS).read_text())
    names = {WEIGHTS, STATE, DESCRIPTION, TOKENIZER, "tokenizer_config.json"}
    assert set(sums) == names
    assert {path.name for path in folder.iterdir()} == names | {CHECKSUMS, *hub.NAMES}
    for name, noted in sums.items():
        assert noted["bytes"] == (folder / name).stat().st_size
    description = json.loads((folder / DESCRIPTION).read_text())
    assert (description["step"], description["position"]) == (12, 12 * 8)
    assert description["tokens"] == 12 * 8 * 16
    manifest = json.loads((reference / "run.json").read_text())
    assert description["config"] == manifest["config"]
    assert description["extra"] == manifest["data"]["hashes"]


def test_state_is_plain_tensors(reference: Path) -> None:
    folder = reference / "checkpoints" / "step_12"
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    assert_same(checkpoint.load(folder).state(), state)
    moments = state["optimizer"]["state"]
    weights = checkpoint.load(folder).weights()
    assert len(moments) == len(weights)
    assert all(set(each) == {"step", "exp_avg", "exp_avg_sq"} for each in moments.values())
    assert sum(each["exp_avg"].numel() for each in moments.values()) == sum(
        weight.numel() for weight in weights.values()
    )


def test_full_rank_weights_have_the_names_of_llama(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, model={"linear": "full", "num_kv_heads": 1}, train={"steps": 1})
    run(config, tmp_path / "run")
    found = {name: tuple(weight.shape) for name, weight in weights_of(tmp_path / "run").items()}
    wanted = {
        "model.embed_tokens.weight": (300, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (300, 32),
    }
    for block in range(3):
        prefix = f"model.layers.{block}."
        wanted |= {
            prefix + "input_layernorm.weight": (32,),
            prefix + "post_attention_layernorm.weight": (32,),
            prefix + "self_attn.q_proj.weight": (32, 32),
            prefix + "self_attn.k_proj.weight": (16, 32),
            prefix + "self_attn.v_proj.weight": (16, 32),
            prefix + "self_attn.o_proj.weight": (32, 32),
            prefix + "mlp.gate_proj.weight": (48, 32),
            prefix + "mlp.up_proj.weight": (48, 32),
            prefix + "mlp.down_proj.weight": (32, 48),
        }
    assert found == wanted


@pytest.mark.parametrize("linear", ["crnet", "full", "lowrank"])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(corpus: Path, tmp_path: Path, linear: str, tied: bool) -> None:
    config = tiny(corpus, model={"linear": linear, "tie_embeddings": tied}, train={"steps": 4})
    with pytest.MonkeyPatch.context() as patch:
        built = []
        patch.setattr(start, "build", lambda *a: built.append(_build(*a)) or built[-1])
        result = run(config, tmp_path / "run")
    assert result.checkpoint is not None
    saved = checkpoint.load(result.checkpoint)
    assert ("lm_head.weight" in saved.weights()) is not tied
    model = load_model(saved)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert_same(dict(model.state_dict()), dict(built[0].state_dict()))
    found = {"model": {"vocab_size": 300}, "train": {"precision": "fp32"}}
    assert saved.config == override(config, **found)
    again = run(override(config, train={"steps": 6}), tmp_path / "run", resume=True)
    assert again.finished


_build = start.build


def test_weights_of_another_model_are_refused(copy: Path) -> None:
    """Every difference in one error: names, shapes, dtypes."""
    saved = checkpoint.load(copy / "checkpoints" / "step_12")
    weights = saved.weights()
    weights["model.layers.0.extra"] = weights.pop("model.norm.weight")
    weights["lm_head.weight"] = weights["lm_head.weight"].bfloat16()
    first = "model.layers.0.mlp.up_proj.weight"
    weights[first] = weights[first].T.contiguous()
    safetensors.torch.save_file(weights, saved.folder / WEIGHTS)
    with_new_sums(saved.folder, WEIGHTS)
    with pytest.raises(ConfigError) as caught:
        load_model(checkpoint.load(saved.folder))
    heading, *problems = caught.value.problems
    assert str(saved.folder / WEIGHTS) in heading
    assert sorted(problems) == [
        "lm_head.weight has dtype torch.bfloat16, not torch.float32",
        "model.layers.0.extra is unknown",
        f"{first} has shape (32, 48), not (48, 32)",
        "model.norm.weight is missing",
    ]


def test_loading_initialises_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crnet.model.build.initial_values", None)
    saved = checkpoint.load(copy / "checkpoints" / "step_12")
    assert_same(dict(load_model(saved).state_dict()), saved.weights())


def test_a_checkpoint_is_verified_once(
    corpus: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    plain = checkpoint.sha256
    monkeypatch.setattr(checkpoint, "sha256", lambda path: hashed.append(path.name) or plain(path))
    saved = checkpoint.resolve(copy)
    load_model(saved)
    load_tokenizer(saved)
    assert sorted(hashed) == sorted({*hashed})
    assert WEIGHTS in hashed
    assert STATE not in hashed, "the optimizer's state is not read, and would take most of the time"
    saved = checkpoint.newest(copy)
    assert saved is not None
    saved.state()
    assert hashed.count(STATE) == 1


def test_weights_are_readable_without_crnet(reference: Path) -> None:
    folder = reference / "checkpoints" / "step_12"
    plain = safetensors.torch.load_file(folder / WEIGHTS)
    assert_same(plain, checkpoint.load(folder).weights())
