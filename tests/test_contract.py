"""Every parameterization with every optimizer, whatever is registered: none is named here.

A new one is covered the moment its file exists. Exact and bit equalities, and one margin: that of
the loss after twenty steps on one batch.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import crnet
from crnet import linears, optimizers
from crnet.config import sections as crnet_config
from crnet.config.check import check
from crnet.config.sections import ModelConfig, OptimizerConfig
from crnet.model.backbone import LanguageModel, build

OPTIMIZER = OptimizerConfig(lr=2e-2, weight_decay=0.01)
STEPS = 20
MARGIN = 2.0
"""The least fall in nats per token, from about ln 31 = 3.43: the batch is learnt by heart."""

each_linear = pytest.mark.parametrize("linear", linears.names())
each_optimizer = pytest.mark.parametrize("optimizer", optimizers.names())


def shape(linear: str, num_kv_heads: int | None = 2) -> ModelConfig:
    return ModelConfig(
        linear=linear,
        rank="4",
        hidden_size=16,
        intermediate_size=24,
        num_layers=3,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        vocab_size=31,
    )


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 31, (4, 9), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def make(linear: str, optimizer: str, seed: int = 0) -> tuple[LanguageModel, torch.optim.Optimizer]:
    model = build(shape(linear), seed)
    return model, optimizers.get(optimizer).build(model.optimizer_groups(), OPTIMIZER)


def train(model: LanguageModel, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Mean loss before each step. Every gradient is present and finite at each."""
    losses = []
    for _ in range(steps):
        loss, count = model(*batch())
        (loss / count).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.shape == parameter.shape
            assert bool(parameter.grad.isfinite().all()), name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach() / count))
    return losses


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


@each_linear
@each_optimizer
def test_trains(linear: str, optimizer: str):
    model, opt = make(linear, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, opt, STEPS)
    assert losses[0] - losses[-1] > MARGIN
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} never moved"


@each_linear
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
def test_cost_and_groups_of_every_slot(linear: str, num_kv_heads: int | None):
    """Exact, by name: shape of each parameter, the groups' names, the module's interface."""
    method = linears.get(linear)
    config = shape(linear, num_kv_heads)
    options = getattr(config, linear, None)
    for slot in linears.slots(config):
        module = method.make(slot, options, config.init_std)
        actual = {name: tuple(p.shape) for name, p in module.named_parameters()}
        assert method.shapes(slot) == actual
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        assert set(method.groups(slot, options)) == trained == set(actual)
        module.reset_parameters(torch.Generator().manual_seed(0))
        carry = torch.randn(2, 5, slot.out_size)
        has_carry = method.carry != "none" and slot.layer_idx > 0
        y = module(torch.randn(2, 5, slot.in_size), carry if has_carry else None)
        assert y.shape == carry.shape
        assert method.carry in ("none", "below", "first")


@each_linear
def test_closed_form_is_the_model(linear: str):
    counts = linears.num_parameters(shape(linear))
    model = build(shape(linear), seed=0)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


@each_linear
@each_optimizer
def test_groups_keep_their_factor(linear: str, optimizer: str):
    """Every parameter is in one group, whose rate is the base rate times its factor, exactly."""
    model, opt = make(linear, optimizer)
    given = {id(p): g for g in model.optimizer_groups() for p in g.parameters}
    seen = []
    for group in opt.param_groups:
        for parameter in group["params"]:
            expected = given[id(parameter)]
            assert group["lr_factor"] == expected.lr_factor
            assert group["lr"] == OPTIMIZER.lr * expected.lr_factor
            assert group["weight_decay"] == (OPTIMIZER.weight_decay if expected.decays else 0.0)
            seen.append(id(parameter))
    assert sorted(seen) == sorted(id(p) for p in model.parameters())


@each_linear
@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes(linear: str, optimizer: str, dtype: torch.dtype):
    """Closed form == the bytes of every tensor the optimizer holds after a step, exactly."""
    model = build(shape(linear), seed=0).to(dtype)
    method = optimizers.get(optimizer)
    opt = method.build(model.optimizer_groups(), OPTIMIZER)
    train(model, opt, 2)
    for name, parameter in model.named_parameters():
        held = sum(t.numel() * t.element_size() for t in tensors(opt.state[parameter]))
        assert method.state_bytes(tuple(parameter.shape), parameter.element_size()) == held, name
    assert len(opt.state) == len(list(model.parameters()))


@each_linear
@each_optimizer
def test_state_round_trip(linear: str, optimizer: str):
    """Saved, loaded into a model of another seed, continued: bit the same as never stopped."""
    model, opt = make(linear, optimizer)
    train(model, opt, STEPS)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    expected_losses = train(model, opt, 3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, other_opt = make(linear, optimizer, seed=1)
    other.load_state_dict(saved["model"], strict=True)
    other_opt.load_state_dict(saved["optimizer"])
    assert train(other, other_opt, 3) == expected_losses
    expected = model.state_dict()
    actual = other.state_dict()
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    for mine, theirs in itertools.zip_longest(
        tensors(other_opt.state_dict()), tensors(opt.state_dict())
    ):
        assert torch.equal(mine, theirs)


@each_linear
@each_optimizer
def test_training_is_deterministic(linear: str, optimizer: str):
    assert train(*make(linear, optimizer), 5) == train(*make(linear, optimizer), 5)


# --- declarations -------------------------------------------------------------------------------


def test_declarations_import_no_torch():
    """Listing, checking and costing every method of every preset loads no torch."""
    program = """
import sys
import crnet.config.check, crnet.config.presets, crnet.linears, crnet.optimizers
from dataclasses import replace
for name in crnet.linears.names():
    for _, recipe in crnet.config.presets.PRESETS.values():
        model = replace(recipe.model, linear=name, rank="0.25h", vocab_size=100)
        crnet.config.check.check(replace(recipe, model=model))
        assert sum(crnet.linears.num_parameters(model).values()) > 0
        for slot in crnet.linears.slots(model):
            crnet.linears.get(name).groups(slot, getattr(model, name, None))
for name in crnet.optimizers.names():
    assert crnet.optimizers.get(name).state_bytes((3, 4), 4) >= 0
print(sorted(name for name in sys.modules if name.split(".")[0] == "torch"))
"""
    source = str(Path(crnet.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


@each_linear
def test_options_are_a_field_of_the_model_configuration(linear: str):
    """One that has an options class has it as ``ModelConfig.<its name>``; others have none."""
    method = linears.get(linear)
    module = importlib.import_module(type(method).__module__)
    declared = [
        item
        for item in vars(module).values()
        if dataclasses.is_dataclass(item) and getattr(item, "__module__", "") == module.__name__
    ]
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    if declared:
        (options,) = declared
        assert fields[linear].default == options()  # type: ignore[operator]
        assert type(fields[linear].default) is options
        assert method.problems(fields[linear].default) == []
    else:
        assert linear not in fields
        assert method.problems(None) == []


@each_linear
def test_parameterization_declares_itself(linear: str):
    method = linears.get(linear)
    assert method.name == linear
    assert method.summary
    assert "\n" not in method.summary
    assert linears.names() == sorted(set(linears.names()))
    for word, table in method.published_ranks.items():
        assert word.startswith("aligned-")
        for (hidden_size, num_layers), schedule in table.items():
            num_blocks = num_layers - method.first_ranked_layer_idx
            ranks = linears.parse_ranks(
                schedule, num_blocks=num_blocks, hidden_size=hidden_size, published={}
            )
            assert {len(column) for column in ranks.values()} == {num_blocks}


@each_optimizer
def test_optimizer_declares_itself(optimizer: str):
    method = optimizers.get(optimizer)
    assert method.name == optimizer
    assert method.summary
    assert "\n" not in method.summary
    assert isinstance(method.shards, bool)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="has no 'adamv'; known: "):
        optimizers.get("adamv")


def test_default_configuration_names_registered_methods():
    run = crnet_config.RunConfig()
    assert run.model.linear in linears.names()
    assert run.optimizer.name in optimizers.names()
    check(run)
