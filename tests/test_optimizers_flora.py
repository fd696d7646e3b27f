"""Flora beside its formula and beside torch's Adafactor, in fp64 to rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from crnet import optimizers
from crnet.errors import ConfigError
from crnet.optimizers._projection import gaussian, project, project_back, seed_of
from crnet.specs import Role, TensorSpec, normal
from test_optimizers import SETTINGS, SHAPES, alone, gradient, options_of

STEPS, EVERY, RANK = 20, 7, 3
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def of_seed(shape: tuple[int, ...], idx: int) -> Tensor:
    return gaussian(shape, RANK, seed_of(SETTINGS.seed, "w", idx)).double()


@pytest.mark.parametrize("shape", SHAPES, ids=["tall", "square", "wide"])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("projection", ["drawn", "kept"])
def test_flora_is_its_formula(shape: tuple[int, int], relative: bool, projection: str) -> None:
    """20 steps over two changes of the projection."""
    weight, optimizer = alone(
        "flora",
        shape,
        rank=RANK,
        refresh_every=EVERY,
        scale_parameter=relative,
        projection=projection,
    )
    w, is_tall, beta1 = weight.detach().clone(), shape[0] >= shape[1], SETTINGS.beta1
    row, col, c, idx = torch.zeros(()), torch.zeros(()), torch.zeros(()), 0

    def down(x: Tensor, p: Tensor) -> Tensor:
        return x @ p.T if is_tall else p @ x

    def up(x: Tensor, p: Tensor) -> Tensor:
        return (x @ p if is_tall else p.T @ x) if x.dim() else torch.zeros(shape)

    for step in range(1, STEPS + 1):
        g = weight.grad = gradient(shape, step, 3.0 if step % 5 == 0 else 1.0)
        beta2 = 1 - step**-0.8
        row = beta2 * row + (1 - beta2) * (g * g + 1e-30).mean(1)
        col = beta2 * col + (1 - beta2) * (g * g + 1e-30).mean(0)
        q = g / (torch.outer(row, col) / row.mean()).sqrt()
        p = of_seed(shape, idx)
        d = (1 - beta1) * q + beta1 * up(c, p)
        if step % EVERY == 0:
            idx += 1
            c = down(up(c, p), of_seed(shape, idx))
        c = beta1 * c + (1 - beta1) * down(q, of_seed(shape, idx))
        rate = SETTINGS.lr * (max(1e-3, float(rms(w))) if relative else 1.0)
        w = w * (1 - SETTINGS.lr * SETTINGS.weight_decay) - rate * d / max(1.0, float(rms(d)))
        optimizer.step()
        torch.testing.assert_close(weight.detach(), w, **CLOSE)
    assert idx == 2


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9,)])
def test_without_momentum_it_is_torchs_adafactor(shape: tuple[int, ...]) -> None:
    """A beta1 of next to nothing; torch's rate is capped by 1 / sqrt(step), far above this one.

    Gradients that grow make directions of more than unit size, which are shrunk."""
    settings = dataclasses.replace(SETTINGS, beta1=1e-300)
    weight, optimizer = alone("flora", shape, "factor_in", settings=settings)
    other = torch.nn.Parameter(weight.detach().clone())
    theirs = torch.optim.Adafactor(
        [other], lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay, eps=(1e-15, 1e-3)
    )
    for step in range(STEPS):
        weight.grad = gradient(shape, step, 2.0**step)
        other.grad = weight.grad.clone()
        optimizer.step()
        theirs.step()
        torch.testing.assert_close(weight, other, **CLOSE)


def test_what_comes_back_is_right_in_the_mean() -> None:
    """The mean of ``up(down(q))`` over 4,000 projections is q within 5 deviations: that of one is
    at most |q| sqrt(2 / rank)."""
    for shape in SHAPES:
        q = gradient(shape, 0)
        total = torch.zeros(shape, dtype=torch.float64)
        for seed in range(4000):
            p = gaussian(shape, RANK, seed).double()
            total += project_back(project(q, p), p, shape)
        bound = 5 * float(q.norm(dim=int(shape[0] >= shape[1])).max()) * (2 / RANK / 4000) ** 0.5
        assert float((total / 4000 - q).abs().max()) < bound


@pytest.mark.parametrize(
    ("role", "shape", "compressed"),
    [
        ("matrix", (16, 8), True),
        ("matrix", (32, 8), True),
        ("matrix", (33, 8), False),
        ("matrix", (8, 2), False),
        ("head", (16, 8), False),
        ("embedding", (16, 8), False),
        ("factor_in", (16, 8), False),
    ],
)
def test_matrices_of_moderate_aspect_are_compressed(
    role: Role, shape: tuple[int, int], compressed: bool
) -> None:
    weight, optimizer = alone("flora", shape, role, torch.bfloat16, rank=RANK)
    weight.grad = gradient(shape, 0).bfloat16()
    optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg"].shape == ((shape[0], RANK) if compressed else shape)
    assert state["row"].dtype == state["column"].dtype == torch.float32
    held = sum(each.nbytes for each in state.values() if torch.is_tensor(each))
    spec = TensorSpec(shape, role, normal(1.0))
    assert held == optimizers.get("flora").state_bytes(spec, options_of("flora", rank=RANK), 2)


def test_no_momentum_is_refused_and_named() -> None:
    with pytest.raises(ConfigError, match=r"--optimizer\.beta1 is 0"):
        alone("flora", (8, 8), settings=dataclasses.replace(SETTINGS, beta1=0.0))
    for changed, word in (({"rank": 0}, "rank"), ({"refresh_every": 0}, "refresh-every")):
        (problem,) = optimizers.get("flora").problems(options_of("flora", **changed))
        assert problem.startswith(f"--optimizer.flora.{word} is 0")
