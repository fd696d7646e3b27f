"""Models that several test files share: a tiny one, and one of every registered method."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from crnet import architectures, linears, streams
from crnet.config.check import check, policy_problem
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import DataConfig, ModelConfig, RunConfig
from crnet.errors import ConfigError
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from crnet.recompute.plan import POLICIES

TINY = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=31,
    rank="4",
)


def tiny(**changes: Any) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


def is_legal(config: ModelConfig) -> bool:
    try:
        check(RunConfig(model=config, data=DataConfig(sequence_length=16)))
    except ConfigError:
        return False
    return True


def one_of_every_method(**changes: Any) -> dict[str, ModelConfig]:
    """A covering set by name: every parameterization in ``TINY``, and every architecture, stream
    and parameterization in turn beside one another, where the three go together."""
    seams = (linears.names(), architectures.names(), streams.names())
    rows = [(linear, TINY.architecture, TINY.stream) for linear in linears.names()]
    rows += [(TINY.linear, name, TINY.stream) for name in architectures.names()]
    rows += [(TINY.linear, TINY.architecture, name) for name in streams.names()]
    for idx in range(max(map(len, seams))):
        rows.append(tuple(names[idx % len(names)] for names in seams))  # type: ignore[arg-type]
    found = {}
    for linear, architecture, stream in rows:
        made = tiny(linear=linear, architecture=architecture, stream=stream, **changes)
        plain = dataclasses.replace(made, num_kv_heads=None)
        tried = [made, plain, dataclasses.replace(made, intermediate_size=TINY.intermediate_size)]
        legal = next((each for each in tried if is_legal(each)), None)
        if legal is not None:
            found["-".join((linear, architecture, stream))] = legal
    for seam, key in zip(seams, ("linear", "architecture", "stream"), strict=True):
        assert {getattr(config, key) for config in found.values()} == set(seam)
    return found


def policies_of(spec: ModelSpec) -> list[str]:
    return [policy for policy in POLICIES if policy_problem(spec, policy) is None]


def make(config: ModelConfig, seed: int = 0, **more: Any) -> LanguageModel:
    return build(model_spec(config), seed, **more)


def may_differ(config: ModelConfig) -> float:
    """By how much logits may move with tokens that they must not read: 0, or with experts, to be
    held in fp64, 1e-12. Which expert another token goes to decides how many rows an expert's
    products have, and products of another height may round otherwise: some 1e-14 of logits below
    10, where what is read moves them by 1e-2 and more."""
    return 1e-12 if any(each.expert is not None for each in model_spec(config).positions) else 0.0


def randomised(model: LanguageModel, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """Far from the start: norm gains are not 1, gains of both signs, weights not small."""
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            role = model.spec.tensors[name].role
            if role == "index":
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if role == "norm":
                noise = 1 + 0.3 * noise
            elif role == "gain":
                noise = torch.sign(noise) * (0.2 + noise.abs())
            else:
                noise = noise * 0.5
            parameter.copy_(noise)
    return model


def random_tokens(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(seed))


def error(actual: Tensor | None, expected: Tensor | None) -> float:
    """Largest difference over the largest expected item."""
    assert actual is not None
    assert expected is not None
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())
