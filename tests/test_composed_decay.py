"""--optimizer.decay composed: the product of two factors decays, and nothing else does anew."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from crnet import linears
from crnet.config.check import check
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.errors import ConfigError
from crnet.measure.examples import small_model
from crnet.optimizers import Settings, adamw
from crnet.optimizers._composed import decay, pairs_of, tensors_of_pairs, without_own_decay
from crnet.specs import TensorSpec, constant
from crnet.storage import checkpoint
from test_optimizer_state import assert_same
from test_train import run, tiny, weights_of

DECAY = 0.3
COMPOSED = {"weight_decay": DECAY, "decay": "composed"}


def naive(a: Tensor, b: Tensor, rate_a: float, rate_b: float) -> tuple[Tensor, Tensor]:
    """A step of plain descent along (DECAY / 2) |A B|^2, by autograd, the product made."""
    a, b = (each.detach().clone().requires_grad_() for each in (a, b))
    (DECAY / 2 * (a @ b).square().sum()).backward()
    assert a.grad is not None
    assert b.grad is not None
    return a.detach() - rate_a * a.grad, b.detach() - rate_b * b.grad


@pytest.mark.parametrize(("size_in", "size_out"), [(12, 5), (5, 12)], ids=["tall", "wide"])
def test_it_is_the_gradient_of_the_products_norm(size_in: int, size_out: int) -> None:
    """fp64, 20 steps, two rates; rounding alone."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"map.A": (size_in, 3), "map.B": (3, size_out), "map.weight": (4, 4)}
    roles: dict[str, Any] = {"map.A": "factor_in", "map.B": "factor_out", "map.weight": "matrix"}
    partners = {"map.A": "B", "map.B": "A"}
    parameters = {
        name: (
            TensorSpec(
                shape,
                roles[name],
                constant(0.0),
                partner=partners.get(name),
                lr_factor=0.5 if name == "map.B" else 1.0,
            ),
            torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)),
        )
        for name, shape in shapes.items()
    }
    settings = Settings(lr=0.02, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=DECAY, seed=0)
    given = without_own_decay(parameters)
    optimizer = adamw.AdamW().build(given, None, settings)
    decays = {
        name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]
    }
    assert decays == {"map.A": 0, "map.B": 0, "map.weight": DECAY}
    a, b, weight = (tensor for _, tensor in parameters.values())
    wanted, before = (a, b), weight.detach().clone()
    for _ in range(20):
        wanted = naive(*wanted, 0.02, 0.01)
        decay(tensors_of_pairs(parameters), optimizer, DECAY)
        for one, other in zip((a, b), wanted, strict=True):
            torch.testing.assert_close(one.detach(), other, rtol=1e-12, atol=1e-14)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", ["adamw", "adam8bit", "muon", "lion", "adafactor", "sgd"])
def test_a_step_is_that_of_no_decay_and_the_products(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    """Beside a run without decay: factors differ by the product's gradient, norms and gains in
    nothing. The two steps begin alike, and no step of these hangs on the weight but Adafactor's,
    whose rate is a fixed one here. fp32."""
    if name == "adam8bit":
        pytest.importorskip("bitsandbytes")
    optimizer: dict[str, Any] = {"name": name, "lr": 0.05, "clip_norm": 0.0}
    optimizer |= {"adafactor": {"rate": "fixed"}} if name == "adafactor" else {}
    plain, composed = (
        tiny(corpus, train={"steps": 1, "save_every_steps": 0}, optimizer=optimizer | more)
        for more in ({}, COMPOSED)
    )
    run(plain, tmp_path / "plain")
    run(composed, tmp_path / "composed")
    run(override(plain, train={"steps": 1}, optimizer={"lr": 1e-30}), tmp_path / "first")
    first, one, other = (weights_of(tmp_path / each) for each in ("first", "plain", "composed"))
    specs = model_spec(override(composed, model={"vocab_size": 300}).model).tensors
    pairs = pairs_of(specs)
    assert len(pairs) == 2 * 7  # blocks above the first, positions
    rate = {each: 0.05 * specs[each].lr_factor for each in specs}
    for each, partner in pairs.items():
        decayed = naive(first[each], first[partner], rate[each], rate[partner])
        for key, value in zip((each, partner), decayed, strict=True):
            found, wanted = other[key] - one[key], value - first[key]
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-7)
            assert float(wanted.abs().max()) > 1e-6
    for key in specs.keys() - pairs.keys() - {*pairs.values()}:
        assert torch.equal(other[key], one[key]) == (not specs[key].decays), key


def split(rank: int, port: int, folder: Path) -> None:
    """A pair whose rows two processes share, the second one with fewer."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    pair = [distribute_tensor(each, mesh, [Shard(0)]) for each in whole_pair()]
    optimizer = torch.optim.SGD(pair, lr=0.02)
    for _ in range(5):
        decay([(pair[0], pair[1])], optimizer, DECAY)
    torch.save([each.full_tensor() for each in pair], folder / f"{rank}.pt")
    dist.destroy_process_group()


def whole_pair() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 3), (3, 5))
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes")
def test_rows_of_two_processes_decay_as_the_whole(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(split, (port, tmp_path), nprocs=2)  # type: ignore[attr-defined]
    a, b = whole_pair()
    for _ in range(5):
        a, b = naive(a, b, 0.02, 0.02)
    for rank in (0, 1):
        for one, other in zip(torch.load(tmp_path / f"{rank}.pt"), (a, b), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_it_resumes_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, train={"steps": 6, "save_every_steps": 3}, optimizer=COMPOSED)
    run(config, tmp_path / "whole")
    run(override(config, train={"stop_after_steps": 3}), tmp_path / "halves")
    run(config, tmp_path / "halves", resume=True)
    ours, wanted = (checkpoint.newest(tmp_path / each) for each in ("halves", "whole"))
    assert ours is not None
    assert wanted is not None
    assert_same(ours.weights(), wanted.weights())
    assert_same(ours.state(), wanted.state())


def test_who_has_pairs() -> None:
    """Two trained factors that decay. Not: full rank; RSO and SST, whose products are frozen in
    part or whose vectors are kept orthogonal."""
    found = {
        name
        for name in linears.names()
        if pairs_of(
            {
                key: spec
                for key, spec in model_spec(small_model(linear=name)).tensors.items()
                if spec.trained
            }
        )
    }
    assert {"crnet", "resformer", "lowrank", "cola", "lora", "relora", "sltrain", "lax"} <= found
    assert not found & {"full", "value-resformer", "velora", "rso", "sst"}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optimizer": {"weight_decay": 0.0}}, "no effect without --optimizer.weight-decay"),
        ({"model": {"linear": "full"}}, "full trains no pair of factors"),
        ({"train": {"precision": "bf16"}}, "say --train.precision bf16-mixed"),
        ({"parallel": {"tensor": 2}}, "say --parallel.data or --parallel.shard"),
        (
            {"train": {"adapter": "lora", "init_from": Path("x")}, "model": {"linear": "full"}},
            "PEFT declares no pairs",
        ),
    ],
)
def test_what_it_does_not_go_with(sections: dict[str, Any], words: str) -> None:
    config = override(override(RunConfig(), optimizer=COMPOSED), **sections)
    with pytest.raises(ConfigError, match=words):
        check(config)
