"""Optimizers of a model that is split over processes (FSDP2, gloo, CPU), against one process.

Gradients are a function of the weights, item by item, so that every process computes those of one
process. What has an owner is then equal by bits; of what is stepped in parts the last items of each
part go another way through torch's vectorised loops, and agree to rounding. The processes of a
world size are started once.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import socket
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist

from crnet import optimizers
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import ModelConfig, OptimizerConfig, ParallelConfig, options_of
from crnet.cost.shared import bytes_of_rank
from crnet.model.build import build, lay_out
from crnet.model.events import run_events
from crnet.model.language_model import LanguageModel
from crnet.optimizers import Settings
from crnet.optimizers._sharing import owners, part_of
from crnet.parallel import owners as parallel_owners
from crnet.parallel.engine import Engine, lay_out_shared
from crnet.parallel.world import World, joined
from crnet.specs import TensorSpec, normal
from crnet.train.resume import all_weights, restore, snapshot

SHAPE = ModelConfig(
    hidden_size=18,  # 18 = 5 + 5 + 5 + 3 rows; 2 and 3 ranks of a factor leave processes empty
    intermediate_size=22,
    num_layers=3,
    num_heads=2,
    vocab_size=31,
    rank="3",
)
STEPS = 20
"""Half of them are taken before a checkpoint."""
SETTINGS = Settings(
    lr=0.01, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1, seed=5, num_steps=STEPS
)
CASES = {
    "adamw": ("full", OptimizerConfig(name="adamw")),
    "muon": ("crnet", OptimizerConfig(name="muon")),
    "muon on factors and resets": ("relora", OptimizerConfig(name="muon")),
    "apollo": ("full", OptimizerConfig(name="apollo")),
    "apollo-mini": ("full", OptimizerConfig(name="apollo-mini")),
    "golore": (
        "full",
        OptimizerConfig(name="golore", golore=optimizers.get("golore").Options(svd_frac=0.3)),
    ),
    "fira": ("full", OptimizerConfig(name="fira")),
    "dct-adamw": ("full", OptimizerConfig(name="dct-adamw")),
    "adafactor": ("crnet", OptimizerConfig(name="adafactor")),
    "scale": ("crnet", OptimizerConfig(name="scale")),
    "stable-spam": ("crnet", OptimizerConfig(name="stable-spam")),
    "gradnorm-lorp": ("full", OptimizerConfig(name="gradnorm-lorp")),
    "flora": ("crnet", OptimizerConfig(name="flora")),
    "loro-adam": (
        "crnet",
        OptimizerConfig(
            name="loro-adam", loro_adam=optimizers.get("loro-adam").Options(exact_every=3)
        ),
    ),
    "spectron": ("crnet", OptimizerConfig(name="spectron")),
    "lora-muon": ("cola", OptimizerConfig(name="lora-muon")),
}
"""Parameterization and optimizer."""
LAYOUTS = {2: [{"shard": 2}], 4: [{"shard": 4}, {"data": 2, "shard": 2}]}
"""By number of processes."""

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes"),
]


def config_of(case: str) -> tuple[ModelConfig, OptimizerConfig]:
    linear, optimizer = CASES[case]
    model = dataclasses.replace(SHAPE, linear=linear)
    options = options_of(optimizer, optimizer.name)
    if hasattr(options, "refresh_every"):
        options = dataclasses.replace(options, rank=2, refresh_every=7)
        optimizer = dataclasses.replace(optimizer, **{optimizer.name.replace("-", "_"): options})
    if hasattr(model, linear) and hasattr(getattr(model, linear), "reset_every"):
        every = dataclasses.replace(getattr(model, linear), reset_every=4)
        model = dataclasses.replace(model, **{linear: every})
    return model, optimizer


def made(
    case: str, lay: Callable[[ModelSpec], LanguageModel] = lay_out, seed: int = 3
) -> tuple[LanguageModel, torch.optim.Optimizer]:
    config, section = config_of(case)
    model = build(model_spec(config), seed, lay=lay)
    method, options = optimizers.get(section.name), options_of(section, section.name)
    return model, parallel_owners.build(method, model.trained(), options, SETTINGS, None)


def stepped(
    model: LanguageModel, optimizer: torch.optim.Optimizer, first: int, last: int, world: Any = None
) -> None:
    """Steps ``first`` to ``last``, with what is due after each."""
    around = Engine(model, world).around_events() if world else None
    for step in range(first, last + 1):
        for parameter in model.parameters():
            if parameter.requires_grad:
                weight = parameter.detach()
                parameter.grad = weight * (2 + step % 3) + 0.3
        optimizer.step()
        run_events(model, optimizer, step, 5, *([around] if around else []))


def taken(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"weights": dict(all_weights(model)), "state": snapshot(optimizer, model.spec)}


def held(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of this process's tensors."""
    local = [getattr(each, "_local_tensor", each) for each in model.parameters()]
    gradients = [getattr(each.grad, "_local_tensor", each.grad) for each in model.parameters()]
    return {
        "weights": sum(map(_bytes, local)),
        "gradients": sum(_bytes(each) for each in gradients if each is not None),
        "optimizer state": sum(_bytes(state) for state in optimizer.state.values()),
    }


def _bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    if not isinstance(value, torch.Tensor):
        return 0
    value = getattr(value, "_local_tensor", value)
    return value.numel() * value.element_size()


def worker(rank: int, port: int, size: int, folder: Path) -> None:
    """One of ``size`` processes: every case in every layout, saved half way and at the end."""
    torch.set_num_threads(1)
    os.environ["WORLD_SIZE"] = str(size)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    for sizes in LAYOUTS[size]:
        with joined(ParallelConfig(**sizes)) as world:
            for case in CASES:
                train_shared(case, world, folder / label(size, sizes, case))
    dist.destroy_process_group()


def label(size: int, sizes: dict[str, int], case: str) -> str:
    return f"{size} {sizes} {case}"


def train_shared(case: str, world: World, path: Path) -> None:
    def lay(spec: ModelSpec) -> LanguageModel:
        return lay_out_shared(spec, world)

    def save(name: str, *what: Any) -> None:
        found = taken(*what)
        if world.rank == 0:
            torch.save(found, path.with_name(f"{path.name} {name}.pt"))
        else:
            assert not found["weights"]
            assert not found["state"]["optimizer"]
        dist.barrier()

    model, optimizer = made(case, lay)
    stepped(model, optimizer, 1, STEPS // 2, world)
    torch.save(held(model, optimizer), path.with_name(f"{path.name} {world.rank}.bytes"))
    save("half", model, optimizer)
    stepped(model, optimizer, STEPS // 2 + 1, STEPS, world)
    save("whole", model, optimizer)
    again, again_optimizer = made(case, lay, seed=4)
    load(again, again_optimizer, path.with_name(f"{path.name} half.pt"))
    stepped(again, again_optimizer, STEPS // 2 + 1, STEPS, world)
    for parameter, other in zip(model.parameters(), again.parameters(), strict=True):
        ours, theirs = (getattr(each, "_local_tensor", each) for each in (parameter, other))
        assert torch.equal(ours, theirs), "the same processes go on to the bit"
    # From one process's checkpoint, into a model of another seed.
    other, other_optimizer = made(case, lay, seed=4)
    load(other, other_optimizer, path.with_name(f"{case} half.pt"))
    stepped(other, other_optimizer, STEPS // 2 + 1, STEPS, world)
    save("resumed", other, other_optimizer)


def load(model: LanguageModel, optimizer: torch.optim.Optimizer, path: Path) -> None:
    from crnet.inference.load import copy_weights

    saved = torch.load(path, weights_only=True)
    copy_weights(model, saved["weights"])
    restore(optimizer, saved["state"], torch.device("cpu"), model.spec)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by one process."""
    folder = tmp_path_factory.mktemp("owners")
    for case in CASES:
        model, optimizer = made(case)
        stepped(model, optimizer, 1, STEPS // 2)
        torch.save(taken(model, optimizer), folder / f"{case} half.pt")
        stepped(model, optimizer, STEPS // 2 + 1, STEPS)
        torch.save(taken(model, optimizer), folder / f"{case} whole.pt")
    return folder


@pytest.fixture(scope="module")
def shared(folder: Path) -> Callable[[int], Path]:
    """Every case by so many processes."""

    @functools.cache
    def train(size: int) -> Path:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(worker, (port, size, folder), nprocs=size)  # type: ignore[attr-defined]
        return folder

    return train


ROUNDING = (2e-5, 2e-7)
"""Relative and absolute."""
ALL = [
    pytest.param(size, sizes, case, marks=[pytest.mark.slow] if size > 2 else [])
    for size in LAYOUTS
    for sizes in LAYOUTS[size]
    for case in CASES
]


def assert_same(found: Any, wanted: Any, name: str, whole: Collection[str]) -> None:
    """By bits where the tensor of that name is one of ``whole``."""
    if isinstance(wanted, torch.Tensor):
        rtol, atol = (0.0, 0.0) if name in whole else ROUNDING
        torch.testing.assert_close(found, wanted.detach(), rtol=rtol, atol=atol, msg=name)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_same(found[key], wanted[key], name, whole)
    else:
        assert found == wanted


def assert_same_run(found: dict[str, Any], wanted: dict[str, Any], case: str) -> None:
    whole = whole_names(case)
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        assert_same(found["weights"][name], weight, name, whole)
    state, their_state = found["state"]["optimizer"], wanted["state"]["optimizer"]
    assert list(state) == list(their_state)
    assert state["param_groups"] == their_state["param_groups"]
    assert list(state["state"]) == list(their_state["state"])
    names = [name for group in state["param_groups"] for name in group["names"]]
    for index, each in their_state["state"].items():
        assert_same(state["state"][index], each, names[index], whole)


def whole_names(case: str) -> set[str]:
    config, section = config_of(case)
    method, options = optimizers.get(section.name), options_of(section, section.name)
    tensors = model_spec(config).tensors
    return {name for name, spec in tensors.items() if spec.trained and method.whole(spec, options)}


@pytest.mark.parametrize(("size", "sizes", "case"), ALL)
def test_steps_are_those_of_one_process(
    size: int, sizes: dict[str, int], case: str, shared: Callable[[int], Path]
) -> None:
    """Weights and the whole state dict, its order too: half way, at the end, and where the second
    half began from what one process saved."""
    folder = shared(size)
    for name in ("half", "whole", "resumed"):
        saved = torch.load(folder / f"{label(size, sizes, case)} {name}.pt", weights_only=True)
        of_one = f"{case} {name.replace('resumed', 'whole')}.pt"
        wanted = torch.load(folder / of_one, weights_only=True)
        assert_same_run(saved, wanted, case)


@pytest.mark.parametrize(("size", "sizes", "case"), ALL)
def test_one_process_goes_on_from_a_split_run(
    size: int, sizes: dict[str, int], case: str, shared: Callable[[int], Path]
) -> None:
    folder, (model, optimizer) = shared(size), made(case, seed=4)
    load(model, optimizer, folder / f"{label(size, sizes, case)} half.pt")
    stepped(model, optimizer, STEPS // 2 + 1, STEPS)
    wanted = torch.load(folder / f"{case} whole.pt", weights_only=True)
    assert_same_run(taken(model, optimizer), wanted, case)


@pytest.mark.parametrize(("size", "sizes", "case"), ALL)
def test_bytes_of_every_process(
    size: int, sizes: dict[str, int], case: str, shared: Callable[[int], Path]
) -> None:
    """The closed form is the bytes of the tensors that each process holds (exact)."""
    folder, (config, section) = shared(size), config_of(case)
    tensors, parallel = model_spec(config).tensors, ParallelConfig(**sizes)
    for rank in range(size):
        found = torch.load(folder / f"{label(size, sizes, case)} {rank}.bytes")
        assert bytes_of_rank(tensors, section, parallel, rank).held == found


def test_owners_are_balanced() -> None:
    """Largest first onto the least loaded, the same in any order of the tensors."""
    sizes = (7, 1, 6, 5, 4, 4, 2, 2)
    specs = {f"w{idx}": TensorSpec((n, 3), "matrix", normal(1.0)) for idx, n in enumerate(sizes)}
    method = optimizers.get("muon")
    assert method.Options is not None
    found = owners(method, method.Options(), specs, 3)
    assert found == {"w0": 0, "w2": 1, "w3": 2, "w4": 2, "w5": 1, "w6": 0, "w7": 0, "w1": 2}
    turned = dict(reversed(specs.items()))
    assert owners(method, method.Options(), turned, 3) == found
    alone = optimizers.get("adamw")
    assert owners(alone, None, specs, 3) == {}


@pytest.mark.parametrize(("rows", "ranks"), [(1, 4), (5, 4), (6, 4), (8, 4), (9, 4), (0, 2)])
def test_parts_are_those_of_torch(rows: int, ranks: int) -> None:
    spec = TensorSpec((rows, 2), "matrix", normal(1.0))
    chunks = [len(each) for each in torch.empty(rows, 2).chunk(ranks)] if rows else []
    found = [part_of(spec, rank, ranks).shape for rank in range(ranks)]
    assert found == [(size, 2) for size in chunks + [0] * (ranks - len(chunks))]
