"""A training step under a recomputation plan, and what two steps are compared by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet.config.sections import ModelConfig
from crnet.linears.crnet import CRNetOptions
from crnet.model.language_model import LanguageModel
from crnet.recompute.plan import RecomputePlan
from shapes import make, random_tokens, randomised
from shapes import tiny as shallow

Plan = RecomputePlan

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}

INVERTED = 2000
"""Units of rounding that a gradient of ``invert`` may be off, relative to its largest item. Gains
are at least 0.2, three layers are crossed, one adds five units: 5 x 5^3 = 625; and what is made of
a Y (norm, softmax, products) amplifies its error little."""

NONE = Plan()
PLANS = {
    "block": Plan("block"),
    "replay": Plan("replay", (2,)),
    "replay-one-segment": Plan("replay", (), keep_attention=True),
    "invert": Plan("invert", (3,)),
}
each_plan = pytest.mark.parametrize("plan", list(PLANS.values()), ids=list(PLANS))
each_rebuilding = pytest.mark.parametrize("policy", ["replay", "invert"])

Result = tuple[Tensor, dict[str, Tensor]]
"""The loss, and the gradient of every parameter that is trained."""


def tiny(**changes: Any) -> ModelConfig:
    return shallow(**({"num_layers": 4} | changes))


SHAPES = {
    "mha": tiny(num_kv_heads=None),
    "by-position": tiny(rank="4,5,3/k=2/down=0.5h"),
    "first-rank": tiny(crnet=CRNetOptions(first_rank=3)),
    "fp32-carry": tiny(crnet=CRNetOptions(carry_dtype="fp32")),
    "tied": tiny(tie_embeddings=True),
}


def random_model(config: ModelConfig, precision: str = "fp32") -> LanguageModel:
    dtypes = {"fp64": torch.float64, "bf16": torch.bfloat16}
    return randomised(make(config), dtypes.get(precision, torch.float32))


def beta_of(model: LanguageModel, layer: int, position: str) -> Tensor:
    return model.model.blocks()[layer - 1].maps[position].beta.data


def set_betas(model: LanguageModel, size: float) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(".beta"):
            parameter.data = size * parameter.data.sign()


def forward(
    model: LanguageModel, plan: Plan, precision: str = "fp32", seed: int = 3, call: Any = None
) -> Tensor:
    model.recompute(plan)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        return (call or model)(random_tokens(2, 9, seed=seed), random_tokens(2, 9, seed=seed + 6))[
            0
        ]


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    """Of every trained parameter, none of the frozen ones; finite, and not all zeros."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, grad in grads.items():
        assert bool(grad.isfinite().all() and grad.any()), name
    return grads


def step(model: LanguageModel, plan: Plan, precision: str = "fp32", seed: int = 3) -> Result:
    model.zero_grad()
    loss = forward(model, plan, precision, seed)
    loss.backward()
    return loss.detach(), gradients(model)


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """The sign of a zero counts."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    one, other = (it.detach().contiguous().view(-1).view(torch.uint8) for it in (actual, expected))
    return torch.equal(one, other)


def assert_same(actual: Result, expected: Result, units: float = 0) -> None:
    """Bit for bit; with ``units`` the loss still, as nothing changes it, and gradients within so
    many units of rounding of the parameter's largest item; of all betas' (biases') for a beta or a
    bias, which are sums that may cancel."""
    assert actual[1].keys() == expected[1].keys()
    assert same_bits(actual[0], expected[0]), "loss"
    largest = {name: float(grad.abs().max()) for name, grad in expected[1].items()}
    for kind in (".beta", ".bias"):
        alike = [name for name in largest if name.endswith(kind)]
        largest |= dict.fromkeys(alike, max((largest[name] for name in alike), default=0.0))
    for name, grad in expected[1].items():
        if units:
            limit = units * UNIT[grad.dtype] * largest[name]
            assert float((actual[1][name] - grad).abs().max()) < limit, name
        else:
            assert same_bits(actual[1][name], grad), name


def assert_agree(actual: Result, expected: Result, plan: Plan) -> None:
    assert_same(actual, expected, INVERTED if plan.policy == "invert" else 0)


def intercept(
    patch: pytest.MonkeyPatch, model: LanguageModel, name: str, around: Callable[..., Tensor]
) -> None:
    """From now on every map's method of that name is called by ``around(call, layer, position,
    *arguments)``; layers count from 1."""
    places = {
        linear: (block.layer_idx + 1, position)
        for block in model.model.blocks()
        for position, linear in block.maps.items()
    }
    originals = {kind: getattr(kind, name) for kind in {type(module) for module in places}}
    for kind, original in originals.items():

        def method(self, *args, original=original):
            return around(functools.partial(original, self), *places[self], *args)

        patch.setattr(kind, name, method)


FROZEN: dict[str, Callable[[str], bool]] = {
    "nothing": lambda name: False,
    "betas": lambda name: name.endswith(".beta"),
    "factors": lambda name: name.endswith((".A", ".B")),
    "all-but-factors": lambda name: not name.endswith((".A", ".B")),
    "all-but-betas": lambda name: not name.endswith(".beta"),
    "embedding": lambda name: "embed" in name,
    "lower-half": lambda name: "embed" in name or "layers.0." in name or "layers.1." in name,
    "upper-half": lambda name: "layers.2." in name or "layers.3." in name,
    "all-but-head": lambda name: name != "lm_head.weight",
}


def freeze(model: LanguageModel, what: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not FROZEN[what](name))


def fail(*_: Any) -> None:
    raise ZeroDivisionError
