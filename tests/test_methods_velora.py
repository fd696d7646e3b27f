"""VeLoRA: its map against the plain formulas, its direction, what it keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crnet import linears
from crnet.config.check import check
from crnet.config.sections import DataConfig, ModelConfig, RunConfig, TrainConfig
from crnet.cost.kept import kept_bytes
from crnet.cost.micro_batch import MicroBatch
from crnet.errors import ConfigError
from crnet.linears.velora import VeLoRAOptions
from crnet.linears.velora.module import VeLoRAMap
from crnet.recompute.plan import RecomputePlan
from crnet.storage import checkpoint
from crnet.train import run as training
from shapes import make, tiny

METHOD = linears.get("velora")


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def down_map(scale: float = 1.0, width: int = 3) -> VeLoRAMap:
    """24 -> 16, fp64."""
    model = make(tiny(linear="velora", velora=VeLoRAOptions(down_width=width, scale=scale)))
    found = model.model.blocks()[1].maps["down"].double()
    with torch.no_grad():
        found.weight.copy_(drawn(16, 24, seed=1))
        found.direction.div_(found.direction.norm())
    return found


def gradients(linear: Any, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the gradients of x and of the weight."""
    x = x.clone().requires_grad_()
    linear.weight.grad = None
    output = linear(x, None)[0] if isinstance(linear, VeLoRAMap) else linear(x)
    output.backward(slope)
    assert x.grad is not None
    return output.detach(), x.grad, linear.weight.grad.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_and_gradient_of_x_are_those_of_a_dense_map(dtype: torch.dtype):
    """Bit for bit (baselines, check 11)."""
    linear, dense = down_map().to(dtype), nn.Linear(24, 16, bias=False).to(dtype)
    with torch.no_grad():
        dense.weight.copy_(linear.weight)
    x, slope = drawn(2, 9, 24, seed=2).to(dtype), drawn(2, 9, 16, seed=3).to(dtype)
    for actual, expected in zip(
        gradients(linear, x, slope)[:2], gradients(dense, x, slope)[:2], strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_the_gradient_of_the_weight_is_that_of_the_plain_formula(scale: float):
    linear = down_map(scale)
    x, slope = drawn(2, 9, 24, seed=2), drawn(2, 9, 16, seed=3)
    direction = linear.direction.detach()
    z = torch.einsum("btgs,s->btg", x.view(2, 9, 8, 3), direction)
    x_hat = torch.einsum("btg,s->btgs", z, direction).reshape(2, 9, 24)
    expected = scale * torch.einsum("btf,btd->fd", slope, x_hat)
    actual = gradients(linear, x, slope)[2]
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_it_is_exact_where_sub_tokens_are_parallel_to_the_direction():
    linear, dense = down_map(), nn.Linear(24, 16, bias=False).double()
    x = (drawn(2, 9, 8, 1, seed=4) * linear.direction.detach()).reshape(2, 9, 24)
    slope = drawn(2, 9, 16, seed=3)
    expected = gradients(dense, x, slope)[2]
    assert torch.allclose(gradients(linear, x, slope)[2], expected, rtol=1e-10, atol=1e-12)


def test_the_direction_is_the_normalised_mean_of_all_sub_tokens():
    linear, x = down_map(), drawn(2, 9, 24, seed=5)
    before = linear.direction.detach().clone()
    linear.run_event("direction", torch.Generator())  # nobody has looked
    assert torch.equal(linear.direction, before)
    assert float(before.norm()) == pytest.approx(1, abs=1e-6)
    linear.look(x)
    linear.run_event("direction", torch.Generator())
    mean = x.view(-1, 3).mean(0)
    assert torch.allclose(linear.direction, mean / mean.norm(), atol=1e-12)
    linear.look(torch.zeros(2, 9, 24, dtype=torch.float64))
    linear.run_event("direction", torch.Generator())
    assert torch.allclose(linear.direction, mean / mean.norm(), atol=1e-12)


def test_it_saves_the_input_of_down_alone():
    """The input of v is kept by q and k; one number a sub-token is kept of both."""
    sizes = {}
    for name in ("full", "velora"):
        micro_batch = MicroBatch(make(tiny(linear=name)).spec, 4, 8)
        sizes[name] = sum(kept_bytes(micro_batch, RecomputePlan()).values())
    tokens, blocks = 4 * 8, 3
    assert sizes["full"] - sizes["velora"] == blocks * tokens * 4 * (24 - 24 // 8 - 16 // 8)


def test_a_width_that_does_not_divide_is_refused_with_the_nearest():
    config = RunConfig(
        model=tiny(linear="velora", velora=VeLoRAOptions(down_width=7)),
        data=DataConfig(sequence_length=16),
    )
    with pytest.raises(ConfigError, match="down-width 7 does not divide the 24 items") as error:
        check(config)
    assert "take 6, or another divisor of 24" in str(error.value)


@pytest.mark.slow
def test_a_run_begins_with_the_direction_of_its_first_rows(tmp_path: Path):
    """Whatever the micro-batch; a resumed run has it from the checkpoint."""
    base = RunConfig(
        model=ModelConfig(
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=2,
            linear="velora",
        ),
        data=DataConfig(
            documents="paragraph", vocab_size=300, sequence_length=16, validation_tokens=200
        ),
        train=TrainConfig(steps=2, batch_size=16, threads=1, device="cpu", save_every_steps=1),
    )

    def directions(name: str, resume: bool = False, **train: Any) -> dict[str, Tensor]:
        config = dataclasses.replace(base, train=dataclasses.replace(base.train, **train))
        found = training.run(config, tmp_path / name, resume=resume, progress=False)
        assert found.checkpoint is not None
        weights = checkpoint.load(found.checkpoint).weights()
        return {key: value for key, value in weights.items() if key.endswith("direction")}

    first = directions("one", stop_after_steps=1)
    assert len(first) == 4
    values = torch.stack([each.float() for each in first.values()])
    assert torch.allclose(values.norm(dim=1), torch.ones(4), atol=1e-6)
    drawn_ones = make(dataclasses.replace(base.model, vocab_size=300)).state_dict()
    assert not any(torch.equal(value, drawn_ones[key]) for key, value in first.items())
    for other in (directions("one", resume=True), directions("two", micro_batch_size=2)):
        assert all(torch.equal(other[key], value) for key, value in first.items())
