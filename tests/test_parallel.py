"""Runs that two, four and eight processes share, over gloo on the CPU, against the same run of one.

The processes of a world size are started once (``parallel_runs.py``) and train everything in
``RUNS``; the tests read what was written. Against one process, figures agree to rounding: rows are
added in another order. Between processes, and before and after a resume, they agree to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from crnet.cli.app import main
from crnet.config.check import check
from crnet.config.sections import (
    SIZES,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    num_processes,
    num_shares,
)
from crnet.config.serialize import command_line, from_dict, override, read_json, to_dict
from crnet.errors import ConfigError
from crnet.inference.load import load_model
from crnet.kernels.compiled import compiler_problem
from crnet.storage import checkpoint, metrics
from crnet.storage.manifest import MANIFEST
from crnet.train import run as training
from test_checkpoint import assert_same

STEPS = 6
BASE = RunConfig(
    model=ModelConfig(hidden_size=32, intermediate_size=48, num_layers=3, num_heads=2, rank="8"),
    data=DataConfig(
        documents="paragraph",
        vocab_size=300,
        sequence_length=16,
        validation_tokens=600,
        rows="document",  # padded: no two processes have as many targets
    ),
    train=TrainConfig(
        steps=STEPS,
        batch_size=8,
        threads=1,
        device="cpu",
        log_every_steps=1,
        eval_every_steps=3,
        save_every_steps=3,
        keep_checkpoints=0,
    ),
)
WHAT: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "accumulated": {"train": {"micro_batch_size": 1}},
    "replay": {"train": {"recompute": "replay"}},
    "bf16-mixed": {"train": {"precision": "bf16-mixed"}},
    "full": {"model": {"linear": "full", "tie_embeddings": True}},
    "parts": {"parallel": {"checkpoint": "parts"}},
    "muon in parts": {"optimizer": {"name": "muon"}, "parallel": {"checkpoint": "parts"}},
    "attnres": {"model": {"linear": "lowrank", "stream": "attnres"}},
    "bf16": {"train": {"precision": "bf16"}},
    "muon": {"optimizer": {"name": "muon"}},
    "apollo": {"model": {"linear": "full"}, "optimizer": {"name": "apollo", "apollo": {"rank": 8}}},
    "apollo-mini": {"model": {"linear": "full"}, "optimizer": {"name": "apollo-mini"}},
    "galore": {
        "model": {"linear": "full"},
        "optimizer": {"name": "galore", "galore": {"rank": 8, "refresh_every": 4}},
    },
    "fira staggered": {
        "model": {"linear": "full"},
        "optimizer": {"name": "fira", "fira": {"rank": 8, "refresh_every": 5, "stagger": True}},
    },
    "resets": {
        "model": {"linear": "relora", "relora": {"merge_every": 2, "reset_every": 2}},
        "optimizer": {"name": "muon"},
    },
    "guided": {"model": {"linear": "self-guided"}, "train": {"micro_batch_size": 2}},
    "packed": {"train": {"keep_as": "nf4"}},
    "composed": {"optimizer": {"weight_decay": 5.0, "decay": "composed"}},
    "compiled": {"train": {"compile": True, "micro_batch_size": 2}},
}
"""What is trained, by what differs from ``BASE``."""
NO_COMPILER = compiler_problem(torch.device("cpu"))
LAYOUTS: dict[str, dict[str, int]] = {
    "data": {"data": 2},
    "shard": {"shard": 2},
    "pipeline": {"pipeline": 2},
    "tensor": {"tensor": 2},
    "data x shard": {"data": 2, "shard": 2},
    "data 4": {"data": 4},
    "data x shard x pipeline": {"data": 2, "shard": 2, "pipeline": 2},
    "data x shard x tensor": {"data": 2, "shard": 2, "tensor": 2},
}
"""How processes share a run."""
FAST = (
    ("data", "plain"),
    ("data", "accumulated"),
    ("shard", "plain"),
    ("shard", "accumulated"),
    ("shard", "muon"),
    ("pipeline", "accumulated"),
    ("tensor", "plain"),
)
"""Those of two processes that are not slow: one start serves them."""
NOT_SPLIT = ("bf16", "guided")
"""What ``--parallel.shard`` refuses."""
FEW = ("plain", "accumulated", "muon", "apollo")
RUN = [what for what in WHAT if what != "compiled" or NO_COMPILER is None]
SLOW = (
    *(("data", what) for what in RUN if "parts" not in what and ("data", what) not in FAST),
    *(("shard", what) for what in RUN if what not in NOT_SPLIT and ("shard", what) not in FAST),
    *(("data x shard", what) for what in FEW),
    *(("data 4", what) for what in FEW[:2]),
    ("data x shard x pipeline", "accumulated"),
    ("data x shard x tensor", "accumulated"),
)
CLOSE = {"bf16-mixed": 2e-3, "bf16": 5e-3, **dict.fromkeys(("muon", "muon in parts"), 2e-4)}
CLOSE |= {"resets": 2e-4, "packed": 2e-4}
"""Relative difference of a loss that counts as rounding, where it is not 2e-5: products in bf16
round by 2^-9, and which rows are added first decides some of them (torch's Muon orthogonalises in
bf16). Packed activations share scales of maxima with other rows."""

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes"),
    pytest.mark.timeout(900),  # one start, which the first test of it waits for, serves all
]


@dataclass(frozen=True)
class Run:
    name: str
    config: RunConfig
    into: str
    resume: bool = False

    def plain(self) -> dict[str, Any]:
        return {**vars(self), "config": to_dict(self.config)}


def configured(corpus: Path, what: str, **parallel: int) -> RunConfig:
    found = override(override(BASE, **WHAT[what]), data={"source": (str(corpus),)})
    return override(found, parallel=parallel)


def runs_of(cases: Iterable[tuple[str, str]], corpus: Path) -> dict[int, list[Run]]:
    """Runs by number of processes."""
    found: dict[int, list[Run]] = {}
    for layout, what in cases:
        name = f"{layout}, {what}"
        config = configured(corpus, what, **LAYOUTS[layout])
        runs = found.setdefault(num_processes(config.parallel), [])
        runs.append(Run(name, config, name))
    return found


def launch(size: int, folder: Path, runs: list[Run], program: str = "parallel_runs.py") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "runs.json").write_text(json.dumps([each.plain() for each in runs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(size), str(Path(__file__).with_name(program))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[:4000]


Folders = Callable[[str, str], tuple[Path, Path]]
"""(layout, what) -> the folder of the runs of its processes, that of the runs of one."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Folders:
    """Everything in FAST, or in SLOW, is run when the first of it is asked for."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def alone(what: str) -> Path:
        plain = {"parallel": {"checkpoint": "whole"}, "train": {"compile": False}}
        config = override(configured(corpus, what), **plain)
        training.run(config, root / "alone" / what, progress=False)
        return root / "alone" / what

    @functools.cache
    def shared(cases: tuple[tuple[str, str], ...]) -> None:
        for size, runs in runs_of(cases, corpus).items():
            launch(size, root / f"{size}-{len(cases)}", runs)

    def of(layout: str, what: str) -> tuple[Path, Path]:
        cases = FAST if (layout, what) in FAST else SLOW
        shared(cases)
        size = num_processes(ParallelConfig(**LAYOUTS[layout]))
        return root / f"{size}-{len(cases)}", alone(what)

    return of


def losses(folder: Path) -> list[float]:
    rows = metrics.read(folder / "metrics.jsonl")
    return [row.get("loss", row.get("val_loss")) for row in rows]


every_case = pytest.mark.parametrize(
    ("layout", "what"), [*FAST, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)


@every_case
def test_as_one_process(layout: str, what: str, folders: Folders) -> None:
    """The same losses of training and of evaluation, the same tokens, the same weights."""
    folder, theirs = folders(layout, what)
    ours = folder / f"{layout}, {what}"
    close = CLOSE.get(what, 2e-5)
    assert losses(ours) == pytest.approx(losses(theirs), rel=close)
    rows, wanted = (metrics.read(each / "metrics.jsonl") for each in (ours, theirs))
    for key in ("step", "tokens", "val_tokens", "val_bytes", "lr"):
        assert [row.get(key) for row in rows] == [row.get(key) for row in wanted], key
    right, their_right = ([row.get("val_accuracy", 0) for row in each] for each in (rows, wanted))
    # A token or two whose logit is as large as another's, to rounding.
    assert right == pytest.approx(their_right, abs=2e-2 if what in CLOSE else 5e-3)
    saved, other = checkpoint.newest(ours), checkpoint.newest(theirs)
    assert saved is not None
    assert other is not None
    assert saved.progress == other.progress
    found, weights = saved.weights(), other.weights()
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        # AdamW moves an item whose gradient is rounding alone by up to its rate, 1e-3, a step.
        atol = 3e-2 if what in CLOSE else 1e-3
        torch.testing.assert_close(found[name], weight, rtol=0, atol=atol, msg=name)
    state, their_state = saved.state()["optimizer"], other.state()["optimizer"]
    assert state["state"].keys() == their_state["state"].keys()


@every_case
def test_every_process_tells_the_same(layout: str, what: str, folders: Folders) -> None:
    folder, _ = folders(layout, what)
    size = num_processes(ParallelConfig(**LAYOUTS[layout]))
    seen = seen_by(size, folder, f"{layout}, {what}")
    scattered, moved = ([each.pop(key) for each in seen] for key in ("scattered", "moved"))
    if set(LAYOUTS[layout]) == {"data"}:  # added up where they cross, none beside
        assert moved == [0] * size
    assert seen == seen[:1] * size
    assert seen[0]["told"][0] == STEPS
    config = configured(Path(), what, **LAYOUTS[layout])
    if "pipeline" not in layout:  # test_pipeline.py counts those of a split stage
        micro_batches = config.train.batch_size // num_shares(config.parallel)
        micro_batches //= config.train.micro_batch_size or micro_batches
        # No whole gradient outlives its micro-batch.
        times = STEPS * micro_batches * (config.model.num_layers + 1)
        assert scattered == [times * (config.parallel.shard > 1)] * size


@pytest.mark.slow
@pytest.mark.parametrize(("whole", "apart"), [("plain", "parts"), ("muon", "muon in parts")])
def test_parts_are_consolidated(whole: str, apart: str, folders: Folders, tmp_path: Path) -> None:
    """To the bits of the checkpoint that the same processes gathered, the optimizer's state too;
    ``evaluate`` and ``generate`` read them."""
    wanted = checkpoint.newest(folders("shard", whole)[0] / f"shard, {whole}")
    source = folders("shard", apart)[0] / f"shard, {apart}"
    assert wanted is not None
    main_of(["consolidate", str(source), "--out", str(tmp_path / "new")])
    found = checkpoint.load(tmp_path / "new")
    assert not found.in_parts
    assert (found.progress, found.extra) == (wanted.progress, wanted.extra)
    assert_same(found.weights(), wanted.weights())
    states = [each.state() for each in (found, wanted)]
    for state in states:
        del state["torch_rng"]  # where its process stood: the runs draw nothing from it
    assert_same(*states)
    names = [sorted(path.name for path in each.folder.iterdir()) for each in (found, wanted)]
    assert names[0] == names[1]
    assert (found.folder / checkpoint.WEIGHTS).read_bytes() == (
        wanted.folder / checkpoint.WEIGHTS
    ).read_bytes()
    main_of(["evaluate", str(tmp_path / "new"), "--json"])
    main_of(["generate", str(tmp_path / "new"), "--max-tokens", "2"])


def main_of(words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0, words


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
def test_compiled_blocks_go_on(folders: Folders, tmp_path: Path) -> None:
    """From the middle, to the bits of the run that went through; every process compiles."""
    layouts = ("data", "shard")
    whole = {each: folders(each, "compiled")[0] / f"{each}, compiled" for each in layouts}
    for layout, folder in whole.items():
        copied = shutil.copytree(folder, tmp_path / layout)
        shutil.rmtree(copied / "checkpoints" / f"step_{STEPS}")
    manifests = {each: read_json(folder / MANIFEST) for each, folder in whole.items()}
    runs = [Run(f"on {each}", from_dict(manifests[each]["config"]), each, True) for each in whole]
    launch(2, tmp_path, runs)
    for layout, folder in whole.items():
        assert losses(tmp_path / layout) == losses(folder)
        found, wanted = (checkpoint.newest(each) for each in (tmp_path / layout, folder))
        assert found is not None
        assert wanted is not None
        for name, weight in wanted.weights().items():
            assert torch.equal(found.weights()[name], weight), name
        assert all(each["graphs"] > 1 for each in seen_by(2, tmp_path, f"on {layout}"))


@pytest.mark.slow
def test_goes_on_in_every_other_layout(corpus: Path, tmp_path: Path) -> None:
    """4 processes -> 2 that split -> 2 copies -> 1, three steps each; rows in the same order."""
    order: list[tuple[int, dict[str, Any]]] = [
        (4, {"data": 2, "shard": 2, "checkpoint": "parts"}),
        (2, {"shard": 2, "checkpoint": "parts"}),
        (2, {"data": 2}),
        (1, {}),
    ]
    folder = tmp_path / "runs"
    longer = {"steps": 12, "save_every_steps": 3, "eval_every_steps": 0}
    base = override(configured(corpus, "apollo"), train=longer)  # states in parts, and owned
    whole = tmp_path / "whole"
    training.run(base, whole, progress=False)
    for part, (size, sizes) in enumerate(order):
        config = override(base, parallel=sizes, train={"steps": 12})
        stop = 3 * (part + 1)
        for late in (folder / "run" / "checkpoints").glob("step_*") if part else ():
            if int(late.name[5:]) > stop - 3:  # as if it had been killed there
                subprocess.run(["rm", "-r", str(late)], check=True)
        if size == 1:
            training.run(config, folder / "run", resume=True, progress=False)
        else:
            others = [] if part != 1 else [elsewhere(folder, config)]
            launch(size, folder, [*others, Run(f"part {part}", config, "run", resume=bool(part))])
            seen = seen_by(size, folder, f"part {part}")
            # The first process verifies the checkpoint, and nobody else.
            assert [bool(each["verified"]) for each in seen] == [part > 0, *[False] * (size - 1)]
            for each in seen_by(size, folder, "elsewhere") if others else ():
                assert "process 1 has checkpoint step_3 'not there'" in each["refused"][0]
        saved = checkpoint.newest(folder / "run")
        assert saved is not None
        assert saved.in_parts == (sizes.get("checkpoint") == "parts")
        load_model(saved)  # by one process, whatever has written it
    assert losses(folder / "run") == pytest.approx(losses(whole), rel=2e-5)


def elsewhere(folder: Path, config: RunConfig) -> Run:
    """A run that goes on, and that the second process has no checkpoint of."""
    for rank in range(2):
        shutil.copytree(folder / "run", folder / f"elsewhere {rank}")
    shutil.rmtree(folder / "elsewhere 1" / "checkpoints" / "step_3")
    return Run("elsewhere", config, "elsewhere RANK", resume=True)


def seen_by(size: int, folder: Path, name: str) -> list[dict[str, Any]]:
    """What each process saw of a run."""
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"parallel": {"data": 3}}, "is not divided by the 3 processes"),
        ({"parallel": {"data": 2}, "train": {"micro_batch_size": 8}}, None),
        (
            {"parallel": {"data": 2}, "train": {"batch_size": 12, "micro_batch_size": 4}},
            "does not divide",
        ),
        ({"parallel": {"shard": 2}, "optimizer": {"name": "muon"}}, None),
        ({"parallel": {"shard": 2}, "train": {"precision": "bf16"}}, "bf16-mixed"),
        ({"parallel": {"data": 0}}, "must be above zero"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    sections: dict[str, dict[str, Any]], words: str | None
) -> None:
    config = override(BASE, **sections)
    if words is None:
        check(config)
    else:
        with pytest.raises(ConfigError, match=words):
            check(config)


def test_another_number_of_processes_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = configured(corpus, "plain", data=2)
    with pytest.raises(ConfigError, match=r"between 2 processes, and there is 1; start it with"):
        training.run(config, tmp_path / "run", progress=False)


with_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="finds a rank under /proc")


@pytest.mark.slow
def test_an_error_is_said_once(corpus: Path, tmp_path: Path) -> None:
    """That the first process finds, and that all find."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    words = words_of(configured(corpus, "plain", data=2), tmp_path / "run")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "a run is there already" in line


def words_of(config: RunConfig, out: Path, *more: str) -> list[str]:
    return ["-m", "crnet", *command_line(config), "--out", str(out), *more]


def kill_a_rank(started: subprocess.Popen[str], parent: int, out: Path) -> None:
    """kill -9 of rank 1, once a checkpoint is there."""
    while not list(out.glob("checkpoints/step_*")):
        assert started.poll() is None, started.stderr and started.stderr.read()
        time.sleep(0.05)
    listed = Path(f"/proc/{parent}/task").glob("*/children")
    children = [int(word) for each in listed for word in each.read_text().split()]
    ranks = {_variable(pid, "RANK"): pid for pid in children}
    os.kill(ranks["1"], signal.SIGKILL)


@with_proc
@pytest.mark.slow
def test_the_command_starts_its_processes_and_a_killed_one_is_named(
    corpus: Path, tmp_path: Path
) -> None:
    out, long = tmp_path / "run", {"steps": 4000, "save_every_steps": 20}
    config = override(configured(corpus, "plain", data=2), train=long)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words_of(config, out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as started:
        kill_a_rank(started, started.pid, out)
        began_s = time.monotonic()
        _, text = started.communicate(timeout=60)
    assert started.returncode == 1
    assert time.monotonic() - began_s < 60
    assert "rank 1 was ended by SIGKILL" in text
    assert "rank 1 of 2 is gone at step " in text
    assert "Traceback" not in text


def signalled(words: list[str], sign: signal.Signals, is_time: Callable[[], bool]) -> Any:
    """A program that gets a signal once it is time: its exit code, and what it said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *words], stderr=subprocess.PIPE, text=True, env=environment
    ) as started:
        while not is_time():
            assert started.poll() is None, started.stderr and started.stderr.read()
            time.sleep(0.02)
        started.send_signal(sign)
        _, text = started.communicate(timeout=120)
    return started.returncode, text


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_there_is_a_run_ends_as_one_process_does(
    sign: signal.Signals, corpus: Path, tmp_path: Path
) -> None:
    """While the corpus is prepared nothing can be saved: no exit code 0, and no folder of a run;
    the cache has what it had."""
    large = tmp_path / "large.txt"
    large.write_text("\n\n".join(f"{corpus.read_text()} {idx}" for idx in range(300)))
    found = {}
    for count in (1, 2):
        cache, out = tmp_path / f"cache {count}", tmp_path / f"run {count}"
        data = {"source": (str(large),), "cache_dir": cache}
        config = override(configured(corpus, "plain", data=count), data=data)
        code, text = signalled(
            words_of(config, out), sign, lambda cache=cache: any(cache.glob(".unfinished-*"))
        )
        assert "Traceback" not in text
        assert not out.exists()
        assert [each for each in cache.iterdir() if not each.name.startswith(".")] == []
        found[count] = code
    assert found[1] == found[2] != 0


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_job_saves_and_ends(
    sign: signal.Signals, corpus: Path, tmp_path: Path
) -> None:
    out, long = tmp_path / "run", {"steps": 40000, "eval_every_steps": 0, "save_every_steps": 0}
    config = override(configured(corpus, "plain", data=2), train=long)
    path = out / "metrics.jsonl"
    code, text = signalled(
        words_of(config, out), sign, lambda: path.exists() and path.read_text().count("\n") > 4
    )
    assert code == 0, text
    saved = checkpoint.newest(out)
    assert saved is not None
    assert saved.progress.step == metrics.read(path)[-1]["step"]


@with_proc
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_torchrun_starts_again_and_loses_nothing(kind: str, corpus: Path, tmp_path: Path) -> None:
    """kill -9 of a rank: all go on from the last whole checkpoint, and end with the same bits as a
    run that nobody disturbed."""
    how = {"steps": 60, "save_every_steps": 10, "eval_every_steps": 0}
    config = override(configured(corpus, "plain", shard=2, checkpoint=kind), train=how)
    found = {}
    for name in ("undisturbed", "killed"):
        out = tmp_path / name
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "--max-restarts", "1"]
        command += words_of(config, out, "--resume", "auto")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment
        ) as started:
            if name == "killed":
                kill_a_rank(started, started.pid, out)
            _, text = started.communicate(timeout=240)
        assert started.returncode == 0, text[-3000:]
        found[name] = checkpoint.newest(out)
    assert read_json(tmp_path / "killed" / "run.json")["from_step"] >= 10
    killed, undisturbed = found["killed"], found["undisturbed"]
    assert killed.progress == undisturbed.progress
    for name, weight in undisturbed.weights().items():
        assert torch.equal(killed.weights()[name], weight), name


def _variable(pid: int, name: str) -> str | None:
    content = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    found = dict(each.partition(b"=")[::2] for each in content if each)
    value = found.get(name.encode())
    return value.decode() if value is not None else None


def test_sizes_are_declared_once() -> None:
    """Every number of ``parallel`` counts processes, and is a dimension of the mesh."""
    names = [each.name for each in dataclasses.fields(ParallelConfig)]
    numbers = [name for name in names if isinstance(getattr(ParallelConfig, name), int)]
    assert numbers == list(SIZES)
