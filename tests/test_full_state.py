"""Whole weights and states of a model that is split over two processes (FSDP2, gloo, CPU).

Equality is by bits.
"""

from __future__ import annotations

import dataclasses
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from crnet import optimizers
from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig
from crnet.errors import ConfigError
from crnet.inference.load import copy_weights
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from crnet.optimizers import Settings
from crnet.optimizers import _low_precision as low_precision
from crnet.optimizers._low_precision import Bf16Update
from crnet.train.resume import all_weights, restore, snapshot

pytestmark = pytest.mark.slow

SHAPE = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    vocab_size=31,
    rank="4",
    tie_embeddings=True,
)
SETTINGS = Settings(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, seed=0)


CASES: dict[str, tuple[str, Bf16Update | None]] = {
    "fp32": ("crnet", None),
    "masters": ("full", "masters"),
    "vectors": ("full", "vectors"),
    "gains": ("crnet", "masters"),
}
"""Parameterization, and how bf16 weights take their updates. FSDP2 splits parameters of one dtype:
gains, which are fp32 in a bf16 model, are refused."""


def built(case: str, multiple: int = 1) -> LanguageModel:
    linear, update = CASES[case]
    dtype = torch.bfloat16 if update else torch.float32
    spec = model_spec(dataclasses.replace(SHAPE, linear=linear)).padded(multiple)
    return build(spec, seed=3, dtype=dtype)


def optimizer_of(model: LanguageModel, update: Bf16Update | None) -> torch.optim.Optimizer:
    method = optimizers.get("adamw")
    return low_precision.build(method, model.trained(), None, SETTINGS, update)


def whole(case: str = "fp32") -> tuple[LanguageModel, torch.optim.Optimizer]:
    model = built(case)
    return model, optimizer_of(model, CASES[case][1])


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step with gradients that are a function of the weights alone, item by item; 0 where the
    weight is: padding gets none."""
    for parameter in model.parameters():
        weight = parameter.detach()
        parameter.grad = weight * 2 + weight.sign()
    optimizer.step()


def assert_same(found: object, wanted: object) -> None:
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert isinstance(found, dict)
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_same(found[key], wanted[key])
    else:
        assert found == wanted


def split_over_ranks(rank: int, port: int, folder: Path, case: str) -> None:
    """One of two processes: two steps split over them, saved whole; then back, and one more."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))

    def sharded(case: str = case) -> tuple[LanguageModel, torch.optim.Optimizer]:
        # Stored wider than declared: what is saved knows nothing of it.
        model = built(case, multiple=64)
        for block in model.sharded_parts():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, optimizer_of(model, CASES[case][1])

    if CASES[case][1]:
        with pytest.raises(ConfigError, match=r"--train\.bf16-update stochastic does not run"):
            optimizer_of(sharded()[0], "stochastic")
    with pytest.raises(ConfigError, match="gains are fp32 in a bf16 model"):
        sharded("gains")
    model, optimizer = sharded()
    stepped(model, optimizer)
    stepped(model, optimizer)
    weights, state = all_weights(model), snapshot(optimizer, model.spec)
    if rank == 0:
        torch.save({"weights": weights, "state": state}, folder / "two.pt")
    else:
        assert not weights
        assert not state["optimizer"]
    torch.distributed.barrier()
    saved = torch.load(folder / "two.pt", weights_only=True)
    other, other_optimizer = sharded()
    copy_weights(other, saved["weights"])
    restore(other_optimizer, saved["state"], torch.device("cpu"), other.spec)
    stepped(other, other_optimizer)
    weights, state = all_weights(other), snapshot(other_optimizer, other.spec)
    if rank == 0:
        torch.save({"weights": weights, "state": state}, folder / "three.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes")
@pytest.mark.parametrize("case", ["fp32", "masters", "vectors"])
def test_a_split_model_is_saved_as_a_whole_one_and_comes_back(tmp_path: Path, case: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(split_over_ranks, (port, tmp_path, case), nprocs=2)  # type: ignore[attr-defined]
    model, optimizer = whole(case)
    for name, steps in (("two.pt", 2), ("three.pt", 1)):
        for _ in range(steps):
            stepped(model, optimizer)
        saved = torch.load(tmp_path / name, weights_only=True)
        assert_same(saved["weights"], {n: p.detach() for n, p in model.named_parameters()})
        assert_same(saved["state"]["optimizer"], optimizer.state_dict())


def test_a_single_process_asks_for_no_group() -> None:
    model, optimizer = whole()
    stepped(model, optimizer)
    assert all_weights(model).keys() == dict(model.named_parameters()).keys()
    assert "lm_head.weight" not in all_weights(model)
    ours = snapshot(optimizer, model.spec)["optimizer"]
    assert_same(ours, optimizer.state_dict())
    # The very tensors: nothing is copied.
    assert ours["state"][0]["exp_avg"] is optimizer.state_dict()["state"][0]["exp_avg"]
