"""SGD, SCALE, Lion, Adafactor, Stable-SPAM and NorMuon beside their papers' formulas.

fp64, 20 steps, tall and wide: rounding alone, where no other tolerance is named.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet import optimizers
from crnet.optimizers._newton_schulz import naive_orthogonalised, orthogonalised
from crnet.optimizers._norms import naive_squares_over, norm_of, squares_over
from crnet.specs import Role, TensorSpec, constant
from test_optimizers import SETTINGS, alone, gradient, options_of

STEPS = 20
LR, DECAY = SETTINGS.lr, SETTINGS.weight_decay
each_shape = pytest.mark.parametrize("shape", [(12, 5), (5, 12)], ids=["tall", "wide"])


def spiky(shape: tuple[int, ...], step: int) -> Tensor:
    """Gradients of changing size; every sixth has an item a hundred times as large."""
    found = gradient(shape, step, 1 + 0.5 * math.sin(step))
    if step % 6 == 5:
        found.view(-1)[step % found.numel()] *= 100
    return found


def run(
    name: str, shape: tuple[int, ...], role: Role = "matrix", **changed: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], torch.optim.Optimizer]:
    """Weights at first, gradients and weights of every step."""
    weight, optimizer = alone(name, shape, role, **changed)
    first, gradients, weights = weight.detach().clone(), [], []
    for step in range(1, STEPS + 1):
        gradients.append(spiky(shape, step))
        weight.grad = gradients[-1].clone()
        optimizer.step()
        assert torch.equal(weight.grad, gradients[-1]), "a step leaves gradients alone"
        weights.append(weight.detach().clone())
    return first, gradients, weights, optimizer


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for step, (one, other) in enumerate(zip(found, wanted, strict=True), start=1):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=f"step {step}")


# --- SCALE ----------------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize(
    ("role", "outputs", "is_last"),
    [
        ("matrix", "rows", False),
        ("head", "rows", True),
        ("embedding", "columns", False),
        ("factor_in", "columns", False),
        ("factor_out", "columns", False),
    ],
)
def test_scale_is_its_formula(shape: Any, released: bool, role: Any, outputs: str, is_last: bool):
    """Each output's vector of the gradient has norm 1; the head's is that of its momentum."""
    w, gradients, found, optimizer = run("scale", shape, role, released=released)
    momentum, wanted = torch.zeros_like(w), []
    for g in gradients:
        momentum = 0.9 * momentum + 0.1 * g
        columns = (momentum if is_last else g).clone()
        columns = columns.T if outputs == "rows" else columns  # as the paper has it: (d, out)
        unit = torch.stack([each / each.dot(each).sqrt() for each in columns.unbind(1)], 1)
        unit = unit * (math.sqrt(len(columns)) if released else 1)
        w = (1 - LR * DECAY) * w - LR * (unit.T if outputs == "rows" else unit)
        wanted.append(w)
    assert_close(found, wanted)
    assert sum(map(len, optimizer.state.values())) == int(is_last)


def test_scale_of_a_tied_head_has_a_norm_for_each_token():
    w, gradients, found, _ = run("scale", (7, 4), "embedding", tied=True)
    momentum, wanted = torch.zeros_like(w), []
    for g in gradients:
        momentum = 0.9 * momentum + 0.1 * g
        w = (1 - LR * DECAY) * w - LR * momentum / momentum.square().sum(1, True).sqrt()
        wanted.append(w)
    assert_close(found, wanted)


def test_scale_leaves_a_column_without_gradient():
    """Tokens that a batch has not: the row of the head stays, but for the decay."""
    weight, optimizer = alone("scale", (3, 4))
    before, weight.grad = weight.detach().clone(), gradient((3, 4), 1)
    weight.grad[1] = 0
    optimizer.step()
    assert torch.equal(weight[1], before[1] * (1 - LR * DECAY))
    assert not torch.equal(weight[0], before[0] * (1 - LR * DECAY))


@pytest.mark.parametrize("role", ["norm", "bias", "gain", "router", "values"])
@pytest.mark.parametrize("name", ["scale", "normuon"])
def test_the_rest_is_adamws(name: str, role: Any):
    """To the bit: torch's AdamW by itself."""
    _, gradients, found, _ = run(name, (6, 5), role)
    assert_same_as_adamw(gradients, found)


def assert_same_as_adamw(gradients: list[Tensor], found: list[Tensor]) -> None:
    weight, optimizer = alone("adamw", tuple(gradients[0].shape))
    for g, wanted in zip(gradients, found, strict=True):
        weight.grad = g
        optimizer.step()
        assert torch.equal(weight, wanted)


# --- SGD ------------------------------------------------------------------------------------------


each_momentum = pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.9, False), (0.8, True), (0.0, False)]
)


@each_shape
@each_momentum
def test_sgd_is_its_formula(shape: Any, momentum: float, nesterov: bool):
    """Decay beside the momentum, not through it."""
    w, gradients, found, optimizer = run("sgd", shape, momentum=momentum, nesterov=nesterov)
    moved, wanted = torch.zeros_like(w), []
    for g in gradients:
        moved = momentum * moved + g
        w = w - LR * (g + momentum * moved if nesterov else moved) - LR * DECAY * w
        wanted.append(w)
    assert_close(found, wanted)
    assert sum(map(len, optimizer.state.values())) == int(momentum > 0)


@each_momentum
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sgd_without_decay_is_torchs(momentum: float, nesterov: bool, dtype: torch.dtype):
    """To the bit, also where tensors have their first gradient at different steps."""
    settings = dataclasses.replace(SETTINGS, weight_decay=0.0)
    zeros = constant(0.0)
    specs = [TensorSpec((6, 5), "matrix", zeros), TensorSpec((7,), "norm", zeros)]
    ours, theirs = (
        [torch.nn.Parameter(torch.ones(each.shape, dtype=dtype)) for each in specs]
        for _ in range(2)
    )
    told = {"momentum": momentum, "nesterov": nesterov}
    optimizer = optimizers.get("sgd").build(
        {str(idx): each for idx, each in enumerate(zip(specs, ours, strict=True))},
        options_of("sgd", **told),
        settings,
    )
    how = {"fused": True} if dtype == torch.float32 else {"foreach": True}
    others = [torch.optim.SGD([each], lr=LR, **how, **told) for each in theirs]
    for step in range(STEPS):
        for idx, (one, two) in enumerate(zip(ours, theirs, strict=True)):
            given = gradient(tuple(one.shape), step).to(dtype) if step >= 3 * idx else None
            one.grad, two.grad = given, None if given is None else given.clone()
        optimizer.step()
        for other in others:
            other.step()
        for one, two in zip(ours, theirs, strict=True):
            assert torch.equal(one, two), step
    assert not any(torch.equal(each, torch.ones_like(each)) for each in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [3, 16, 64, 100, 129])
def test_the_last_items_of_sgds_momentum(count: int, dtype: torch.dtype):
    """torch's fused step of 16 bits on a CPU leaves others there. Tolerance: rounding of the
    dtype."""
    weight, optimizer = alone("sgd", (count,), "norm", dtype)
    wanted = torch.zeros(count, dtype=torch.float64)
    for step in range(4):
        weight.grad = gradient((count,), step).to(dtype)
        optimizer.step()
        wanted = 0.9 * wanted + weight.grad.double()
    found = optimizer.state[weight]["momentum_buffer"].double()
    near = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, wanted, rtol=near, atol=near)


# --- Lion -----------------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.99), (0.95, 0.98)])
def test_lion_is_its_formula(shape: Any, beta1: float, beta2: float):
    w, gradients, found, _ = run("lion", shape, beta1=beta1, beta2=beta2)
    momentum, wanted = torch.zeros_like(w), []
    for g in gradients:
        step = torch.sign(beta1 * momentum + (1 - beta1) * g)
        w = w - LR * (step + DECAY * w)
        momentum = beta2 * momentum + (1 - beta2) * g
        wanted.append(w)
    assert_close(found, wanted)


# --- Adafactor ------------------------------------------------------------------------------------


def over_root(second: Any, g: Tensor, decay: float, eps1: float) -> tuple[Any, Tensor]:
    """The paper's algorithm 4 for a matrix, 5 for a vector, V written out."""
    squares = g * g + eps1
    if g.dim() == 1:
        second = decay * second + (1 - decay) * squares
        return second, g / second.sqrt()
    rows, columns = second
    rows = decay * rows + (1 - decay) * squares.mean(1)
    columns = decay * columns + (1 - decay) * squares.mean(0)
    return (rows, columns), g / (torch.outer(rows, columns) / rows.mean()).sqrt()


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (9,)], ids=["tall", "wide", "vector"])
@pytest.mark.parametrize("rate", ["relative", "fixed"])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adafactor_is_its_formula(shape: Any, rate: Any, beta1: float):
    w, gradients, found, _ = run("adafactor", shape, rate=rate, beta1=beta1, clip=0.8)
    zeros = [torch.zeros(size, dtype=torch.float64) for size in shape]
    second = tuple(zeros) if len(shape) == 2 else zeros[0]
    momentum, wanted, clipped = torch.zeros_like(w), [], 0
    for t, g in enumerate(gradients, start=1):
        second, u = over_root(second, g, 1 - t**-0.8, 1e-30)
        rms = u.square().mean().sqrt()
        clipped += bool(rms > 0.8)
        u = u / max(1, float(rms / 0.8))
        momentum = beta1 * momentum + (1 - beta1) * u
        share = max(1e-3, float(w.square().mean().sqrt()))
        alpha = LR if rate == "fixed" else share * min(LR, 1 / math.sqrt(t))
        w = (1 - LR * DECAY) * w - alpha * momentum
        wanted.append(w)
    assert_close(found, wanted)
    assert 0 < clipped < STEPS


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (9,)], ids=["tall", "wide", "vector"])
def test_adafactor_is_torchs(shape: Any):
    """Where eps1 is nothing beside any square; a base rate that 1 / sqrt(t) is below."""
    settings = dataclasses.replace(SETTINGS, lr=0.4)
    _, gradients, found, _ = run("adafactor", shape, settings=settings)
    weight, _ = alone("adafactor", shape)
    theirs = torch.optim.Adafactor([weight], lr=0.4, eps=(1e-30, 1e-3), weight_decay=DECAY)
    wanted = []
    for g in gradients:
        weight.grad = g.clone()
        theirs.step()
        wanted.append(weight.detach().clone())
    assert_close(found, wanted)


def test_adafactor_stands_rows_without_gradient():
    """Tokens that no batch had, fp32: torch's own makes NaN of them at this eps1."""
    weight, optimizer = alone("adafactor", (6, 5), "embedding", torch.float32)
    before = weight.detach().clone()
    for step in range(3):
        weight.grad = gradient((6, 5), step).float()
        weight.grad[2:4] = 0
        optimizer.step()
    decayed = before[2:4] * (1 - LR * DECAY) ** 3
    torch.testing.assert_close(weight.detach()[2:4], decayed)
    assert bool(weight.isfinite().all())


# --- Stable-SPAM ----------------------------------------------------------------------------------


def averaged(average: float, value: float, decay: float, count: int) -> tuple[float, float]:
    """An average, and what it is with its bias corrected."""
    average = decay * average + (1 - decay) * value
    return average, average / (1 - decay**count)


@each_shape
@pytest.mark.parametrize("released", [False, True])
def test_stable_spam_is_its_formula(shape: Any, released: bool):
    every, theta, gamma1, gamma2 = 7, 0.9, 0.7, 0.9
    w, gradients, found, _ = run(
        "stable-spam", shape, reset_every=every, theta=theta, released=released
    )
    beta1, beta2, eps = SETTINGS.beta1, SETTINGS.beta2, SETTINGS.eps
    m, v, wanted, spikes = torch.zeros_like(w), torch.zeros_like(w), [], 0
    top = mean = mean_sq = 0.0
    count = adams = 0  # of the averages, of Adam
    for t, given in enumerate(gradients, start=1):
        g, count, adams = given.clone(), count + 1, adams + 1
        largest = float(g.abs().max())
        top, limit = averaged(top, largest, theta, count)
        for idx, value in enumerate(g.flatten().tolist()):
            if abs(value) > limit:
                g.view(-1)[idx] = value / largest * limit
                spikes += 1
        norm = float(g.norm())
        mean, mean_hat = averaged(mean, norm, gamma1, count)
        mean_sq, mean_sq_hat = averaged(mean_sq, norm**2, gamma2, count)
        g = g / norm * mean_hat / (math.sqrt(mean_sq_hat) + eps)
        if t % every == 0:
            adams = 1
            if released:
                count = 1
            else:
                m, v = torch.zeros_like(w), torch.zeros_like(w)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        root = (v / (1 - beta2**adams)).sqrt() + eps
        w = (1 - LR * DECAY) * w - LR * m / (1 - beta1**adams) / root
        if released and t % every == 0:
            m, v = torch.zeros_like(w), torch.zeros_like(w)
        wanted.append(w)
    # A factor is computed in another order; Adam's own kernel in torch's.
    for step, (one, other) in enumerate(zip(found, wanted, strict=True), start=1):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=f"step {step}")
    assert spikes >= 3


def test_stable_spam_without_a_gradient():
    """A tensor whose gradient is 0 stays finite, and learns afterwards."""
    weight, optimizer = alone("stable-spam", (4, 3))
    for size in (0.0, 0.0, 1.0):
        weight.grad = gradient((4, 3), 1, size)
        before = weight.detach().clone()
        optimizer.step()
    assert bool(weight.isfinite().all())
    assert float((weight.detach() - before).abs().max()) > LR / 2


def test_stable_spam_waits_for_the_norms_of_a_step():
    """Its averages would count a step that torch's fused AdamW passes over."""
    from crnet.optimizers._torch import passes_over

    assert passes_over(alone("adamw", (2, 2))[1])
    assert not passes_over(alone("stable-spam", (2, 2))[1])


# --- NorMuon --------------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("role", ["matrix", "factor_in", "factor_out"])
def test_normuon_is_its_formula(shape: Any, released: bool, role: Any):
    """The iteration is the module's own: a test of its own has that."""
    w, gradients, found, _ = run("normuon", shape, role, released=released)
    is_transposed = role != "matrix"  # (in, out); the paper's are (out, in)
    m, v = torch.zeros_like(w), torch.zeros(shape[is_transposed], dtype=torch.float64)
    wanted = []
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        o = orthogonalised(0.95 * m + 0.05 * g if released else m, 5).double()
        o = o.T if is_transposed else o
        v = 0.95 * v + 0.05 * (o * o).mean(1)
        n = o / (v.sqrt()[:, None] + 1e-8)
        if released:
            n = n * o.norm() / n.norm() * math.sqrt(max(1, o.shape[0] / o.shape[1]))
        else:
            n = n * 0.2 * math.sqrt(o.numel()) / n.norm()
        w = (1 - LR * DECAY) * w - LR * (n.T if is_transposed else n)
        wanted.append(w)
    for one, other in zip(found, wanted, strict=True):  # squares of bf16 add up in fp32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@each_shape
def test_newton_schulz_is_a_polynomial_of_singular_values(shape: Any):
    """a x + b x^3 + c x^5, five times, from values over the Frobenius norm; 1e-7 is added to it."""
    x = gradient(shape, 3)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    wanted = u @ torch.diag(s) @ v
    for found, atol in (
        (orthogonalised(x, 5), 1e-6),
        (orthogonalised(x.float(), 5), 1e-4),
        (naive_orthogonalised(x.bfloat16(), 5), 0.03),  # a GPU's way
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol)
    assert 0.6 < float(s.min()) < float(s.max()) < 1.3


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (50, 40), (40, 40)])
def test_newton_schulz_on_the_small_side_is_the_iteration(shape: Any):
    """Gradients as they are, fp32: singular values 400 apart. Another number of iterations takes
    the matrix itself."""
    x = gradient(shape, 4)
    x = x * torch.logspace(0, -2.6, shape[1], dtype=torch.float64)
    for num_steps in (5, 3):
        wanted = naive_orthogonalised(x, num_steps)
        for given, atol in ((x, 1e-5), (x.float(), 5e-4)):
            found = orthogonalised(given, num_steps)
            assert found.dtype == given.dtype
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol)
    assert orthogonalised(x.bfloat16(), 5).dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_over_a_side(rows: int, dtype: torch.dtype):
    """By blocks of rows, or in one: rounding of a sum of so many."""
    x = gradient((rows, 7), 1).to(dtype)
    for side in (0, 1):
        found, wanted = squares_over(x, side), naive_squares_over(x, side)
        assert found.dtype == wanted.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(norm_of(x, side), wanted.sqrt())
    torch.testing.assert_close(norm_of(x, None), naive_squares_over(x, 0).sum().sqrt())


@each_shape
def test_normuons_first_step_is_muons_with_rows_of_one_length(shape: Any):
    """torch's Muon beside it: its step, each row divided by its own norm. Muon's
    iterations are in bf16: a twentieth of an item's size."""
    settings = dataclasses.replace(SETTINGS, weight_decay=0.0)
    steps = []
    for name, changed in (("normuon", {}), ("muon", {"nesterov": False})):
        weight, optimizer = alone(
            name, shape, dtype=torch.float32, settings=settings, matrices="all", **changed
        )
        before, weight.grad = weight.detach().clone(), gradient(shape, 0).float()
        optimizer.step()
        steps.append(before - weight.detach())
    rows = steps[1] / steps[1].norm(dim=1, keepdim=True)
    wanted = rows * 0.2 * math.sqrt(shape[1]) * settings.lr
    torch.testing.assert_close(steps[0], wanted, rtol=1e-2, atol=0.05 * 0.2 * settings.lr)


@pytest.mark.parametrize("name", ["normuon", "scale"])
def test_a_head_is_no_matrix_of_muon(name: str):
    """No option takes it among the matrices: NorMuon leaves it to AdamW, SCALE has its own way."""
    for options in (optimizers.get(name).Options(), *optimizers.get(name).examples):
        weight, optimizer = alone(name, (6, 5), "head", **dataclasses.asdict(options))
        weight.grad = gradient((6, 5), 0)
        optimizer.step()
        assert "second_moment" not in optimizer.state[weight]
        assert ("exp_avg_sq" in optimizer.state[weight]) == (name == "normuon")


@pytest.mark.parametrize(
    ("name", "changed", "word"),
    [
        ("scale", {"momentum": 1.0}, "momentum"),
        ("sgd", {"momentum": 1.0}, "momentum"),
        ("sgd", {"momentum": 0.0, "nesterov": True}, "nesterov"),
        ("lion", {"beta1": -0.1}, "beta1"),
        ("lion", {"beta2": 1.0}, "beta2"),
        ("normuon", {"momentum": 1.0}, "momentum"),
        ("normuon", {"ns_steps": 0}, "ns-steps"),
        ("stable-spam", {"theta": 1.0}, "theta"),
        ("stable-spam", {"reset_every": -1}, "reset-every"),
        ("stable-spam", {"reset_every": 0, "released": True}, "released"),
        ("adafactor", {"beta1": 1.0}, "beta1"),
        ("adafactor", {"clip": 0.0}, "clip"),
        ("adafactor", {"rate": "fixed", "eps2": 1.0}, "eps2"),
    ],
)
def test_bad_options_are_named(name: str, changed: dict[str, Any], word: str):
    problems = optimizers.get(name).problems(options_of(name, **changed))
    assert len(problems) == 1
    assert problems[0].startswith(f"--optimizer.{name}.{word}")
