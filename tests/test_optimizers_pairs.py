"""Optimizers that step both factors of a map together, beside their papers' formulas.

fp64, tall and wide maps: rounding alone, where no other tolerance is named.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet import linears, optimizers
from crnet.config.check import check
from crnet.config.presets import PRESETS
from crnet.config.serialize import override
from crnet.errors import ConfigError
from crnet.measure import examples as small
from crnet.optimizers import _low_precision as low_precision
from crnet.optimizers._low_precision import module as lending
from crnet.optimizers._newton_schulz import COEFFICIENTS, through_gram
from crnet.optimizers._projection import seed_of
from crnet.optimizers._sharing import owners, pairs
from crnet.optimizers.loro_adam.module import exact_step
from crnet.specs import TensorSpec, constant
from test_optimizers import SETTINGS, options_of

STEPS = 20
LR, DECAY = SETTINGS.lr, SETTINGS.weight_decay
RANK = 3
PAIRED = [name for name in optimizers.names() if optimizers.get(name).steps_pairs]
each_shape = pytest.mark.parametrize("shape", [(12, 5), (5, 12)], ids=["tall", "wide"])
each_name = pytest.mark.parametrize("name", PAIRED)
Pair = tuple[Tensor, Tensor]


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def factors(shape: tuple[int, int], seed: int = 0) -> Pair:
    return drawn((shape[0], RANK), 10 + seed), drawn((RANK, shape[1]), 20 + seed)


def gradients(shape: tuple[int, int], step: int, pair: Pair) -> Pair:
    """Of the factors, from one of the map."""
    g = drawn(shape, 100 + step)
    return g @ pair[1].T, pair[0].T @ g


def specs_of(pair: Pair, lr_factor: float = 1.0) -> dict[str, TensorSpec]:
    make = dataclasses.replace
    one = TensorSpec(tuple(pair[0].shape), "factor_in", constant(0.0), partner="B")
    other = TensorSpec(tuple(pair[1].shape), "factor_out", constant(0.0), partner="A")
    return {
        "x.A": make(one, lr_factor=lr_factor),
        "x.B": make(other, lr_factor=lr_factor),
    }


def made(
    name: str, pair: Pair, *, lr_factor: float = 1.0, settings: Any = SETTINGS, **changed: Any
) -> tuple[Pair, torch.optim.Optimizer]:
    """The pair as parameters, and their optimizer."""
    parameters = [torch.nn.Parameter(each.clone()) for each in pair]
    given = {
        each: (spec, parameter)
        for (each, spec), parameter in zip(
            specs_of(pair, lr_factor).items(), parameters, strict=True
        )
    }
    built = optimizers.get(name).build(given, options_of(name, **changed), settings)
    return (parameters[0], parameters[1]), built


def run(
    name: str, shape: tuple[int, int], steps: int = STEPS, change: Tensor | None = None, **more: Any
) -> list[Pair]:
    """Both factors after every step, whose gradients are of a map's that is the same in every
    run; ``change``: they are at first ``A Q`` and ``Q^-1 B``."""
    pair = factors(shape)
    if change is not None:
        pair = pair[0] @ change, torch.linalg.inv(change) @ pair[1]
    parameters, optimizer = made(name, pair, **more)
    found = []
    for step in range(1, steps + 1):
        values = (parameters[0].detach(), parameters[1].detach())
        for parameter, g in zip(parameters, gradients(shape, step, values), strict=True):
            parameter.grad = g
        kept = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        optimizer.step()
        for parameter, g in zip(parameters, kept, strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, g), "a step leaves gradients alone"
        found.append((parameters[0].detach().clone(), parameters[1].detach().clone()))
    return found


def assert_close(found: list[Pair], wanted: list[Pair], tol: float = 1e-10) -> None:
    for step, (one, other) in enumerate(zip(found, wanted, strict=True), start=1):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=tol, atol=tol, msg=f"step {step}")


def msign(x: Tensor) -> Tensor:
    """Five iterations on the matrix itself, singular value by singular value."""
    a, b, c = COEFFICIENTS
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(40, 7), (7, 7)])
def test_iterations_through_a_gram_matrix_are_those_on_the_matrix(shape: tuple[int, int]):
    """fp64; and in fp32 of a matrix whose singular values lie 1e4 apart."""
    x = drawn(shape, 1)
    torch.testing.assert_close(x @ through_gram(x.T @ x), msign(x), rtol=0, atol=1e-10)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    steep = u @ torch.diag(torch.logspace(0, -4, 7, dtype=torch.float64)) @ v
    low = steep.float()
    found = low @ through_gram(low.T @ low)
    torch.testing.assert_close(found.double(), msign(steep), rtol=0, atol=5e-3)
    zeros = torch.zeros(shape)
    assert torch.equal(zeros @ through_gram(zeros.T @ zeros), zeros)


# --- LORO -----------------------------------------------------------------------------------------


def truncated(w: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(w)
    return u[:, :RANK] @ torch.diag(s[:RANK]) @ v[:RANK]


def riemannian(pair: Pair, g: Tensor, rate: float) -> Tensor:
    """On the composed matrix: its gradient in the tangent space, then the nearest of rank R."""
    w = pair[0] @ pair[1]
    u, _, v = torch.linalg.svd(w)
    pu, pv = u[:, :RANK] @ u[:, :RANK].T, v[:RANK].T @ v[:RANK]
    return truncated(w - rate * (pu @ g + g @ pv - pu @ g @ pv))


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7), (4, 3)])
@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_an_exact_step_is_that_of_the_composed_matrix(shape: tuple[int, int], rate: float):
    """With the factors' own gradients; also where 2 R is above a side of the map."""
    pair, g = factors(shape), drawn(shape, 5)
    new = exact_step(*pair, g @ pair[1].T, pair[0].T @ g, rate)
    torch.testing.assert_close(new[0] @ new[1], riemannian(pair, g, rate), rtol=0, atol=1e-10)
    torch.testing.assert_close(new[0].T @ new[0], new[1] @ new[1].T, rtol=0, atol=1e-10)


def test_an_exact_step_hangs_on_the_map_alone():
    """Factors of one product, far from balanced: the same factors afterwards, but for a rotation;
    fp32 agrees with fp64."""
    shape = (12, 5)
    (a, b), g, change = factors(shape), drawn(shape, 5), drawn((RANK, RANK), 6) * 30
    others = a @ change, torch.linalg.inv(change) @ b
    one = exact_step(a, b, g @ b.T, a.T @ g, 0.1)
    other = exact_step(*others, g @ others[1].T, others[0].T @ g, 0.1)
    torch.testing.assert_close(one[0] @ one[1], other[0] @ other[1], rtol=0, atol=1e-10)
    single = exact_step(*(each.float() for each in (a, b, g @ b.T, a.T @ g)), 0.1)
    assert single[0].dtype == torch.float32
    torch.testing.assert_close((single[0] @ single[1]).double(), one[0] @ one[1], rtol=0, atol=1e-4)


def test_an_exact_step_from_a_factor_of_zeros():
    """Finite, and the one that the known half of the gradient gives."""
    (a, b), g = factors((12, 5)), drawn((12, 5), 5)
    new = exact_step(a, 0 * b, 0 * g @ b.T, a.T @ g, 0.1)
    u, _ = torch.linalg.qr(a)
    torch.testing.assert_close(new[0] @ new[1], truncated(-0.1 * u @ u.T @ g), rtol=0, atol=1e-10)


@each_shape
def test_loro_is_its_formula(shape: tuple[int, int]):
    """Adam's steps at the scaled rate, an exact step at the base rate every sixth, all moments 0
    afterwards: products, as factors have a rotation to choose."""
    every, lr_factor = 6, 0.25
    found = run("loro-adam", shape, exact_every=every, lr_factor=lr_factor)
    pair, count = list(factors(shape)), 0
    moments = [[torch.zeros_like(each), torch.zeros_like(each)] for each in pair]
    beta1, beta2 = SETTINGS.beta1, SETTINGS.beta2
    for step in range(1, STEPS + 1):
        count += 1
        lr = LR * math.sqrt(1 - beta2**count) / (1 - beta1**count)
        steps = []
        for g, (m, v) in zip(gradients(shape, step, (pair[0], pair[1])), moments, strict=True):
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g * g)
            steps.append(m / (v.sqrt() + SETTINGS.eps))
        if step % every == 0:
            pair = list(by_blocks(pair[0], pair[1].T, steps[0], steps[1].T, lr))
            moments = [[torch.zeros_like(each), torch.zeros_like(each)] for each in pair]
            count = 0
        else:
            pair = [each - lr * lr_factor * u for each, u in zip(pair, steps, strict=True)]
        pair = [each * (1 - LR * lr_factor * DECAY) for each in pair]
        one, wanted = found[step - 1], pair[0] @ pair[1]
        torch.testing.assert_close(one[0] @ one[1], wanted, rtol=0, atol=1e-9, msg=f"{step}")
        # Factors are told but for the signs of singular vectors.
        pair = [one[0].clone(), one[1].clone()]


def by_blocks(m: Tensor, n: Tensor, d_m: Tensor, d_n: Tensor, lr: float) -> Pair:
    """The released step, put together on whole matrices."""
    u, r_m = torch.linalg.qr(m)
    v, r_n = torch.linalg.qr(n)
    gv, ug = d_m @ torch.linalg.inv(r_n), torch.linalg.inv(r_m).T @ d_n.T
    k0 = ug @ v
    stay_u, stay_v = torch.eye(len(u)) - u @ u.T, torch.eye(len(v)) - v @ v.T
    w = m @ n.T - lr * (u @ k0 @ v.T + u @ ug @ stay_v + stay_u @ gv @ v.T)
    left, s, right = torch.linalg.svd(w)
    root = torch.diag(s[:RANK].sqrt())
    return left[:, :RANK] @ root, root @ right[:RANK]


def test_loro_forgets_all_moments_after_an_exact_step():
    """Of tensors that are no factors too; the next step is a first one."""
    pair = factors((12, 5))
    parameters, weight = [torch.nn.Parameter(each) for each in pair], torch.nn.Parameter(pair[0])
    given = {
        name: (spec, parameter)
        for (name, spec), parameter in zip(specs_of(pair).items(), parameters, strict=True)
    }
    given["w"] = (TensorSpec((12, RANK), "embedding", constant(0.0)), weight)
    method = optimizers.get("loro-adam")
    optimizer = method.build(given, options_of("loro-adam", exact_every=3), SETTINGS)
    for step in range(1, 8):
        for _, parameter in given.values():
            parameter.grad = drawn(tuple(parameter.shape), step)
        optimizer.step()
        for _, parameter in given.values():
            state = optimizer.state[parameter]
            assert state["step"] == step % 3
            assert bool((state["exp_avg"] == 0).all()) == (step % 3 == 0)
            assert bool((state["exp_avg_sq"] == 0).all()) == (step % 3 == 0)


# --- Spectron -------------------------------------------------------------------------------------


@each_shape
def test_spectron_is_its_formula(shape: tuple[int, int]):
    found, pair = run("spectron", shape), list(factors(shape))
    momenta = [torch.zeros_like(each) for each in pair]
    vectors = []
    for name in ("x.A", "x.B"):
        generator = torch.Generator().manual_seed(seed_of(SETTINGS.seed, name, 0))
        vectors.append(torch.randn(RANK, generator=generator, dtype=torch.float64))
    wanted = []
    for step in range(1, STEPS + 1):
        for m, g in zip(momenta, gradients(shape, step, (pair[0], pair[1])), strict=True):
            m.copy_(0.95 * m + 0.05 * g)
        norms = []
        for idx, w in enumerate((pair[0], pair[1].T)):
            left = w @ vectors[idx]
            left = left / left.norm()
            norms.append(float((w.T @ left).norm()))
            vectors[idx] = w.T @ left / norms[-1]
        lr = LR / (sum(norms) + 1)
        pair = [(1 - LR * DECAY) * w - lr * msign(m) for w, m in zip(pair, momenta, strict=True)]
        wanted.append((pair[0], pair[1]))
    assert_close(found, wanted)


def test_spectrons_norms_come_near():
    """Where factors hardly move, an iteration a step finds their largest singular value."""
    settings = dataclasses.replace(SETTINGS, lr=1e-9)
    (a, b), optimizer = made("spectron", factors((12, 5)), settings=settings)
    for step in range(60):
        a.grad, b.grad = gradients((12, 5), step, (a.detach(), b.detach()))
        optimizer.step()
    for each, w in ((a, a), (b, b.T)):
        norm = float(torch.linalg.matrix_norm(w.detach(), 2))
        top = float((w.detach() @ optimizer.state[each]["vector"]).norm())
        assert top == pytest.approx(norm, rel=1e-4)


# --- LoRA-Muon ------------------------------------------------------------------------------------


def inverse_root(s: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(s)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.T


@each_shape
def test_lora_muon_is_its_formula(shape: tuple[int, int]):
    """With symmetric roots, as the paper writes it."""
    found, (a, n) = run("lora-muon", shape), (factors(shape)[0], factors(shape)[1].T)
    m_a, m_n, wanted = torch.zeros_like(a), torch.zeros_like(n), []
    s = math.sqrt(1 - LR * DECAY)
    for step in range(1, STEPS + 1):
        g_a, g_b = gradients(shape, step, (a, n.T))
        m_a, m_n = 0.95 * m_a + 0.05 * g_a, 0.95 * m_n + 0.05 * g_b.T
        r_a, r_n = inverse_root(a.T @ a), inverse_root(n.T @ n)
        d_a, d_n = -LR / 2 * msign(m_a @ r_n) @ r_n, -LR / 2 * msign(m_n @ r_a) @ r_a
        a, n = s * a + d_a / s, s * n + d_n / s
        wanted.append((a, n.T))
    assert_close(found, wanted, 1e-9)


@each_shape
@pytest.mark.parametrize("kind", ["scaled", "any"])
def test_lora_muon_steps_a_product_whatever_its_factors(shape: tuple[int, int], kind: str):
    """``A Q`` and ``Q^-1 B``: the same product after every step (fp64, 1e-5 asked, rounding had);
    with Adam and Spectron it is another."""
    eye = torch.eye(RANK, dtype=torch.float64)
    change = 20 * eye if kind == "scaled" else drawn((RANK, RANK), 9)
    for name, is_same in (("lora-muon", True), ("spectron", False), ("loro-adam", False)):
        plain, changed = run(name, shape), run(name, shape, change=change)
        errors = [
            float((a @ b - c @ d).abs().max())
            for (a, b), (c, d) in zip(plain, changed, strict=True)
        ]
        assert (max(errors) < 1e-8) == is_same, (name, errors)


def test_lora_muon_at_full_rank_is_muons():
    """R = out, B orthogonal: half of the step, ``dA B``, is lr/2 msign of the map's momentum."""
    shape = (12, RANK)
    a, b = drawn(shape, 1), torch.linalg.qr(drawn((RANK, RANK), 2))[0]
    settings = dataclasses.replace(SETTINGS, weight_decay=0.0)
    parameters, optimizer = made("lora-muon", (a, b), settings=settings)
    g = drawn(shape, 3)
    parameters[0].grad, parameters[1].grad = g @ b.T, a.T @ g
    optimizer.step()
    moved = (parameters[0].detach() - a) @ b
    torch.testing.assert_close(moved, -LR / 2 * msign(g), rtol=0, atol=1e-10)


def test_lora_muon_from_a_factor_of_zeros():
    """LoRA's start, fp32: finite, A waits for the first step of B, and both learn."""
    a, b = (each.float() for each in factors((12, 5)))
    (a, b), optimizer = made("lora-muon", (a, 0 * b))
    first = a.detach().clone()
    for step in range(5):
        g = drawn((12, 5), step).float()
        a.grad, b.grad = g @ b.detach().T, a.detach().T @ g
        optimizer.step()
        assert bool(a.isfinite().all() and b.isfinite().all())
        if step == 0:
            torch.testing.assert_close(a.detach(), first * math.sqrt(1 - LR * DECAY))
    assert not torch.allclose(a.detach(), first, rtol=1e-2)
    assert float(b.detach().abs().max()) > LR / 10


# --- all of them ----------------------------------------------------------------------------------


@each_name
def test_half_a_pair_is_no_step(name: str):
    (a, _), optimizer = made(name, factors((12, 5)))
    a.grad = torch.ones_like(a)
    with pytest.raises(RuntimeError, match=r"only x\.A has a gradient"):
        optimizer.step()


@each_name
def test_a_bf16_run_lends_both_factors_at_once(name: str, monkeypatch: pytest.MonkeyPatch):
    """Buckets of one item, pairs far apart: as if everything were lent together (bit)."""
    found = []
    for items in (1, 1 << 24):
        monkeypatch.setattr(lending, "ITEMS_AT_ONCE", items)
        given = {}
        for letter in ("A", "B"):
            for layer in range(3):
                pair = factors((12, 5), layer)
                spec = specs_of(pair)[f"x.{letter}"]
                value = pair["AB".index(letter)].bfloat16()
                given[f"{layer}.{letter}"] = (spec, torch.nn.Parameter(value))
        method = optimizers.get(name)
        options = method.examples[0]
        optimizer = low_precision.build(method, given, options, SETTINGS, "masters")
        for step in range(7):
            for idx, (_, parameter) in enumerate(given.values()):
                parameter.grad = drawn(tuple(parameter.shape), step * 10 + idx).bfloat16()
            optimizer.step()
        found.append([parameter.detach() for _, parameter in given.values()])
    assert all(torch.equal(*each) for each in zip(*found, strict=True))


@each_name
def test_a_pair_has_one_owner(name: str):
    method = optimizers.get(name)
    assert method.Options is not None
    specs = {
        f"{idx}{key}": each for idx in "0123" for key, each in specs_of(factors((9, 5))).items()
    }
    found = owners(method, method.Options(), specs, 3)
    assert found.keys() == specs.keys()
    assert pairs(specs) == {f"{idx}x.A": f"{idx}x.B" for idx in "0123"}
    for one, other in pairs(specs).items():
        assert found[one] == found[other]
    assert set(found.values()) == {0, 1, 2}


@each_name
def test_every_parameterization_that_has_pairs(name: str):
    """Events and leaving tensors among their steps: all stays finite, and all factors move."""
    example, tried = small.examples(optimizers.get(name))[1], []
    for linear in linears.names():
        model = dataclasses.replace(small.small_model(), linear=linear)
        of = dataclasses.replace(example, model=model)
        trained = {key: spec for key, spec in of.spec.tensors.items() if spec.trained}
        if not (found := pairs(trained)):
            continue
        built = of.build()
        first = {key: each.detach().clone() for key, each in built.named_parameters()}
        small.train(of, built, of.build_optimizer(built), 5)
        for key, parameter in built.named_parameters():
            assert bool(parameter.isfinite().all()), (linear, key)
        for key in {*found, *found.values()}:
            assert not torch.equal(built.get_parameter(key), first[key]), (linear, key)
        tried.append(linear)
    assert {"crnet", "cola", "lora", "loro", "lowrank", "sltrain", "switchlora"} <= {*tried}
    assert not {"full", "rso", "sst"} & {*tried}


@each_name
@pytest.mark.parametrize(("linear", "has_pairs"), [("full", False), ("rso", False), ("cola", True)])
def test_a_model_without_pairs_is_refused(name: str, linear: str, has_pairs: bool):
    run = override(
        PRESETS["tiny"][1], model={"linear": linear, "rank": "8"}, optimizer={"name": name}
    )
    try:
        check(run)
    except ConfigError as error:
        refused = [each for each in error.problems if "two trained factors" in each]
    else:
        refused = []
    assert bool(refused) != has_pairs, linear


@each_name
def test_an_adapter_has_no_pairs(name: str):
    """Its matrices alone train, and are stored as PEFT has them."""
    run = override(PRESETS["tiny"][1], optimizer={"name": name}, train={"adapter": "lora"})
    with pytest.raises(ConfigError, match=r"--train\.adapter lora are no such pair"):
        check(run)


@pytest.mark.parametrize(
    ("name", "changed", "word"),
    [
        ("loro-adam", {"exact_every": 0}, "exact-every"),
        ("spectron", {"momentum": 1.0}, "momentum"),
        ("lora-muon", {"momentum": -0.1}, "momentum"),
        ("spectron", {"adam_lr_factor": 0.0}, "adam-lr-factor"),
        ("lora-muon", {"adam_lr_factor": -1.0}, "adam-lr-factor"),
    ],
)
def test_bad_options_are_named(name: str, changed: dict[str, Any], word: str):
    problems = optimizers.get(name).problems(options_of(name, **changed))
    assert len(problems) == 1
    assert problems[0].startswith(f"--optimizer.{name}.{word}")


@pytest.mark.parametrize(
    ("exact", "restart", "is_right"),
    [(500, 500, True), (1000, 500, True), (250, 500, False), (600, 500, False)],
)
def test_exact_steps_go_with_restarts_of_the_rate(exact: int, restart: int, is_right: bool):
    """Each exact step is followed by small rates; under another schedule nothing restarts."""
    found = override(
        PRESETS["tiny"][1],
        model={"linear": "loro", "rank": "8"},
        train={"steps": 10_000},
        optimizer={
            "name": "loro-adam",
            "schedule": "loro-cosine",
            "loro_adam": {"exact_every": exact},
            "loro_cosine": {"restart_every": restart},
        },
    )
    if is_right:
        check(found)
        return
    with pytest.raises(ConfigError, match=f"every {exact} steps .* the rate every {restart}:"):
        check(found)
    plain = override(PRESETS["tiny"][1], model={"linear": "loro", "rank": "8"})
    check(override(plain, optimizer={"name": "loro-adam", "loro_adam": {"exact_every": exact}}))


@pytest.mark.parametrize("name", ["adamw", "lora-muon"])
def test_a_decay_that_takes_all_of_a_weight_is_refused(name: str):
    """A whole weight, or more, at the largest rate of the run; LoRA-Muon has no root of that."""
    base = override(PRESETS["tiny"][1], model={"linear": "lowrank", "rank": "8"})
    for decay in (1.9, 2.0, 3.0):
        found = override(base, optimizer={"name": name, "lr": 0.5, "weight_decay": decay})
        if decay < 2:
            check(found)
            continue
        with pytest.raises(ConfigError, match="leaves nothing of it; take less than 2"):
            check(found)
