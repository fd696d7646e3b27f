"""Optimizers beside other people's packages: 20 steps of one matrix, the same gradients.

The packages are the extra ``oracles``, and apollo-torch, whose licence (CC BY-NC) keeps it out of
that; without them the tests are skipped. What is random or a
library's choice (the numbers of a projection, signs of singular vectors) comes from one function
for both sides. Where a package goes another way, that is said, put into it or into the options, and
without it the two are told apart. fp64, and rounding where no tolerance is named.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet.optimizers import Settings
from crnet.optimizers._newton_schulz import naive_orthogonalised
from crnet.optimizers._projection import gaussian, leading, seed_of
from crnet.optimizers.normuon import module as normuon
from test_optimizers import SETTINGS, SHAPES, alone, gradient

STEPS, EVERY, RANK = 20, 7, 3
LR, DECAY = SETTINGS.lr, SETTINGS.weight_decay
BETAS = (SETTINGS.beta1, SETTINGS.beta2)
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["tall", "square", "wide"])

Make = Callable[[Tensor], torch.optim.Optimizer]
"""A package's optimizer of one parameter."""


MEND = dict.fromkeys(("pytorch_optimizer", "galore_torch"), "'crnet[oracles]'")
MEND["apollo_torch"] = "apollo-torch"


@functools.cache
def package(name: str) -> ModuleType:
    """A module of a package. Skips where it, or what it imports itself, is missing."""
    try:
        return pytest.importorskip(
            name, reason=f"no {name}: pip install {MEND[name.split('.')[0]]}"
        )
    except (ImportError, RuntimeError) as error:  # bitsandbytes where it has no library
        pytest.skip(f"{name} cannot be imported: {error}")


def spiky(shape: tuple[int, ...], step: int) -> Tensor:
    """Gradients of changing size; every sixth has an item a hundred times as large."""
    found = gradient(shape, step, 1 + 0.5 * math.sin(step))
    if step % 6 == 5:
        found.view(-1)[step % found.numel()] *= 100
    return found


def apart(
    make: Make,
    name: str,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float64,
    settings: Settings = SETTINGS,
    tolerance: Mapping[str, float] = CLOSE,
    **options: Any,
) -> int:
    """Train both; the first step after which they differ by more than rounding, 0: none."""
    ours, optimizer = alone(name, shape, dtype=dtype, settings=settings, **options)
    theirs = torch.nn.Parameter(ours.detach().clone())
    other = make(theirs)
    first = ours.detach().clone()
    for step in range(1, STEPS + 1):
        given = spiky(shape, step).to(dtype)
        ours.grad, theirs.grad = given.clone(), given.clone()
        optimizer.step()
        other.step()
        if not torch.allclose(ours, theirs, **tolerance):
            return step
    assert float((ours.detach() - first).abs().max()) > 1e-3, "nothing moved"
    return 0


def of(module: str, name: str, **options: Any) -> Make:
    """An optimizer of a package on one group."""
    made = getattr(package(module), name)
    return lambda parameter: made([parameter], **options)


# --- pytorch_optimizer ----------------------------------------------------------------------------

KOZISTR = "pytorch_optimizer"


@each_shape
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.0, False)])
def test_sgd(shape: tuple[int, ...], momentum: float, nesterov: bool) -> None:
    """Decoupled decay, as ours."""
    told = {"momentum": momentum, "nesterov": nesterov}
    make = of(KOZISTR, "SGDW", lr=LR, weight_decay=DECAY, **told)
    assert apart(make, "sgd", shape, **told) == 0
    assert apart(make, "sgd", shape, momentum=0.5) > 0


@each_shape
def test_lion(shape: tuple[int, ...]) -> None:
    make = of(KOZISTR, "Lion", lr=LR, betas=(0.9, 0.99), weight_decay=DECAY)
    assert apart(make, "lion", shape) == 0
    assert apart(make, "lion", shape, beta2=0.9) > 0


@each_shape
def test_adafactor_of_the_relative_rate(shape: tuple[int, ...]) -> None:
    """Its relative rate is never above 0.01, whatever the rate, and decays by that times the size
    of the weight; ours by the rate alone, so that there is none here."""
    settings = without_decay(lr=0.01)
    told = {"betas": (0.0, 0.9999), "scale_parameter": True, "relative_step": True}
    make = of(KOZISTR, "AdaFactor", momentum_dtype=torch.float64, **told)
    assert apart(make, "adafactor", shape, settings=settings) == 0
    assert apart(make, "adafactor", shape, settings=without_decay(lr=0.02)) == 1


@each_shape
def test_adafactor_with_a_momentum(shape: tuple[int, ...]) -> None:
    """Its momentum is of steps, the rate in them; ours of directions, and a fixed rate is the same
    for both."""
    make = of(
        KOZISTR,
        "AdaFactor",
        lr=LR,
        betas=(0.9, 0.9999),
        scale_parameter=False,
        relative_step=False,
        weight_decay=DECAY,
        momentum_dtype=torch.float64,
    )
    assert apart(make, "adafactor", shape, rate="fixed", beta1=0.9) == 0
    assert apart(make, "adafactor", shape, rate="fixed", beta1=0.0) == 1


def without_decay(**changed: Any) -> Settings:
    return dataclasses.replace(SETTINGS, weight_decay=0.0, **changed)


@each_shape
def test_stable_spam(shape: tuple[int, ...]) -> None:
    """Restarts as ours, not as the authors' code."""
    make = of(
        KOZISTR,
        "StableSPAM",
        lr=LR,
        betas=BETAS,
        eps=SETTINGS.eps,
        weight_decay=DECAY,
        update_proj_gap=EVERY,
    )
    assert apart(make, "stable-spam", shape, reset_every=EVERY) == 0
    assert apart(make, "stable-spam", shape, reset_every=EVERY, released=True) == EVERY


def group_of_muon(module: str, name: str, **told: Any) -> Make:
    made = getattr(package(module), name)
    group = {"use_muon": True, "lr": LR, "weight_decay": DECAY, **told}
    return lambda parameter: made([{"params": [parameter], **group}])


@each_shape
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon(shape: tuple[int, ...], adjust: str) -> None:
    make = group_of_muon(KOZISTR, "Muon", use_adjusted_lr=adjust == "match_rms_adamw")
    assert apart(make, "muon", shape, adjust_lr_fn=adjust) == 0
    assert apart(make, "muon", shape, adjust_lr_fn=adjust, momentum=0.9) > 0


@each_shape
def test_normuon(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the paper's and the authors' form. Its eps is set to ours. Its iterations are in bf16,
    as ours on a GPU: here they are put into our step. Our sums of their squares are in fp32."""
    monkeypatch.setattr(
        normuon, "orthogonalised", lambda x, steps: naive_orthogonalised(x.bfloat16(), steps)
    )
    paper = group_of_muon(KOZISTR, "NorMuon", nesterov=False, update_scale="match_rms", eps=1e-8)
    code = group_of_muon(KOZISTR, "NorMuon", eps=1e-8)
    near = {"rtol": 1e-6, "atol": 1e-7}
    assert apart(paper, "normuon", shape, tolerance=near) == 0
    assert apart(code, "normuon", shape, tolerance=near, released=True) == 0
    assert apart(code, "normuon", shape, tolerance=near) == 1


def one_projection(monkeypatch: pytest.MonkeyPatch, projector: Any) -> None:
    """Give a package the singular vectors with our signs: moments outlive a refresh, and so does a
    sign in them. It takes singular vectors in fp32."""

    def vectors(self: Any, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        p = leading(weights, self.rank)
        return p if weights.shape[0] >= weights.shape[1] else p.T

    monkeypatch.setattr(projector, "get_orthogonal_matrix", vectors)


FIRA = {"rank": RANK, "update_proj_gap": EVERY, "scale": 0.25, "projection_type": "std"}


@each_shape
def test_fira(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' rest. It counts steps from 1 where it looks whether a refresh is due: the second
    comes a step before its time, and later ones too."""
    projector = package(f"{KOZISTR}.optimizer.utils.galore").GaLoreProjector
    one_projection(monkeypatch, projector)
    make = of_group(KOZISTR, "Fira", FIRA, lr=LR, betas=BETAS, eps=SETTINGS.eps, weight_decay=DECAY)
    options = {"rank": RANK, "refresh_every": EVERY, "residual": "released"}
    assert apart(make, "fira", shape, **options) == EVERY
    project = projector.project
    monkeypatch.setattr(
        projector,
        "project",
        lambda self, grad, count, **more: project(self, grad, count - 1, **more),
    )
    assert apart(make, "fira", shape, **options) == 0
    assert apart(make, "fira", shape, **options | {"residual": "paper"}) == 1


def of_group(module: str, name: str, group: dict[str, Any], **options: Any) -> Make:
    """An optimizer whose options of a projection are its group's."""
    made = getattr(package(module), name)
    return lambda parameter: made([{"params": [parameter], **group}], **options)


# --- galore_torch ---------------------------------------------------------------------------------

ADAM = {"lr": LR, "betas": BETAS, "eps": SETTINGS.eps, "weight_decay": DECAY}
GALORE = {"rank": RANK, "update_proj_gap": EVERY, "scale": 0.25, "proj_type": "std"}


@each_shape
def test_galore(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of GaLore's authors."""
    made = package("galore_torch.adamw")
    one_projection(monkeypatch, sys.modules["galore_torch.galore_projector"].GaLoreProjector)
    make = of_group(made.__name__, "AdamW", GALORE, no_deprecation_warning=True, **ADAM)
    assert apart(make, "galore", shape, rank=RANK, refresh_every=EVERY) == 0
    assert apart(make, "galore", shape, rank=RANK, refresh_every=EVERY - 1) == EVERY


@each_shape
def test_galore_with_its_own_singular_vectors(shape: tuple[int, int]) -> None:
    """Up to the first refresh, over which signs live on. fp32; an SVD and our way to the vectors
    differ by its rounding."""
    group = GALORE | {"update_proj_gap": 200}
    make = of_group("galore_torch.adamw", "AdamW", group, no_deprecation_warning=True, **ADAM)
    told = {"dtype": torch.float32, "tolerance": {"rtol": 1e-3, "atol": 1e-5}}
    assert apart(make, "galore", shape, rank=RANK, **told) == 0
    assert apart(make, "galore", shape, rank=RANK + 1, **told) == 1


# --- apollo_torch ---------------------------------------------------------------------------------


def our_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the package our random numbers, which follow from seed, name and refresh."""
    projector = package("apollo_torch.random_projector").GradientProjector
    counts: dict[int, int] = {}

    def drawn(self: Any, full: Tensor, rank: int, type: str, seed: int) -> Tensor:
        refresh_idx = counts[id(self)] = counts.get(id(self), -1) + 1
        self.kept = self  # so that no other one gets this id
        name_seed = seed_of(SETTINGS.seed, "w", refresh_idx)
        p = gaussian(tuple(full.shape), rank, name_seed, dtype=full.dtype)
        return p if type == "right" else p.T

    monkeypatch.setattr(projector, "get_orthogonal_matrix", drawn)


@each_shape
@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize(("name", "scales"), [("apollo", "channel"), ("apollo-mini", "tensor")])
def test_apollo(
    shape: tuple[int, int], front: bool, name: str, scales: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package of APOLLO's authors."""
    our_draws(monkeypatch)
    rank, scale = (RANK, 4.0) if name == "apollo" else (1, 128.0)
    group = {"rank": rank, "update_proj_gap": EVERY, "scale": scale, "proj_type": "std"}
    group |= {"proj": "random", "scale_type": scales}
    make = of_group("apollo_torch.apollo", "AdamW", group, scale_front=front, **ADAM)
    options = {"refresh_every": EVERY, "scale": scale, "rank": rank, "scale_front": front}
    assert apart(make, name, shape, **options) == 0
    assert apart(make, name, shape, **options | {"refresh_every": EVERY - 1}) == EVERY
    assert apart(make, name, shape, **options | {"growth_limit": 0.0, "scale_front": False}) > 1


def test_apollos_numbers_are_the_packages() -> None:
    """To the bit, for one seed and a matrix that is projected from the right."""
    projector = package("apollo_torch.random_projector").GradientProjector(RANK)
    drawn = projector.get_orthogonal_matrix(torch.zeros(9, 5), RANK, type="right", seed=11)
    torch.testing.assert_close(gaussian((9, 5), RANK, 11), drawn, rtol=1e-6, atol=0)
