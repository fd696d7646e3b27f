"""Seeds: every bit of one counts, wherever random numbers come from. Every inequality is exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from crnet.config.check import check
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.data.order import order
from crnet.errors import ConfigError
from crnet.model.build import build
from crnet.model.events import run_events
from crnet.model.seeds import generator_of
from crnet.optimizers._projection import gaussian, seed_of
from shapes import TINY

SEEDS = (0, 1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1, 2**64, 2**64 + 1, 2**200)
"""Among them such that agree in their lowest 32 bits, or in their lowest 64."""


def weights(linear: str, seed: int) -> list[Any]:
    """Trained and frozen ones, among them the support of a sparse matrix."""
    model = build(model_spec(dataclasses.replace(TINY, linear=linear)), seed)
    name = "layers.1.self_attn.q_proj"
    found = [each.tolist() for each_name, each in model.named_parameters() if name in each_name]
    assert found
    return found


def after_events(seed: int) -> list[Any]:
    """What ReLoRA keeps of an optimizer's state after a reset."""
    model = build(model_spec(dataclasses.replace(TINY, linear="relora")), 0)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for each in parameters.values():
        each.grad = torch.ones_like(each) if each.is_floating_point() else None
    optimizer.step()
    options = model.spec.linear_options
    run_events(model, optimizer, options.reset_every, seed)
    return [state["exp_avg"].tolist() for state in optimizer.state.values()]


DRAWS: dict[str, Callable[[int], Any]] = {
    "a generator": lambda seed: torch.rand(4, generator=generator_of(seed, "name")).tolist(),
    "the order of the data": lambda seed: order(seed, 1000, 0, 50).tolist(),
    "weights of factors": lambda seed: weights("crnet", seed),
    "a sparse support": lambda seed: weights("sltrain", seed),
    "a frozen matrix": lambda seed: weights("lora", seed),
    "a reset of states": after_events,
    "a projection of gradients": lambda seed: gaussian((8, 6), 4, seed_of(seed, "w", 3)).tolist(),
}


@pytest.mark.parametrize("what", DRAWS)
def test_every_bit_of_a_seed_counts(what: str) -> None:
    drawn = [DRAWS[what](seed) for seed in SEEDS]
    assert DRAWS[what](SEEDS[3]) == drawn[3], "a seed means the same numbers every time"
    for idx, one in enumerate(drawn):
        assert one not in drawn[:idx], (SEEDS[idx], SEEDS[drawn.index(one)])


@pytest.mark.parametrize("seed", [seed for seed in SEEDS if seed < 2**64])
def test_a_run_takes_any_seed_of_64_bits(seed: int) -> None:
    check(override(RunConfig(), train={"seed": seed}))


def test_a_seed_of_more_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--train.seed is 18446744073709551616; it must be"):
        check(override(RunConfig(), train={"seed": 2**64}))


@pytest.mark.parametrize("seed", [-1, -(2**64)])
def test_a_negative_seed_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=f"^--train.seed is {seed}; it must be zero or more"):
        check(override(RunConfig(), train={"seed": seed}))
