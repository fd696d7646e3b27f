"""Runs whose blocks are spread over two and four processes, over gloo on the CPU, against one.

The processes of a world size are started once (``pipeline_runs.py``) and train everything in
``RUNS``; the tests read what was written. Within a pipeline every row is computed as by one
process, and micro-batches are added in the same order: figures agree to the rounding of the sums
of a gradient norm, which has another order.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from crnet.config import presets
from crnet.config.check import check
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig, num_shares, num_stages
from crnet.config.serialize import override
from crnet.cost.hardware import communication_bytes
from crnet.cost.shared import bytes_of_rank
from crnet.cost.stage_memory import process_bytes
from crnet.cost.stages import block_flops, boundary_bytes, cut, held, in_flight
from crnet.cost.workload import Workload, workload
from crnet.errors import ConfigError
from crnet.storage import checkpoint, metrics
from crnet.train import run as training
from test_parallel import BASE, Run, launch, losses

STEPS = 3
PIPE = override(
    BASE,
    model={"num_layers": 4},
    train={"steps": STEPS, "micro_batch_size": 2, "eval_every_steps": 0, "save_every_steps": 0},
)
WHAT: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "replay": {"train": {"recompute": "replay", "recompute_layers": "1,3"}},
    "block": {"train": {"recompute": "block", "precision": "bf16-mixed"}},
    "restart": {"model": {"crnet": {"restarts": "3"}}},
    "full": {"model": {"linear": "full"}},
    "lowrank": {"model": {"linear": "lowrank"}},
    "resformer": {"model": {"linear": "resformer"}},
    "lax": {"model": {"linear": "lax"}},
    "attnres": {"model": {"linear": "lowrank", "stream": "attnres"}},
    "denseformer": {"model": {"linear": "lowrank", "stream": "denseformer"}},
    "apollo": {"optimizer": {"name": "apollo"}},
    "muon": {"optimizer": {"name": "muon"}},
}
"""What is trained, by what differs from ``PIPE``."""
SPLIT = ("plain", "replay", "block", "full", "attnres", "muon")
FEW = ("plain", "apollo")
"""What is trained where the processes of a stage split it."""
INTERLEAVED = {"pipeline": 2, "schedule": "interleaved"}
RUNS: dict[str, tuple[int, dict[str, Any], str]] = {
    **{f"1f1b, {what}": (2, {"pipeline": 2}, what) for what in WHAT if what != "muon"},
    **{f"interleaved, {what}": (2, INTERLEAVED, what) for what in ("plain", "replay", "attnres")},
    "4 stages": (4, {"pipeline": 4}, "resformer"),
    "data x pipeline": (4, {"pipeline": 2, "data": 2}, "plain"),
    "data x interleaved": (4, {**INTERLEAVED, "data": 2}, "plain"),
    **{f"shard x pipeline, {what}": (4, {"pipeline": 2, "shard": 2}, what) for what in SPLIT},
    **{f"shard x interleaved, {what}": (4, {**INTERLEAVED, "shard": 2}, what) for what in FEW},
}
"""By name: processes, how they share the run, what is trained."""
FAULTS = ("fault: order", "fault: scale", "fault: norm")
CLOSE = {"block": 2e-3, "muon": 2e-4}
"""Relative difference of a loss that counts as rounding, where it is not 2e-5: bf16-mixed, and
torch's Muon, which orthogonalises in bf16."""

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes"),
]


def configured(corpus: Path, what: str, **parallel: Any) -> RunConfig:
    found = override(PIPE, data={"source": (str(corpus),)}, parallel=parallel)
    return override(found, **WHAT[what])


def of_size(size: int, corpus: Path) -> list[Run]:
    found = [
        Run(name, configured(corpus, what, **parallel), name)
        for name, (processes, parallel, what) in RUNS.items()
        if processes == size
    ]
    if size == 2:
        found += [Run(name, configured(corpus, "plain", pipeline=2), name) for name in FAULTS]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Every run, by one process."""
    folder = tmp_path_factory.mktemp("alone")
    with mock.patch.object(training, "loss_picture"):
        for what in WHAT:
            training.run(configured(corpus, what), folder / what, progress=False)
        training.run(longer(corpus), folder / "longer", progress=False)
    return folder


def longer(corpus: Path, **parallel: Any) -> RunConfig:
    """A run that goes on twice."""
    return override(
        configured(corpus, "plain", **parallel), train={"steps": 6, "save_every_steps": 2}
    )


def as_if_killed(run_dir: Path, step: int) -> None:
    """Leave no checkpoint after a step."""
    for late in (run_dir / "checkpoints").glob("step_*"):
        if int(late.name[5:]) > step:
            shutil.rmtree(late)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Every run, by two and by four processes; one goes on from two to one to four."""
    folder = tmp_path_factory.mktemp("shared")
    program = "pipeline_runs.py"
    begun = Run("longer", longer(corpus, pipeline=2), "longer")
    launch(2, folder, [*of_size(2, corpus), begun], program)
    as_if_killed(folder / "longer", 2)
    training.run(longer(corpus), folder / "longer", resume=True, progress=False)
    as_if_killed(folder / "longer", 4)
    goes_on = []
    for key in ("data", "shard"):
        shutil.copytree(folder / "longer", folder / f"longer, {key}")
        config = longer(corpus, **{"pipeline": 2, key: 2})
        goes_on.append(Run(f"longer on 4, {key}", config, f"longer, {key}", resume=True))
    launch(4, folder, [*of_size(4, corpus), *goes_on], program)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_as_one_process(name: str, shared: Path, alone: Path) -> None:
    """The same losses, gradient norms and evaluations, the same tokens, the same weights and
    optimizer state, in the same file."""
    what = RUNS[name][2]
    ours, theirs = shared / name, alone / what
    close = CLOSE.get(what, 2e-5)
    assert losses(ours) == pytest.approx(losses(theirs), rel=close)
    rows, wanted = (metrics.read(each / "metrics.jsonl") for each in (ours, theirs))
    for key in ("step", "tokens", "val_tokens", "val_bytes", "lr"):
        assert [row.get(key) for row in rows] == [row.get(key) for row in wanted], key
    right, their_right = ([row.get("val_accuracy", 0) for row in each] for each in (rows, wanted))
    # A token or two whose logit is as large as another's, to rounding.
    assert right == pytest.approx(their_right, abs=2e-2 if what in CLOSE else 5e-3)
    norms, their_norms = ([row.get("grad_norm", 1) for row in each] for each in (rows, wanted))
    assert norms == pytest.approx(their_norms, rel=max(close, 1e-4))
    saved, other = checkpoint.newest(ours), checkpoint.newest(theirs)
    assert saved is not None
    assert other is not None
    assert saved.progress == other.progress
    found, weights = saved.weights(), other.weights()
    assert list(found) == list(weights)
    for key, weight in weights.items():
        # AdamW moves an item whose gradient is rounding alone by up to its rate, 1e-3, a step.
        torch.testing.assert_close(found[key], weight, rtol=0, atol=3e-2 if what in CLOSE else 1e-3)
    state, their_state = saved.state()["optimizer"], other.state()["optimizer"]
    names, their_names = (_by_name(each) for each in (state, their_state))
    assert names.keys() == their_names.keys()
    for key, moments in their_names.items():
        assert names[key].keys() == moments.keys(), key


def _by_name(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: state["state"].get(index, {})
        for group in state["param_groups"]
        for name, index in zip(group["names"], group["params"], strict=True)
    }


def seen(shared: Path, name: str) -> list[dict[str, Any]]:
    """What each process saw of a run."""
    return [
        json.loads((shared / f"{name}.{rank}.json").read_text()) for rank in range(RUNS[name][0])
    ]


@pytest.mark.parametrize("name", RUNS)
def test_every_process_tells_the_same(name: str, shared: Path) -> None:
    told = [each["told"] for each in seen(shared, name)]
    assert told == told[:1] * len(told)
    assert told[0][0] == STEPS


def test_goes_on_from_two_processes_to_one_to_four(shared: Path, alone: Path) -> None:
    for key in ("data", "shard"):
        assert losses(shared / f"longer, {key}") == pytest.approx(
            losses(alone / "longer"), rel=2e-5
        )


@pytest.mark.parametrize("name", FAULTS)
def test_a_mistake_is_noticed(name: str, shared: Path, alone: Path) -> None:
    """Carries in the wrong order, gradients divided once more, or clipped by a process's own norm:
    losses or norms are others."""
    found, right = (
        [
            row[key]
            for row in metrics.read(folder / "metrics.jsonl")
            for key in ("loss", "grad_norm")
            if key in row
        ]
        for folder in (shared / name, alone / "plain")
    )
    assert found != pytest.approx(right, rel=1e-3)


def work_of(name: str, corpus: Path) -> tuple[RunConfig, Workload]:
    _, parallel, what = RUNS[name]
    config = configured(corpus, what, **parallel)
    return config, workload(training.work_of_one(config, torch.device("cpu")))


@pytest.mark.parametrize("name", RUNS)
def test_each_process_holds_its_own_stages(name: str, shared: Path, corpus: Path) -> None:
    """Bytes of weights and gradients are those that the cost model says; together the model's."""
    config, work = work_of(name, corpus)
    wanted = process_bytes(work, dataclasses.replace(config.parallel, shard=1))
    copies = num_shares(config.parallel)
    found = seen(shared, name)
    for rank, each in enumerate(found):
        assert each["held"] == wanted[rank // copies]["weights"]
        assert each["trained"] == wanted[rank // copies]["gradients"]
    assert sum(each["held"] for each in found) == copies * work.state_bytes["weights"]


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("shard")])
def test_a_stage_is_split(name: str, shared: Path, corpus: Path) -> None:
    """Between two steps each process has the bytes of its part of its stages, and no more; their
    gradients cross once a step, whatever the number of micro-batches."""
    config, work = work_of(name, corpus)
    stages = cut(work.spec, num_stages(config.parallel), work.micro_batch.length)
    pipeline, shard = config.parallel.pipeline, config.parallel.shard
    for rank, each in enumerate(seen(shared, name)):
        mine = stages[rank // shard :: pipeline]
        tensors = {key: work.spec.tensors[key] for key in held(work.spec, mine)}
        part = bytes_of_rank(tensors, config.optimizer, config.parallel, rank)
        assert each["part"] == part.held["weights"]
        blocks = sum(stage.top - stage.bottom for stage in mine)
        around = sum(stage.is_first or stage.is_last for stage in mine)
        assert each["scattered"] == STEPS * (blocks + around)
    assert work.num_micro_batches > 1


@pytest.mark.parametrize("name", RUNS)
def test_micro_batches_in_flight_are_as_counted(name: str, shared: Path, corpus: Path) -> None:
    config, work = work_of(name, corpus)
    stages = cut(work.spec, num_stages(config.parallel), work.micro_batch.length)
    for rank, each in enumerate(seen(shared, name)):
        process = rank // num_shares(config.parallel)
        assert {int(idx): count for idx, count in each["waiting"].items()} == {
            stage.idx: in_flight(stage, config.parallel.pipeline, work.num_micro_batches)
            for stage in stages[process :: config.parallel.pipeline]
        }


@pytest.mark.parametrize("name", RUNS)
def test_what_crosses_a_boundary_is_as_counted(name: str, shared: Path, corpus: Path) -> None:
    """Each boundary, every step, both ways, to the byte; of equal boundaries the cost table's."""
    config, work = work_of(name, corpus)
    stages = cut(work.spec, num_stages(config.parallel), work.micro_batch.length)
    sent: dict[str, int] = {}
    for rank, each in enumerate(seen(shared, name)):
        if rank % num_shares(config.parallel) == 0:
            sent |= each["sent"]
    passes = STEPS * work.num_micro_batches
    both = []
    for below, above in itertools.pairwise(stages):
        size = boundary_bytes(work.micro_batch, above.bottom)
        assert sent[f"up {below.idx}"] == sent[f"down {above.idx}"] == passes * size
        both.append(2 * work.num_micro_batches * size)
    table = communication_bytes(work, len(stages))
    assert table["pipeline, a boundary"] == max(both)
    assert table["pipeline, all boundaries"] == sum(both)


def test_a_boundary_of_the_paper_is_as_wide_as_it_says() -> None:
    """CR-Net: 6 h + 2 f; from a restart, and of every model without carries: h. Eq. 48 with table
    22's setting: 21.25 GiB for 13B (printed: 22.5), f = 8/3 h."""
    h, f = 5120, 13653
    shape = {"hidden_size": h, "intermediate_size": f, "num_layers": 40, "num_heads": 40}
    config = override(
        presets.get("llama-60m"),
        model={**shape, "rank": "0.25h"},
        data={"sequence_length": 4096},
        train={"batch_size": 16, "precision": "bf16", "recompute": "invert"},
    )
    found = communication_bytes(workload(config), 2)["pipeline, a boundary"]
    assert found == 3 * 2 * 16 * 4096 * (6 * h + 2 * f)
    assert found / 2**30 == pytest.approx(21.25, abs=1e-3)
    for model in ({"crnet": {"restarts": "21"}}, {"linear": "full"}):
        other = override(config, model=model, train={"recompute": "replay"})
        assert communication_bytes(workload(other), 2)["pipeline, a boundary"] == found / 3 * 2 * (
            h / (6 * h + 2 * f)
        )


# --- cutting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", ["crnet", "full"])
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_stages_are_balanced(linear: str, number: int) -> None:
    """No other cut has a smaller largest stage, nor with the same one a smaller sum of squares."""
    spec = model_spec(
        override(PIPE, model={"num_layers": 7, "linear": linear, "vocab_size": 64}).model
    )
    costs = block_flops(spec, 16)

    def sizes(bounds: tuple[int, ...]) -> tuple[int, int]:
        sums = [sum(costs[low:high]) for low, high in itertools.pairwise((0, *bounds, 7))]
        return max(sums), sum(each * each for each in sums)

    stages = cut(spec, number, 16)
    assert stages[0].bottom == 0
    assert stages[-1].top == 7
    assert all(below.top == above.bottom for below, above in itertools.pairwise(stages))
    found = tuple(stage.bottom for stage in stages[1:])
    assert sizes(found) == min(map(sizes, itertools.combinations(range(1, 7), number - 1)))


def test_stages_begin_where_blocks_read_nothing() -> None:
    model = {"num_layers": 7, "vocab_size": 64, "crnet": {"restarts": "3,6"}}
    spec = model_spec(override(PIPE, model=model).model)
    assert [stage.bottom for stage in cut(spec, 3, 16)] == [0, 2, 5]
    assert cut(spec, 2, 16)[1].bottom in (2, 5)
    assert len(cut(spec, 4, 16)) == 4  # more stages than restarts: anywhere


def test_every_tensor_is_in_one_stage() -> None:
    for architecture in ("llama", "mla", "gpt2"):
        model = {"architecture": architecture, "vocab_size": 64, "tie_embeddings": False}
        spec = model_spec(override(PIPE, model=model).model)
        names = [name for each in cut(spec, 3, 16) for name in held(spec, [each])]
        assert sorted(names) == sorted(spec.tensors)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({}, None),
        ({"parallel": {"pipeline": 8}}, "cuts the model into 8 stages, and it has 4 blocks"),
        ({"parallel": {"pipeline": 1, "schedule": "interleaved"}}, "has no effect without"),
        ({"train": {"micro_batch_size": 8}}, "wants 2 or more micro-batches.*micro-batch-size 4"),
        (
            {"parallel": {"schedule": "interleaved"}, "train": {"batch_size": 6}},
            "a multiple of 2 micro-batches.*micro-batch-size 3",
        ),
        ({"train": {"batch_size": 1, "micro_batch_size": 1}}, "batch-size that is a multiple of 2"),
        ({"train": {"micro_batch_size": 3}}, "is not divided by"),
        ({"model": {"tie_embeddings": True}}, "say --model.tie-embeddings false"),
        ({"parallel": {"checkpoint": "parts"}}, "say --parallel.checkpoint whole"),
        ({"train": {"recompute": "invert"}}, "say replay, block or none"),
        ({"train": {"compile": True}}, "--train.compile is not supported"),
        ({"model": {"crnet": {"restarts": "5"}}}, "block 5 is not one of 2 to 4"),
        ({"model": {"crnet": {"restarts": "1,3"}}}, "block 1 is not one of 2 to 4"),
        ({"model": {"crnet": {"restarts": "x"}}}, "cannot be read; write 9"),
        ({"model": {"linear": "resformer", "resformer": {"restarts": "3"}}}, "reads the first"),
    ],
)
def test_what_makes_no_pipeline_is_refused(
    sections: dict[str, dict[str, Any]], words: str | None
) -> None:
    config = override(override(PIPE, parallel={"pipeline": 2}), **sections)
    if words is None:
        check(config)
    else:
        with pytest.raises(ConfigError, match=words):
            check(config)
