"""Every optimizer on a whole model, and APOLLO and Muon beside their formulas.

Bit and exact equalities where no tolerance is named.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet import optimizers
from crnet.config.model_spec import model_spec
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from crnet.optimizers import Settings
from crnet.optimizers._projection import gaussian, project, seed_of
from crnet.specs import Role, TensorSpec, constant
from shapes import TINY

SETTINGS = Settings(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.01, seed=3)
each_optimizer = pytest.mark.parametrize("name", optimizers.names())
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])

CASES = [
    pytest.param(name, options, id=f"{name}-{idx}")
    for name in optimizers.names()
    for method in [optimizers.get(name)]
    for idx, options in enumerate([method.Options() if method.Options else None, *method.examples])
]
each_case = pytest.mark.parametrize(("name", "options"), CASES)


def options_of(name: str, **changed: Any) -> Any:
    made = optimizers.get(name).Options
    return made(**changed) if made else None


def make(
    name: str, options: Any, dtype: torch.dtype = torch.float32
) -> tuple[LanguageModel, torch.optim.Optimizer]:
    model = build(model_spec(dataclasses.replace(TINY, linear="crnet")), 0, dtype=dtype)
    return model, optimizers.get(name).build(model.trained(), options, SETTINGS)


def train(model: LanguageModel, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 31, (4, 9), generator=torch.Generator().manual_seed(step))
        loss_sum, count = model(tokens[:, :-1], tokens[:, 1:])
        (loss_sum / count).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.slow
@each_case
@each_dtype
def test_every_trained_tensor_moves(name: str, options: Any, dtype: torch.dtype):
    """At one of the steps at least: a gain in bf16 may come back to where it began."""
    if name == "sgd" and dtype == torch.bfloat16:
        pytest.skip(
            "steps as small as gradients: bf16 rounds them off a norm's weights, which are 1"
        )
    model, optimizer = make(name, options, dtype)
    first, moved = weights(model), set()
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        for parameter_name, parameter in model.named_parameters():
            assert bool(parameter.isfinite().all()), parameter_name
            if not torch.equal(parameter, first[parameter_name]):
                moved.add(parameter_name)
    assert moved == first.keys()


@each_case
@each_dtype
def test_state_bytes(name: str, options: Any, dtype: torch.dtype):
    model, optimizer = make(name, options, dtype)
    train(model, optimizer, range(2))
    for parameter_name, (spec, parameter) in model.trained().items():
        tensors = [each for each in optimizer.state[parameter].values() if torch.is_tensor(each)]
        size = parameter.element_size()
        expected = optimizers.get(name).state_bytes(spec, options, size)
        assert sum(each.nbytes for each in tensors) == expected, parameter_name


@pytest.mark.slow
@each_case
@each_dtype
def test_resumes_to_the_bit(name: str, options: Any, dtype: torch.dtype):
    """Through ``torch.load(weights_only=True)``, across a refresh of projections; dtypes stay."""
    model, optimizer = make(name, options, dtype)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(3, 6))
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other, resumed = make(name, options, dtype)
    other.load_state_dict(loaded["model"])
    optimizers.load_state(resumed, loaded["optimizer"])
    train(other, resumed, range(3, 6))
    for parameter_name, parameter in other.named_parameters():
        assert torch.equal(parameter, model.get_parameter(parameter_name)), parameter_name
    for one, another in zip(
        optimizer.state_dict()["state"].values(),
        resumed.state_dict()["state"].values(),
        strict=True,
    ):
        assert one.keys() == another.keys()
        for key, value in one.items():
            if torch.is_tensor(value):
                assert value.dtype == another[key].dtype
                assert torch.equal(value, another[key])
            else:
                assert value == another[key]


@each_case
def test_deterministic_and_without_the_global_generator(name: str, options: Any):
    found = []
    for seed in (0, 1):
        model, optimizer = make(name, options)
        torch.manual_seed(seed)
        train(model, optimizer, range(3))
        found.append(weights(model))
    assert all(torch.equal(found[0][each], found[1][each]) for each in found[0])


@each_case
def test_groups_keep_their_factors(name: str, options: Any):
    """Every trained tensor once; rate = base rate x factor; decay as declared."""
    model, optimizer = make(name, options)
    specs = {id(parameter): spec for spec, parameter in model.trained().values()}
    seen = []
    for group in optimizer.param_groups:
        assert group["lr"] == SETTINGS.lr * group["lr_factor"]
        for parameter in group["params"]:
            spec = specs[id(parameter)]
            share = getattr(options, "adam_lr_factor", 1.0) if group.get("part") == "adam" else 1.0
            assert group["lr_factor"] == spec.lr_factor * share
            assert group["weight_decay"] == (SETTINGS.weight_decay if spec.decays else 0.0)
            seen.append(id(parameter))
    assert sorted(seen) == sorted(specs)


@each_optimizer
def test_a_rate_of_zero_moves_nothing(name: str):
    """A schedule sets ``lr`` in the groups, and nothing else decides."""
    model, optimizer = make(name, options_of(name))
    before = weights(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(2))
    assert all(torch.equal(parameter, before[each]) for each, parameter in weights(model).items())


@each_optimizer
def test_default_options_have_no_problem(name: str):
    assert optimizers.get(name).problems(options_of(name)) == []


@pytest.mark.parametrize(
    ("name", "changed", "word"),
    [
        ("muon", {"momentum": 1.0}, "momentum"),
        ("muon", {"momentum": 0.0}, "nesterov"),
        ("muon", {"ns_steps": 0}, "ns-steps"),
        ("muon", {"adam_lr_factor": 0.0}, "adam-lr-factor"),
        ("apollo", {"rank": 0}, "rank"),
        ("apollo", {"refresh_every": 0}, "refresh-every"),
        ("apollo-mini", {"scale": 0.0}, "scale"),
        ("apollo-mini", {"growth_limit": 0.5}, "growth-limit"),
        ("apollo", {"scale_front": True, "growth_limit": 0.0}, "scale-front"),
    ],
)
def test_bad_options_are_named(name: str, changed: dict[str, Any], word: str):
    problems = optimizers.get(name).problems(options_of(name, **changed))
    assert len(problems) == 1
    assert problems[0].startswith(f"--optimizer.{name}.{word}")


# --- one tensor -----------------------------------------------------------------------------------


def alone(
    name: str,
    shape: tuple[int, ...],
    role: Role = "matrix",
    dtype: torch.dtype = torch.float64,
    settings: Settings = SETTINGS,
    **changed: Any,
) -> tuple[Tensor, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(7)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    spec = TensorSpec(shape, role, constant(0.0))
    method = optimizers.get(name)
    return weight, method.build({"w": (spec, weight)}, options_of(name, **changed), settings)


def gradient(shape: tuple[int, ...], step: int, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * size


def adam_directions(gradients: list[Tensor]) -> list[Tensor]:
    """Adam's direction at each step, the bias not corrected: section 0 of the notes' formulas."""
    first, second, found = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0]), []
    for each in gradients:
        first = SETTINGS.beta1 * first + (1 - SETTINGS.beta1) * each
        second = SETTINGS.beta2 * second + (1 - SETTINGS.beta2) * each * each
        found.append(first / (second.sqrt() + SETTINGS.eps))
    return found


def rate_at(step: int) -> float:
    return SETTINGS.lr * math.sqrt(1 - SETTINGS.beta2**step) / (1 - SETTINGS.beta1**step)


SHAPES = [(12, 8), (8, 8), (8, 12)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["tall", "square", "wide"])


@each_shape
@pytest.mark.parametrize("name", ["apollo", "apollo-mini"])
@pytest.mark.parametrize("front", [False, True])
def test_apollo_is_its_formula(shape: tuple[int, int], name: str, front: bool):
    """Five steps over two projections, the limit at work in some of them; fp64, rounding alone."""
    rank, scale, every = (3, 2.0, 3) if name == "apollo" else (1, 128.0, 3)
    weight, optimizer = alone(
        name, shape, rank=rank, scale=scale, refresh_every=every, scale_front=front
    )
    expected, is_tall = weight.detach().clone(), shape[0] >= shape[1]
    first = second = torch.zeros(())
    last, limited = None, 0
    for step in range(1, 6):
        g = gradient(shape, step, [1.0, 1.5, 0.2, 3.0, 1.0][step - 1])
        p = gaussian(shape, rank, seed_of(SETTINGS.seed, "w", (step - 1) // every)).double()
        r = g @ p.T if is_tall else p @ g
        first = SETTINGS.beta1 * first + (1 - SETTINGS.beta1) * r
        second = SETTINGS.beta2 * second + (1 - SETTINGS.beta2) * r * r
        u = first / (second.sqrt() + SETTINGS.eps)
        if name == "apollo-mini":
            scales = u.norm() / (r.norm() + 1e-8)
        else:
            side = 1 if is_tall else 0
            scales = u.norm(dim=side, keepdim=True) / (r.norm(dim=side, keepdim=True) + 1e-8)
            assert scales.numel() == max(shape)
        d = scales * g * (math.sqrt(scale) if front else 1)
        if last is not None and d.norm() / (last + 1e-8) > 1.01:
            d = d * 1.01 * (last + 1e-8) / d.norm()
            limited += 1
        last = d.norm()
        d = d if front else d * math.sqrt(scale)
        expected = expected - rate_at(step) * d
        expected = expected - SETTINGS.lr * SETTINGS.weight_decay * expected
        weight.grad = g
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[weight]["norm"], last)
    assert 0 < limited < 4


@each_shape
def test_projection_halves_the_smaller_side(shape: tuple[int, int]):
    p = gaussian(shape, 4, 0)
    assert p.shape == (4, 8)
    r = project(gradient(shape, 0).float(), p)
    assert r.shape == ((12, 4) if shape == (12, 8) else (4, 12) if shape == (8, 12) else (8, 4))


def test_projection_follows_from_seed_name_and_refresh():
    """The same numbers in any process: one seed written down; others differ."""
    seed = seed_of(3, "w", 0)
    assert seed == 8485965668561594732
    assert torch.equal(gaussian((8, 6), 4, seed), gaussian((6, 8), 4, seed))
    others = {seed_of(4, "w", 0), seed_of(3, "v", 0), seed_of(3, "w", 1)}
    assert len({seed, *others}) == 4


def test_projection_keeps_norms_on_average():
    """E |P x|^2 = |x|^2: 2000 ranks, hence 3 standard deviations of sqrt(2 / 2000)."""
    x = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    projected = project(x.T, gaussian((50, 1), 2000, 1))
    ratio = float(projected.square().sum() / x.square().sum())
    assert abs(ratio - 1) < 10 * math.sqrt(2 / 2000)
    p = gaussian((4000, 50), 200, 2)
    assert float(p.std()) == pytest.approx(200**-0.5, rel=0.02)


def test_apollo_of_large_rank_scales_as_full_adam():
    """Channel by channel |u| / |G| of Adam on the whole gradient times sqrt(rank / rows): the
    direction has about one unit an item. Within 15 %: the noise of 400 rows."""
    shape, rank = (400, 401), 1600
    gradients = [gradient(shape, step) for step in range(3)]
    weight, optimizer = alone("apollo", shape, rank=rank, growth_limit=0.0)
    before = weight.detach()
    for each in gradients:
        before = weight.detach().clone()
        weight.grad = each
        optimizer.step()
    undecayed = weight.detach() / (1 - SETTINGS.lr * SETTINGS.weight_decay)
    scales = ((before - undecayed) / rate_at(3) / gradients[-1]).mean(0)
    u = adam_directions(gradients)[-1]
    expected = u.norm(dim=0) / gradients[-1].norm(dim=0) * (rank / shape[0]) ** 0.5
    torch.testing.assert_close(scales, expected, rtol=0.15, atol=0)


def test_apollo_mini_has_one_scale():
    weight, optimizer = alone("apollo-mini", (5, 7))
    before = weight.detach().clone()
    weight.grad = gradient((5, 7), 0)
    optimizer.step()
    undecayed = weight.detach() / (1 - SETTINGS.lr * SETTINGS.weight_decay)
    ratio = (before - undecayed) / weight.grad
    torch.testing.assert_close(ratio, ratio[0, 0].expand(5, 7), rtol=1e-9, atol=0)


def test_apollo_limits_growth_exactly():
    """Gradients that grow tenfold: norms grow by 1.01 a step, but for the 1e-8 in the ratio."""
    weight, optimizer = alone("apollo", (6, 5), rank=2)
    norms = []
    for step in range(4):
        weight.grad = gradient((6, 5), 0, 10.0**step)
        optimizer.step()
        norms.append(float(optimizer.state[weight]["norm"]))
    for low, high in itertools.pairwise(norms):
        assert high / low == pytest.approx(1.01, rel=1e-7)


def test_apollo_recovers_from_a_gradient_of_zero():
    weight, optimizer = alone("apollo", (6, 5), rank=2)
    for size in (0.0, 1.0):
        weight.grad = gradient((6, 5), 0, size)
        optimizer.step()
    assert bool(weight.isfinite().all())
    assert float(optimizer.state[weight]["norm"]) > 0.1


def test_apollo_of_other_tensors_is_adam():
    """With the conventions of the GaLore family; fp64, rounding alone."""
    weight, optimizer = alone("apollo", (6, 5), role="factor_in")
    expected = weight.detach().clone()
    gradients = [gradient((6, 5), step) for step in range(4)]
    for step, u in enumerate(adam_directions(gradients), start=1):
        weight.grad = gradients[step - 1]
        optimizer.step()
        expected = (expected - rate_at(step) * u) * (1 - SETTINGS.lr * SETTINGS.weight_decay)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_apollo_kept_projections_are_the_drawn_ones():
    found = []
    for projection in ("drawn", "kept"):
        options = options_of("apollo", rank=4, refresh_every=3, projection=projection)
        model, optimizer = make("apollo", options)
        train(model, optimizer, range(5))
        found.append(weights(model))
    assert all(torch.equal(found[0][each], found[1][each]) for each in found[0])


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@each_shape
def test_muon_is_torchs(shape: tuple[int, int], adjust: str):
    """To the bit: torch's Muon by itself with the same settings."""
    weight, optimizer = alone("muon", shape, dtype=torch.float32, adjust_lr_fn=adjust)
    other = torch.nn.Parameter(weight.detach().clone())
    theirs = torch.optim.Muon(
        [other], lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay, adjust_lr_fn=adjust
    )
    for step in range(3):
        for parameter, each in ((weight, optimizer), (other, theirs)):
            parameter.grad = gradient(shape, step).float()
            each.step()
    assert torch.equal(weight, other)


def test_muons_step_is_nearly_orthogonal():
    """Singular values of the first step over the rate: near 1, as far as five iterations in bf16
    lead (those of the gradient itself lie a factor of 400 apart)."""
    settings = dataclasses.replace(SETTINGS, weight_decay=0.0)
    weight, optimizer = alone(
        "muon", (8, 8), dtype=torch.float32, settings=settings, adjust_lr_fn="original"
    )
    before = weight.detach().clone()
    weight.grad = gradient((8, 8), 0).float()
    optimizer.step()
    values = torch.linalg.svdvals((before - weight.detach()) / settings.lr)
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3


@pytest.mark.parametrize(
    ("role", "matrices", "is_muons"),
    [
        ("matrix", "all", True),
        ("matrix", "dense", True),
        ("factor_in", "all", True),
        ("factor_out", "all", True),
        ("factor_in", "dense", False),
        ("embedding", "all", False),
        ("head", "all", False),
    ],
)
def test_muon_takes_matrices_and_factors(role: Role, matrices: str, is_muons: bool):
    weight, optimizer = alone("muon", (6, 5), role, torch.float32, matrices=matrices)
    weight.grad = gradient((6, 5), 0).float()
    optimizer.step()
    assert ("momentum_buffer" in optimizer.state[weight]) == is_muons
    assert ("exp_avg_sq" in optimizer.state[weight]) != is_muons
