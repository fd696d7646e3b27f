"""Runs whose blocks several processes compute in parts (``--parallel.tensor``), over gloo.

Two processes are started once (``tensor_runs.py``) and train everything in ``WHAT``, four once for
copies of that. Against one process figures agree to rounding: sums are added in another order.
Bytes on the wire are counted in the processes and equal the closed form exactly.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from math import ceil, floor
from pathlib import Path
from typing import Any

import pytest
import torch

import test_parallel as parallel_tests
from crnet.config import presets
from crnet.config.check import check
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.cost.hardware import communication_bytes, tensor_bytes
from crnet.cost.workload import workload
from crnet.errors import ConfigError
from crnet.model.tensor_parallel import part, stored
from crnet.storage import checkpoint, metrics
from crnet.train import run as training
from test_parallel import Run, losses

STEPS = 4
BASE = override(
    parallel_tests.BASE,
    data={"validation_tokens": 400},
    train={"steps": STEPS, "batch_size": 4, "eval_every_steps": 0, "save_every_steps": 0},
)
WHAT: dict[str, dict[str, dict[str, Any]]] = {
    "crnet": {"train": {"save_every_steps": 1}},
    "lowrank": {"model": {"linear": "lowrank"}},
    "full": {"model": {"linear": "full", "tie_embeddings": True}},
    "cola": {"model": {"linear": "cola"}},
    "crnet, wide gains": {
        "model": {"crnet": {"gain": "channel", "norm": "gain", "gain_warmup_steps": 2}},
        "train": {"recompute": "replay"},
    },
    "crnet, gains of heads": {
        "model": {"crnet": {"gain": "head", "carries": "q,v,o,up"}, "intermediate_size": 49}
    },
    "resformer": {"model": {"linear": "resformer"}},
    "value-resformer": {"model": {"linear": "value-resformer"}},
    "lora": {"model": {"linear": "lora"}},
    "lora, odd": {"model": {"linear": "lora", "intermediate_size": 49}},
    "shared": {"model": {"linear": "shared"}},
    "lax": {"model": {"linear": "lax"}},
    "lax, norm": {"model": {"linear": "lax", "lax": {"gate": "norm"}}},
    "shared, odd": {"model": {"linear": "shared", "intermediate_size": 49}},
    "lora, block": {"model": {"linear": "lora"}, "train": {"recompute": "block"}},
    "lora, replay": {
        "model": {"linear": "lora"},
        "train": {"recompute": "replay", "micro_batch_size": 2},
    },
    "grouped": {"model": {"num_heads": 4, "num_kv_heads": 2}},
    "odd width": {"model": {"intermediate_size": 49}},
    "gpt2": {"model": {"architecture": "gpt2"}},
    "normed heads": {
        "model": {"head_size": 6, "llama": {"qk_norm": True, "window": 5}},
        "train": {"recompute": "replay"},
    },
    "attnres": {"model": {"stream": "attnres"}},
    "accumulated": {"train": {"micro_batch_size": 1}},
    "bf16-mixed": {"train": {"precision": "bf16-mixed"}},
    "block": {"train": {"recompute": "block"}},
    "block full": {"model": {"linear": "full"}, "train": {"recompute": "block"}},
    "replay": {"train": {"recompute": "replay"}},
    "replay full": {"model": {"linear": "full"}, "train": {"recompute": "replay"}},
    "invert": {"train": {"recompute": "invert"}},
}
"""What is trained, by what differs from ``BASE``."""
SPLIT = (
    "crnet",
    "full",
    "lora",
    "odd width",
    "accumulated",
    "bf16-mixed",
    "block",
    "replay",
    "invert",
)
"""What is trained where processes split each part once more."""
CLOSE = {"bf16-mixed": 2e-3}
"""Relative difference of a loss that counts as rounding, where it is not 2e-5: products in bf16
round by 2^-9, and a sum over two processes rounds its summands."""

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes"),
]


def configured(corpus: Path, what: str, **parallel: int) -> RunConfig:
    found = override(BASE, data={"source": (str(corpus),)}, parallel=parallel)
    return override(found, **WHAT[what])


def launch(size: int, folder: Path, runs: dict[str, RunConfig]) -> None:
    """Train each run into the folder of its name; it goes on where there is one."""
    listed = [Run(name, it, name, (folder / name).exists()) for name, it in runs.items()]
    parallel_tests.launch(size, folder, listed, "tensor_runs.py")


def copy_until(source: Path, step: int, into: Path) -> None:
    """A run as if it had been killed after a step."""
    shutil.copytree(source, into)
    for late in (into / "checkpoints").glob("step_*"):
        if int(late.name[5:]) > step:
            shutil.rmtree(late)


@pytest.fixture(scope="module")
def asked(request: pytest.FixtureRequest) -> list[str]:
    """Runs that the chosen tests look at: one test alone does not wait for all of them."""
    ours = [each for each in request.session.items if each.path == Path(__file__)]
    params = [getattr(each, "callspec", None) for each in ours]
    named = {each.params.get("what") for each in params if each is not None}
    return list(WHAT) if None in params else [each for each in WHAT if each in named | {"crnet"}]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path, asked: list[str]) -> Path:
    """Every run, by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for what in asked:
        training.run(configured(corpus, what), folder / what, progress=False)
    return folder


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, alone: Path, asked: list[str]
) -> Path:
    """Every run, by two processes; ``went on`` was begun by one."""
    folder = tmp_path_factory.mktemp("shared")
    runs = {what: configured(corpus, what, tensor=2) for what in asked}
    copy_until(alone / "crnet", 1, folder / "went on")
    launch(2, folder, runs | {"went on": runs["crnet"]})
    return folder


@pytest.fixture(scope="module")
def copies(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, shared: Path, alone: Path
) -> Path:
    """By four processes; ``went on`` was begun by one, then two, then one, a step each."""
    folder = tmp_path_factory.mktemp("copies")
    config = configured(corpus, "crnet", data=2, tensor=2)
    copy_until(shared / "went on", 2, folder / "by one")
    training.run(configured(corpus, "crnet"), folder / "by one", resume=True, progress=False)
    copy_until(folder / "by one", 3, folder / "went on")
    accumulated = configured(corpus, "accumulated", data=2, tensor=2)
    copy_until(alone / "crnet", 1, folder / "split went on")
    split = {f"split, {what}": configured(corpus, what, shard=2, tensor=2) for what in SPLIT}
    went_on = {"went on": config, "split went on": split["split, crnet"]}
    launch(4, folder, {"accumulated": accumulated, **went_on, **split})
    return folder


def norms(folder: Path) -> list[float]:
    return [
        row["grad_norm"] for row in metrics.read(folder / "metrics.jsonl") if "grad_norm" in row
    ]


def assert_same_run(ours: Path, theirs: Path, what: str) -> None:
    """Losses of training and evaluation, norms, weights and optimizer states, whole."""
    close = CLOSE.get(what, 2e-5)
    assert losses(ours) == pytest.approx(losses(theirs), rel=close)
    assert norms(ours) == pytest.approx(norms(theirs), rel=10 * close)
    saved, other = checkpoint.newest(ours), checkpoint.newest(theirs)
    assert saved is not None
    assert other is not None
    found, weights = saved.weights(), other.weights()
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        # AdamW moves an item whose gradient is rounding alone by up to its rate, 1e-3, a step.
        atol = 3e-2 if what in CLOSE else 1e-3
        torch.testing.assert_close(found[name], weight, rtol=0, atol=atol, msg=name)
    states = [each.state()["optimizer"]["state"] for each in (saved, other)]
    assert states[0].keys() == states[1].keys()
    for idx, state in states[0].items():
        for key, value in state.items():
            wanted = states[1][idx][key]
            assert value.shape == wanted.shape
            scale = max(wanted.abs().max().item(), 1e-6)
            assert (value - wanted).abs().max().item() < scale * (0.2 if what in CLOSE else 1e-2)


@pytest.mark.parametrize("what", WHAT)
def test_as_one_process(what: str, shared: Path, alone: Path) -> None:
    assert_same_run(shared / what, alone / what, what)


@pytest.mark.parametrize("what", WHAT)
def test_every_process_tells_the_same(what: str, shared: Path) -> None:
    """Losses, sums, and the weights that each of them has whole, to the bit."""
    seen = [json.loads((shared / f"{what}.{rank}.json").read_text()) for rank in range(2)]
    assert seen[0] == seen[1]
    assert seen[0]["told"][0] == STEPS


@pytest.mark.parametrize("what", ["accumulated"])
def test_copies_of_it(what: str, copies: Path, alone: Path) -> None:
    assert_same_run(copies / what, alone / what, what)


def test_goes_on_with_other_numbers_of_processes(copies: Path, shared: Path, alone: Path) -> None:
    """1 -> 2 -> 1 -> 2 x 2, a step each: whole tensors, of the optimizer's state too. 1 -> 2 x 2,
    the parts split."""
    for folder in (shared, copies):
        assert_same_run(folder / "went on", alone / "crnet", "crnet")
    assert_same_run(copies / "split went on", alone / "crnet", "crnet")


@pytest.mark.parametrize("what", SPLIT)
def test_parts_are_split_once_more(what: str, copies: Path, alone: Path, corpus: Path) -> None:
    """``tensor`` x ``shard``: the run of one process; between those that have parts of a map, the
    sums of the closed form; two that split a part have it once."""
    assert_same_run(copies / f"split, {what}", alone / what, what)
    seen = [json.loads((copies / f"split, {what}.{rank}.json").read_text()) for rank in range(4)]
    config = configured(corpus, what, shard=2, tensor=2)
    work = workload(training.work_of_one(config, torch.device("cpu")))
    summed = tensor_bytes(work)
    for rank in seen:
        # What is summed once a step lies split: half of it, and of a gain's one item all or none.
        once = [work.spec.tensors[name].num_items for name in work.spec.in_parts(0, 2).summed]
        least, most = (sum(4 * size(items / 2) for items in once) for size in (floor, ceil))
        others = summed - 4 * sum(once)
        assert others + least <= sum(rank["sums"]) <= others + most
        assert rank["told"] == seen[0]["told"]
        assert rank["whole weights"] == seen[0]["whole weights"]
    held = [rank["held"] for rank in seen]
    spec = work.spec.in_parts(0, 2)
    assert sum(held) == 2 * 4 * sum(math.prod(each) for each in spec.stored_shapes.values())


def sums(shared: Path, what: str) -> list[int]:
    """Bytes of each sum between the two processes in one step."""
    return json.loads((shared / f"{what}.0.json").read_text())["sums"]


@pytest.mark.parametrize("what", WHAT)
def test_bytes_on_the_wire_are_the_closed_form(what: str, shared: Path, corpus: Path) -> None:
    """Exact: every sum of a step, gains and norm among them."""
    work = workload(training.work_of_one(configured(corpus, what), torch.device("cpu")))
    assert sum(sums(shared, what)) == tensor_bytes(work)


def test_recomputation_sums_no_more_than_it_needs(shared: Path) -> None:
    """replay and invert: what was summed is known. block: what runs again and is read inside."""
    assert sums(shared, "replay") == sums(shared, "invert") == sums(shared, "crnet")
    assert sums(shared, "replay full") == sums(shared, "full")
    # o and down of two low-rank blocks, o alone of the first one; o alone at full rank.
    assert len(sums(shared, "block")) == len(sums(shared, "crnet")) + 5
    assert len(sums(shared, "block full")) == len(sums(shared, "full")) + 3


def test_bytes_beside_full_rank() -> None:
    """llama-1b at the paper's ranks: 7 r a block instead of 4 h, and one block that stays so."""
    config = override(presets.get("llama-1b"), model={"linear": "full"})
    found = {}
    for linear, rank in (("full", "448"), ("crnet", "448"), ("lowrank", "512")):
        work = workload(override(config, model={"linear": linear, "rank": rank}))
        found[linear] = communication_bytes(work, 8)["tensor"]
        tokens = work.num_micro_batches * work.micro_batch.rows * work.micro_batch.compute_bytes
        widths = {
            "full": 24 * 4 * 2048,
            "crnet": 23 * 7 * 448 + 4 * 2048,
            "lowrank": 24 * 7 * 512,
        }[linear]
        gains = 23 * 5 if linear == "crnet" else 0
        assert found[linear] == 2 * 7 / 8 * (tokens * widths + 4 * (gains + 1))
    assert found["crnet"] / found["full"] == pytest.approx(0.409, abs=1e-3)
    assert found["lowrank"] / found["full"] == pytest.approx(0.4375, abs=1e-4)


def test_parts_make_the_whole() -> None:
    """Heads stay together: chunks of columns before them, of rows behind; bit for bit."""
    model = dataclasses.replace(override(BASE, **WHAT["grouped"]).model, vocab_size=31)
    spec = model_spec(model)
    parts = [spec.in_parts(idx, 2) for idx in range(2)]
    dims = {name.partition("layers.1.")[2]: dim for name, dim in parts[0].split_dims.items()}
    dims.pop("", None)
    assert dims == {
        **dict.fromkeys([f"self_attn.{name}_proj.B" for name in "qkv"], 1),
        **dict.fromkeys([f"mlp.{name}_proj.B" for name in ("gate", "up")], 1),
        "self_attn.o_proj.A": 0,
        "mlp.down_proj.A": 0,
    }
    for name, tensor in spec.tensors.items():
        whole = torch.randn(tensor.shape)
        found = [stored(whole, name, each) for each in parts]
        assert [tuple(each.shape) for each in found] == [parts[0].stored_shapes[name]] * 2
        dim = parts[0].split_dims.get(name)
        assert torch.equal(whole, found[0] if dim is None else torch.cat(found, dim))
    wide = spec.padded(64).in_parts(1, 2)  # 48 -> 128, 64 a part: the second one is padding
    name = "model.layers.1.mlp.down_proj.A"
    assert wide.wide_shapes[name] == (128, 8)
    assert not part(stored(torch.ones(48, 8), name, spec.padded(128)), name, wide).any()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"num_heads": 4, "num_kv_heads": 1}}, r"1 is not .* a divisor of 1"),
        ({"model": {"hidden_size": 36, "num_heads": 3}}, "--model.num-heads 3 is not divided"),
        ({"parallel": {"shard": 2, "checkpoint": "parts"}}, "say --parallel.checkpoint whole"),
        ({"train": {"compile": True}}, "leave one of them out"),
        ({"train": {"precision": "bf16"}}, "bf16-mixed"),
        ({"optimizer": {"name": "muon"}}, "needs whole matrices"),
        ({"model": {"linear": "relora"}}, "with relora: its merges .*; say --parallel.data"),
        ({"model": {"linear": "sltrain"}}, "with sltrain: its sparse items"),
    ],
)
def test_what_cannot_be_computed_in_parts_is_refused(
    sections: dict[str, dict[str, Any]], words: str
) -> None:
    config = override(override(BASE, parallel={"tensor": 2}), **sections)
    with pytest.raises(ConfigError, match=words):
        check(config)
