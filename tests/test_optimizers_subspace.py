"""Adam in a subspace: GaLore's family beside formulas written from the papers.

The formulas take explicit products and torch's SVD, in fp64; the tolerance is rounding, where none
is named.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet import optimizers
from crnet.config.model_spec import model_spec
from crnet.config.presets import PRESETS
from crnet.config.serialize import override
from crnet.errors import ConfigError
from crnet.optimizers import Settings, _projection
from crnet.optimizers._norms import norm_of
from crnet.optimizers._projection import (
    leading,
    naive_leading,
    orthonormal,
    project,
    project_back,
    seed_of,
)
from crnet.optimizers._subspace import offsets
from crnet.optimizers._torch import adam_
from crnet.optimizers.dct_adamw.module import cosines, naive_transformed, transformed
from crnet.optimizers.fira.module import naive_rest_norms, rest_norms
from crnet.specs import Role, TensorSpec, normal
from test_optimizers import (
    SETTINGS,
    SHAPES,
    adam_directions,
    alone,
    gradient,
    make,
    options_of,
    rate_at,
    train,
    weights,
)

STEPS, EVERY, RANK = 20, 7, 3
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["tall", "square", "wide"])
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
"""The test's SVD and the eigenvectors in use are two ways to one projection."""


def singular(g: Tensor, rank: int) -> Tensor:
    """P of the paper: right vectors where a matrix is not wide, left ones else; signs as declared:
    the largest item of each is positive."""
    left, _, right = torch.linalg.svd(g)
    p = right[:rank] if g.shape[0] >= g.shape[1] else left.T[:rank]
    return torch.stack([each * each[each.abs().argmax()].sign() for each in p])


def down(g: Tensor, p: Tensor) -> Tensor:
    return g @ p.T if g.shape[0] >= g.shape[1] else p @ g


def up(r: Tensor, p: Tensor, shape: tuple[int, ...]) -> Tensor:
    return r @ p if shape[0] >= shape[1] else p.T @ r


class Formula:
    """A run of a method on one matrix, step by step, in a few products."""

    def __init__(self, weight: Tensor, rank: int, every: int, project: Callable[..., Tensor]):
        self.w, self.rank, self.every, self.project = weight.clone(), rank, every, project
        self.m = self.v = torch.zeros(())
        self.p: Tensor | None = None
        self.last: Tensor | None = None
        self.limited = 0

    def refresh(self, g: Tensor, step: int) -> bool:
        if (step - 1) % self.every:
            return False
        self.former, self.p = self.p, self.project(g, step)
        return self.former is not None

    def moments(self, r: Tensor) -> Tensor:
        self.m = SETTINGS.beta1 * self.m + (1 - SETTINGS.beta1) * r
        self.v = SETTINGS.beta2 * self.v + (1 - SETTINGS.beta2) * r * r
        return self.m / (self.v.sqrt() + SETTINGS.eps)

    def take(self, d: Tensor, step: int) -> None:
        self.w = self.w - rate_at(step) * d
        self.w = self.w - SETTINGS.lr * SETTINGS.weight_decay * self.w


def run(
    name: str,
    shape: tuple[int, int],
    formula: Callable[[Formula, Tensor, int], None],
    project: Callable[..., Tensor] | None = None,
    settings: Settings = SETTINGS,
    **changed: Any,
) -> Formula:
    """20 steps of both, compared after each."""
    options = {"rank": RANK, "refresh_every": EVERY} | changed
    weight, optimizer = alone(name, shape, settings=settings, **options)
    project = project or (lambda g, step: singular(g, options["rank"]))
    mine = Formula(weight.detach(), options["rank"], options["refresh_every"], project)
    for step in range(1, STEPS + 1):
        weight.grad = gradient(shape, step, 1.0 + 0.5 * math.sin(step))
        formula(mine, weight.grad, step)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), mine.w, **CLOSE)
    return mine


# --- pieces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [0.0, 0.25])
def test_the_fused_kernel_is_adam(lost: float) -> None:
    """Without a correction of the bias, and with torch's; a rate of 0 still decays."""
    w, g = gradient((5, 4), 0), gradient((5, 4), 1)
    m, v = gradient((5, 4), 2) * 0.1, gradient((5, 4), 3).square()
    for step, rate in itertools.product((math.inf, 3), (0.1, 0.0)):
        moved = [each.clone() for each in (w, m, v)]
        adam_(moved[0], g, *moved[1:], rate=rate, lost=lost, betas=(0.9, 0.99), eps=1e-3, step=step)
        first, second = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        u = first / (second.sqrt() + 1e-3)
        if step == 3:
            u = (first / (1 - 0.9**3)) / ((second / (1 - 0.99**3)).sqrt() + 1e-3)
        for found, wanted in zip(moved, ((1 - lost) * w - rate * u, first, second), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(64, 32), (32, 32), (32, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_leading_vectors_are_those_of_an_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Of singular values 1, 0.9, 0.81, ...: in fp32 nearer to those of an SVD in fp64 than the SVD
    in fp32 is."""
    left, right = (torch.linalg.qr(gradient((each, 32), each))[0] for each in shape)
    g = (left * 0.9 ** torch.arange(32.0, dtype=torch.float64)) @ right.T
    found, naive = leading(g.to(dtype), 8), naive_leading(g.to(dtype), 8)
    assert found.shape == (8, 32)
    assert found.dtype == dtype
    exact = naive_leading(g.to(dtype).double(), 8)
    error = float((found - exact).norm())
    if dtype == torch.float64:
        assert error < 1e-12
    elif dtype == torch.float32:
        assert error < 1e-6
        assert error < float((naive - exact).norm())
    else:
        assert error < 2**-8 * math.sqrt(8)
    assert bool((found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all())
    r = project(g.to(dtype), found)
    assert r.shape == ((shape[0], 8) if shape[0] >= shape[1] else (8, shape[1]))
    assert project_back(r, found, shape).shape == shape


def test_random_projections_are_orthonormal_and_uniform() -> None:
    """``P P^T = I``; the mean of ``P^T P`` over 2,000 draws is r / n within 5 deviations."""
    p = orthonormal((40, 12), 5, 7)
    assert p.shape == (5, 12)
    assert float((p @ p.T - torch.eye(5)).abs().max()) < 1e-14
    draws = torch.stack([orthonormal((8, 6), 2, seed) for seed in range(2000)])
    assert float((draws.mT @ draws).mean(0).sub(torch.eye(6) / 3).abs().max()) < 5 * 0.3 / 2000**0.5
    assert float(draws.mean(0).abs().max()) < 5 * 0.41 / 2000**0.5  # signs, too


# --- which tensors, and when ----------------------------------------------------------------------

FAMILY = ("galore", "golore", "fira", "dct-adamw", "gradnorm-lorp")
each_of_the_family = pytest.mark.parametrize("name", FAMILY)


@each_of_the_family
@pytest.mark.parametrize("role", ["matrix", "head", "embedding", "factor_in", "norm"])
def test_matrices_alone_are_projected(name: str, role: Role) -> None:
    weight, optimizer = alone(name, (9, 8), role, rank=2)
    weight.grad = gradient((9, 8), 0)
    optimizer.step()
    shape = optimizer.state[weight]["exp_avg"].shape
    assert shape == ((9, 2) if role == "matrix" else (9, 8))
    assert optimizers.get(name).whole(TensorSpec((9, 8), role, normal(1.0)), None) == (
        role == "matrix"
    )


@each_of_the_family
def test_others_are_adam(name: str) -> None:
    """Of GaLore's family, the decay after the step; of DCT-AdamW torch's own."""
    weight, optimizer = alone(name, (6, 5), role="embedding")
    expected = weight.detach().clone()
    other = torch.nn.Parameter(expected.clone())
    torchs = torch.optim.AdamW(
        [other], lr=SETTINGS.lr, eps=SETTINGS.eps, weight_decay=SETTINGS.weight_decay
    )
    gradients = [gradient((6, 5), step) for step in range(4)]
    for step, u in enumerate(adam_directions(gradients), start=1):
        weight.grad = other.grad = gradients[step - 1]
        optimizer.step()
        torchs.step()
        expected = (expected - rate_at(step) * u) * (1 - SETTINGS.lr * SETTINGS.weight_decay)
        wanted = other.detach() if name == "dct-adamw" else expected
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_staggered_refreshes_are_at_most_one_a_step() -> None:
    """At 130M: 84 matrices, 200 steps between two refreshes. Whatever the order, and in any part of
    the blocks."""
    config = override(PRESETS["llama-130m"][1], model={"linear": "full", "vocab_size": 100})
    spec = model_spec(config.model)
    names = [name for name, each in spec.tensors.items() if each.role == "matrix"]
    found = offsets(names, 200)
    assert len(names) == len(set(found.values())) == 84
    assert offsets(reversed(names), 200) == found
    later = [name for name in names if int(name.split(".")[2]) >= 6]
    assert len(later) == 42
    assert offsets(later, 200) == {name: found[name] for name in later}
    crowded = list(offsets(names, 10).values())
    assert max(crowded.count(each) for each in range(10)) <= math.ceil(84 / 10)


@pytest.mark.parametrize("name", ["galore", "fira"])
def test_a_staggered_matrix_is_refreshed_at_its_own_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crnet.optimizers._subspace import module

    calls: list[int] = []
    monkeypatch.setattr(
        module, "leading", lambda g, rank: calls.append(1) or _projection.leading(g, rank)
    )
    model, optimizer = make(name, options_of(name, rank=2, refresh_every=30, stagger=True))
    num = sum(spec.role == "matrix" for spec, _ in model.trained().values())
    assert num > 1
    a_step = []
    for step in range(61):
        calls.clear()
        train(model, optimizer, range(step, step + 1))
        a_step.append(len(calls))
    assert a_step[0] == num
    assert max(a_step[1:]) == 1
    assert sum(a_step[1:31]) == sum(a_step[31:]) == num - (1 if a_step[30] == 0 else 0)


def test_options_that_cannot_be_are_named() -> None:
    for name, changed, word in (
        ("galore", {"rank": 0}, "rank"),
        ("galore", {"scale": 0.0}, "scale"),
        ("galore8bit", {"min_items": 0}, "min-items"),
        ("golore", {"svd_frac": 1.5}, "svd-frac"),
        ("fira", {"growth_limit": 0.9}, "growth-limit"),
        ("fira", {"refresh_every": 0}, "refresh-every"),
        ("dct-adamw", {"stagger": True}, "stagger"),
    ):
        problems = optimizers.get(name).problems(options_of(name, **changed))
        assert len(problems) == 1
        assert problems[0].startswith(f"--optimizer.{name}.{word} ")


# --- GaLore ---------------------------------------------------------------------------------------


@each_shape
def test_galore_is_its_formula(shape: tuple[int, int]) -> None:
    def formula(it: Formula, g: Tensor, step: int) -> None:
        it.refresh(g, step)
        it.take(0.25 * up(it.moments(down(g, it.p)), it.p, shape), step)

    run("galore", shape, formula)


@each_shape
def test_galores_first_step_is_the_sign_of_the_projected_gradient(shape: tuple[int, int]) -> None:
    """``W - lr scale back(sign R)``, but for eps."""
    settings = Settings(**(vars(SETTINGS) | {"weight_decay": 0.0, "eps": 1e-12}))
    weight, optimizer = alone("galore", shape, rank=RANK, settings=settings)
    before, g = weight.detach().clone(), gradient(shape, 0)
    p = singular(g, RANK)
    weight.grad = g
    optimizer.step()
    wanted = before - SETTINGS.lr * 0.25 * up(down(g, p).sign(), p, shape)
    torch.testing.assert_close(weight.detach(), wanted, rtol=1e-7, atol=1e-9)


@each_shape
def test_galore_of_full_rank_is_adam_in_a_rotated_basis(shape: tuple[int, int]) -> None:
    weight, optimizer = alone("galore", shape, rank=99, scale=1.0)
    expected, gradients = weight.detach().clone(), [gradient(shape, step) for step in range(4)]
    p = singular(gradients[0], min(shape))
    assert p.shape == (8, 8)
    rotated = [down(each, p) for each in gradients]
    for step, u in enumerate(adam_directions(rotated), start=1):
        weight.grad = gradients[step - 1]
        optimizer.step()
        expected = expected - rate_at(step) * up(u, p, shape)
        expected = expected * (1 - SETTINGS.lr * SETTINGS.weight_decay)
        torch.testing.assert_close(weight.detach(), expected, **CLOSE)


# --- 8 bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_galore8bit_is_the_packages_step_on_the_projected_gradient(shape: tuple[int, int]) -> None:
    """The released way: bitsandbytes' own optimizer on a tensor of zeros, brought back. fp32."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.optim import AdamW8bit

    weight, optimizer = alone(
        "galore8bit", shape, dtype=torch.float32, rank=16, refresh_every=EVERY, min_items=1
    )
    mine = weight.detach().clone()
    zeros = torch.nn.Parameter(torch.zeros((40, 16) if shape[0] > 30 else (16, 40)))
    theirs = AdamW8bit([zeros], lr=SETTINGS.lr, eps=SETTINGS.eps, weight_decay=0, min_8bit_size=1)
    p = torch.zeros(())
    for step in range(STEPS):
        weight.grad = gradient(shape, step).float()
        if step % EVERY == 0:
            p = naive_leading(weight.grad.double(), 16).float()
        zeros.data.zero_()
        zeros.grad = down(weight.grad, p)
        theirs.step()
        mine += 0.25 * up(zeros.detach(), p, shape)
        mine *= 1 - SETTINGS.lr * SETTINGS.weight_decay
        optimizer.step()
    # A projected item that differs in its last bit may have another code.
    assert float((weight.detach() - mine).norm() / mine.norm()) < 1e-4
    assert optimizer.state[weight]["exp_avg"].dtype == torch.uint8


def test_galore8bit_is_near_galore() -> None:
    pytest.importorskip("bitsandbytes")
    found = {}
    for name, more in (("galore", {}), ("galore8bit", {"min_items": 1})):
        weight, optimizer = alone(name, (64, 40), dtype=torch.float32, rank=16, **more)
        start = weight.detach().clone()
        for step in range(STEPS):
            weight.grad = gradient((64, 40), step).float()
            optimizer.step()
        found[name] = weight.detach() - start
    error = (found["galore"] - found["galore8bit"]).norm() / found["galore"].norm()
    assert 0 < error < 0.05


@pytest.mark.parametrize(
    ("role", "shape", "narrow"),
    [
        ("matrix", (2048, 4), True),  # 2 x 2048 projected items
        ("matrix", (1024, 1024), False),
        ("factor_in", (64, 64), True),
        ("factor_in", (63, 64), False),
        ("head", (128, 64), False),
        ("embedding", (128, 64), False),
    ],
)
def test_galore8bit_counts_the_items_of_moments(
    role: Role, shape: tuple[int, int], narrow: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    weight, optimizer = alone("galore8bit", shape, role, torch.float32, rank=2)
    weight.grad = torch.ones(shape)
    optimizer.step()
    state = optimizer.state[weight]
    assert (state["exp_avg"].dtype == torch.uint8) == narrow
    spec = TensorSpec(shape, role, normal(1.0))
    held = sum(each.nbytes for each in state.values() if torch.is_tensor(each))
    assert held == optimizers.get("galore8bit").state_bytes(
        spec, options_of("galore8bit", rank=2), 4
    )


def test_without_the_package_galore8bit_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in {"bitsandbytes", *(it for it in sys.modules if it.startswith("bitsandbytes."))}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"galore8bit needs .* pip install 'crnet\[optim8bit\]'"):
        alone("galore8bit", (4, 4))


# --- GoLore ---------------------------------------------------------------------------------------

HALF = Settings(**(vars(SETTINGS) | {"num_steps": STEPS}))


def golore_projection(shape: tuple[int, int]) -> Callable[..., Tensor]:
    """Singular vectors up to step 10 of 20, that is at 1 and 8; random ones at 15."""

    def of(g: Tensor, step: int) -> Tensor:
        if step <= 10:
            return singular(g, RANK)
        return orthonormal(shape, RANK, seed_of(SETTINGS.seed, "w", step))

    return of


@each_shape
def test_golore_is_its_formula(shape: tuple[int, int]) -> None:
    def formula(it: Formula, g: Tensor, step: int) -> None:
        if it.refresh(g, step):
            it.m = down(up(it.m, it.former, shape), it.p)
        it.take(up(it.moments(down(g, it.p)), it.p, shape), step)

    run("golore", shape, formula, golore_projection(shape), HALF, svd_frac=0.5)


@each_shape
def test_released_golore_loses_the_moved_moment(shape: tuple[int, int]) -> None:
    def formula(it: Formula, g: Tensor, step: int) -> None:
        moved = it.refresh(g, step)
        kept = it.m
        if moved:
            it.m = down(up(it.m, it.former, shape), it.p)
        it.take(up(it.moments(down(g, it.p)), it.p, shape), step)
        if moved:
            it.m = kept

    run("golore", shape, formula, golore_projection(shape), HALF, svd_frac=0.5, moments="released")


@pytest.mark.parametrize("svd_frac", [0.0, 0.5, 1.0])
def test_golore_draws_from_its_share_of_the_steps_on(
    svd_frac: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update count of a step is one less than its number: random from svd_frac T on."""
    from crnet.optimizers.golore import module

    drawn: list[int] = []
    monkeypatch.setattr(
        module, "orthonormal", lambda *given: drawn.append(step) or orthonormal(*given)
    )
    weight, optimizer = alone(
        "golore", (9, 8), rank=2, refresh_every=1, svd_frac=svd_frac, settings=HALF
    )
    for step in range(1, STEPS + 1):
        weight.grad = gradient((9, 8), step)
        optimizer.step()
    assert drawn == list(range(int(svd_frac * STEPS) + 1, STEPS + 1))


# --- Fira -----------------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("residual", ["paper", "released"])
def test_fira_is_its_formula(shape: tuple[int, int], residual: str) -> None:
    side = 1 if shape[0] >= shape[1] else 0

    def formula(it: Formula, g: Tensor, step: int) -> None:
        it.refresh(g, step)
        r = down(g, it.p)
        u = it.moments(r)
        phi = u.norm(dim=side, keepdim=True) / (r.norm(dim=side, keepdim=True) + 1e-8)
        rest = phi * (g - (1.0 if residual == "paper" else 0.25) * up(r, it.p, shape))
        if it.last is not None and rest.norm() / (it.last + 1e-8) > 1.01:
            rest = rest * 1.01 * (it.last + 1e-8) / rest.norm()
            it.limited += 1
        it.last = rest.norm()
        it.take(0.25 * up(u, it.p, shape) + rest, step)

    assert 0 < run("fira", shape, formula, residual=residual).limited < STEPS - 1


@each_shape
def test_firas_rest_is_orthogonal_to_the_projection(shape: tuple[int, int]) -> None:
    """The step that is no GaLore's, in the paper's form; in the released one a part is not."""
    for residual, is_orthogonal in (("paper", True), ("released", False)):
        found = []
        for name in ("galore", "fira"):
            more = {"residual": residual} if name == "fira" else {}
            weight, optimizer = alone(name, shape, rank=RANK, **more)
            weight.grad = gradient(shape, 0)
            optimizer.step()
            found.append(weight.detach().clone())
        p = optimizer.state[weight]["projection"]
        rest = found[1] - found[0]
        inside = float(down(rest, p).norm() / rest.norm())
        assert (inside < 1e-10) == is_orthogonal, inside


@each_shape
def test_fira_of_full_rank_has_no_rest(shape: tuple[int, int]) -> None:
    found = []
    for name in ("galore", "fira"):
        weight, optimizer = alone(name, shape, rank=8, scale=1.0)
        for step in range(3):
            weight.grad = gradient(shape, step)
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_fira_limits_growth_exactly() -> None:
    """Gradients that grow tenfold: norms grow by 1.01 a step, but for the 1e-8 in the ratio."""
    weight, optimizer = alone("fira", (6, 5), rank=2, refresh_every=1)
    norms = []
    for step in range(4):
        weight.grad = gradient((6, 5), 0, 10.0**step)
        optimizer.step()
        norms.append(float(optimizer.state[weight]["norm"]))
    for low, high in itertools.pairwise(norms):
        assert high / low == pytest.approx(1.01, rel=1e-7)


# --- DCT-AdamW ------------------------------------------------------------------------------------


def test_cosines_are_an_orthogonal_matrix_of_the_formula() -> None:
    """Of the inverse transform: a constant vector is sqrt(n) of the first item of each column."""
    for size in (1, 2, 7, 12):
        q = cosines(size, torch.device("cpu"), torch.float64).T
        assert float((q.T @ q - torch.eye(size)).abs().max()) < 1e-14
        for i, j in itertools.product(range(size), repeat=2):
            wanted = math.sqrt(2 / size) * math.cos(math.pi * i * (2 * j + 1) / (2 * size))
            assert float(q[i, j]) == pytest.approx(wanted * (0.5**0.5 if i == 0 else 1), abs=1e-14)


@each_shape
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("every", [1, 3])
def test_dct_adamw_is_its_formula(shape: tuple[int, int], rotate: bool, every: int) -> None:
    """With the rotation as a product; AdamW with the decay before the step."""
    q, is_tall = cosines(8, torch.device("cpu"), torch.float64).T, shape[0] >= shape[1]
    moved = 0

    def chosen(g: Tensor, step: int) -> Tensor:
        norms = (g @ q).abs().sum(0) if is_tall else (q.T @ g).abs().sum(1)
        largest = sorted(sorted(range(8), key=lambda idx: -norms[idx])[:RANK])
        return q[:, largest].T

    def formula(it: Formula, g: Tensor, step: int) -> None:
        nonlocal moved
        if it.refresh(g, step) and rotate:
            turn = it.former @ it.p.T
            moved += not torch.allclose(turn, torch.eye(RANK, dtype=turn.dtype))
            it.m = it.m @ turn if is_tall else turn.T @ it.m
            it.v = (it.v @ turn if is_tall else turn.T @ it.v).abs()
        it.moments(down(g, it.p))
        m, v = it.m / (1 - SETTINGS.beta1**step), it.v / (1 - SETTINGS.beta2**step)
        d = up(m / (v.sqrt() + SETTINGS.eps), it.p, shape)
        it.w = it.w * (1 - SETTINGS.lr * SETTINGS.weight_decay) - SETTINGS.lr * d

    run("dct-adamw", shape, formula, chosen, refresh_every=every, rotate=rotate)
    assert moved > 2 or not rotate


def test_dct_adamw_keeps_indices_alone() -> None:
    weight, optimizer = alone("dct-adamw", (12, 8), dtype=torch.bfloat16, rank=RANK)
    weight.grad = gradient((12, 8), 0).bfloat16()
    optimizer.step()
    saved = optimizer.state_dict()
    optimizers.load_state(optimizer, saved)
    state = optimizer.state[weight]
    assert {key for key, each in state.items() if torch.is_tensor(each)} == {
        "exp_avg",
        "exp_avg_sq",
        "indices",
    }
    assert state["indices"].dtype == torch.int32
    assert state["indices"].tolist() == sorted(set(state["indices"].tolist()))


@each_of_the_family
def test_a_missing_gradient_is_passed_over(name: str) -> None:
    model, optimizer = make(name, options_of(name, rank=2))
    train(model, optimizer, range(1))
    before = weights(model)
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(each, before[key]) for key, each in weights(model).items())
    assert {state["step"] for state in optimizer.state.values()} == {1}


# --- GradNormLoRP ---------------------------------------------------------------------------------


@each_shape
def test_gradnorm_lorp_is_its_formula(shape: tuple[int, int]) -> None:
    """With v and the lengths as tensors of their own, gradients by autograd through the
    normalised matrix, and the decay on the lengths."""
    start, _ = alone("gradnorm-lorp", shape)
    v = start.detach().clone()
    length = v.norm(dim=1, keepdim=True)
    found: list[Tensor] = []  # directions of the lengths are those of gradients so far
    gradients: list[Tensor] = []

    def formula(it: Formula, g: Tensor, step: int) -> None:
        nonlocal v, length
        v.requires_grad_(True)
        length.requires_grad_(True)
        w = length * v / v.norm(dim=1, keepdim=True)
        of_v, of_length = torch.autograd.grad(w, (v, length), g)
        v, length = v.detach(), length.detach()
        gradients.append(of_length)
        found[:] = adam_directions(gradients)
        it.refresh(of_v, step)
        v = v - rate_at(step) * 0.25 * up(it.moments(down(of_v, it.p)), it.p, shape)
        kept = 1 - SETTINGS.lr * SETTINGS.weight_decay
        length = (length - rate_at(step) * found[-1]) * kept
        it.w = length * v / v.norm(dim=1, keepdim=True)

    run("gradnorm-lorp", shape, formula)
    assert float((v.norm(dim=1) / start.detach().norm(dim=1) - 1).abs().max()) > 1e-4


def test_gradnorm_lorp_moves_lengths_and_directions_apart() -> None:
    """A gradient along the rows changes lengths alone, one across them directions alone."""
    settings = Settings(**(vars(SETTINGS) | {"weight_decay": 0.0}))
    for along in (True, False):
        weight, optimizer = alone("gradnorm-lorp", (9, 8), rank=RANK, settings=settings)
        before = weight.detach().clone()
        unit = before / before.norm(dim=1, keepdim=True)
        g = gradient((9, 8), 0)
        inside = (g * unit).sum(1, keepdim=True) * unit
        weight.grad = before.clone() if along else g - inside
        optimizer.step()
        lengths = weight.detach().norm(dim=1) / before.norm(dim=1) - 1
        turned = weight.detach() / weight.detach().norm(dim=1, keepdim=True) - unit
        assert (float(lengths.abs().max()) > 1e-4) == along
        assert (float(turned.abs().max()) > 1e-5) == (not along)


def test_gradnorm_lorp_refuses_a_row_of_zeros() -> None:
    weight, optimizer = alone("gradnorm-lorp", (4, 3))
    weight.data[2] = 0
    weight.grad = gradient((4, 3), 0)
    with pytest.raises(ConfigError, match="w has a row of zeros"):
        optimizer.step()


@pytest.mark.parametrize("size", [1, 2, 3, 8, 12, 101, 768])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_fast_transform_is_the_product(size: int, dtype: torch.dtype) -> None:
    """Rounding of fp32, or of the cosines' angles in fp64; bf16 is read, and added up in fp32."""
    x = gradient((5, size), 1).to(dtype)
    found, places = transformed(x)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert sorted(places.tolist()) == list(range(size))
    wanted = naive_transformed(x.double())
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found[:, places].double(), wanted, rtol=0, atol=tolerance)


@each_shape
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_norms_of_firas_rest_are_those_of_the_rest(shape: tuple[int, int], share: float) -> None:
    """Without the rest, fp64 and fp32; bf16, whose P is not orthonormal, makes it."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.0)):
        g = gradient(shape, 2).to(dtype)
        p = leading(g, RANK)
        r = project(g, p)
        side = int(shape[0] >= shape[1])
        found = rest_norms(g, r, p, norm_of(r, side), share)
        wanted = naive_rest_norms(g, r, p, share)
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_firas_rest_of_nothing_is_a_number() -> None:
    """A gradient that lies in its subspace: rounding may put the square below 0."""
    g = gradient((12, 2), 1).float() @ gradient((2, 8), 2).float()
    p = leading(g, 2)
    r = project(g, p)
    found = rest_norms(g, r, p, norm_of(r, 1), 1.0)
    assert float(found.max()) < 2e-3 * float(norm_of(g, None))
    assert bool((found >= 0).all())
