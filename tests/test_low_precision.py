"""Training in bf16: every parameter moves, under each choice but ``plain``, and resumes to the bit.

Equality is by bits unless a tolerance is named; each tolerance says where it comes from.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from crnet import optimizers
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.cost.workload import workload
from crnet.errors import ConfigError
from crnet.inference.load import load_model
from crnet.kernels.carried import carried_lowrank, up_project
from crnet.measure.examples import batch, small_model
from crnet.measure.profile import Probe
from crnet.model.build import build
from crnet.optimizers import MASTER, Settings, forget
from crnet.optimizers import _low_precision as low_precision
from crnet.optimizers._low_precision import Bf16Update
from crnet.optimizers._low_precision import module as low_precision_module
from crnet.optimizers._low_precision.module import round_stochastically
from crnet.specs import Forget, Role, TensorSpec, constant
from crnet.storage import checkpoint
from test_optimizer_state import assert_same
from test_train import run, tiny

CHOICES: tuple[Bf16Update, ...] = get_args(Bf16Update)
WHOLE: tuple[Bf16Update, ...] = ("masters", "vectors", "stochastic")
each_choice = pytest.mark.parametrize("choice", CHOICES)
each_whole_choice = pytest.mark.parametrize("choice", WHOLE)
SETTINGS = Settings(lr=1.5e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, seed=0)
EVERY_ROLE: dict[str, tuple[Role, tuple[int, ...]]] = {
    "matrix": ("matrix", (64, 64)),
    "norm": ("norm", (64,)),
}


def parameters(value: float = 1.0) -> dict[str, tuple[TensorSpec, nn.Parameter]]:
    return {
        name: (
            TensorSpec(shape, role, constant(value)),
            nn.Parameter(torch.full(shape, value, dtype=torch.bfloat16)),
        )
        for name, (role, shape) in EVERY_ROLE.items()
    }


def make(given: Any, choice: Bf16Update, name: str = "adamw", seed: int = 0) -> Any:
    method = optimizers.get(name)
    options = method.Options() if method.Options else None
    settings = Settings(**(vars(SETTINGS) | {"seed": seed}))
    return low_precision.build(method, given, options, settings, choice)


def stepped(optimizer: Any, gradient: float, steps: int = 1) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()


# --- stochastic rounding --------------------------------------------------------------------------

VALUES = [1.0 + 2**-12, 1.0 - 2**-11, -1.003, 3.14159e-5, -7.7e11, 1e-30, 0.999 * 0.75]


@pytest.mark.parametrize("value", VALUES)
def test_rounding_takes_one_of_two_neighbours_and_is_right_in_the_mean(value: float):
    """Six deviations of the mean of 2^16 draws, each of which is the one or the other."""
    count = 1 << 16
    x = torch.full((count,), value)
    found = round_stochastically(x, torch.Generator().manual_seed(1)).double()
    exact = float(x[0])
    low, high = float(found.min()), float(found.max())
    assert low < exact < high
    assert set(found.tolist()) == {low, high}
    gap = high - low
    assert gap <= abs(exact) * 2**-7
    share = (exact - low) / gap
    deviation = gap * math.sqrt(share * (1 - share) / count)
    assert abs(float(found.mean()) - exact) < 6 * deviation


def test_rounding_leaves_what_is_a_bf16_number():
    """Every one of them but NaN, infinities too."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    numbers = numbers[~numbers.isnan()]
    found = round_stochastically(numbers.float(), torch.Generator().manual_seed(1))
    assert torch.equal(found.view(torch.int16), numbers.view(torch.int16))


def test_random_bits_follow_from_seed_name_and_step():
    def weights(seed: int, first: str = "matrix") -> list[Tensor]:
        given = parameters()
        given = {first: given["matrix"], "norm": given["norm"]}
        optimizer, found = make(given, "stochastic", seed=seed), []
        for _ in range(3):
            stepped(optimizer, 1.0)
            found.append(given[first][1].detach().clone())
        return found

    one = weights(0)
    assert_same(weights(0), one)
    assert not torch.equal(weights(1)[0], one[0])
    assert not torch.equal(weights(0, "another")[0], one[0])
    # A step of Adam on a constant gradient is the same for every item: what differs was drawn.
    moved = [before - after for before, after in itertools.pairwise(one)]
    assert not torch.equal(*moved)


def test_another_step_draws_other_bits():
    """From the same weights, gradients and state."""
    given, later = parameters(), parameters()
    one, other = make(given, "stochastic"), make(later, "stochastic")
    for group in other.param_groups:
        group["num_updates"] = 5
    stepped(one, 1.0)
    stepped(other, 1.0)
    assert not torch.equal(given["matrix"][1], later["matrix"][1])
    assert torch.equal(given["norm"][1], later["norm"][1])


def test_the_order_and_number_of_others_changes_no_bit():
    both, alone = parameters(), parameters()
    del alone["norm"]
    for given in (dict(reversed(both.items())), alone):
        stepped(make(given, "stochastic"), 1.0, steps=3)
    assert torch.equal(both["matrix"][1], alone["matrix"][1])


def test_buckets_change_no_bit(monkeypatch: pytest.MonkeyPatch):
    one, other = parameters(), parameters()
    stepped(make(one, "stochastic"), 1.0, steps=3)
    monkeypatch.setattr(low_precision_module, "ITEMS_AT_ONCE", 1)
    stepped(make(other, "stochastic"), 1.0, steps=3)
    for name, (_, parameter) in one.items():
        assert torch.equal(parameter, other[name][1])


# --- one optimizer --------------------------------------------------------------------------------


def test_in_plain_bf16_what_starts_at_1_stays():
    """Above: the defect itself. Adam's step is the rate, 1.5e-3, below half of 2^-8."""
    given = parameters()
    stepped(make(given, "plain"), 1.0, steps=50)
    for _, parameter in given.values():
        assert bool((parameter == 1).all())


@pytest.mark.parametrize(
    ("choice", "moves"),
    [("masters", EVERY_ROLE), ("vectors", ["norm"]), ("stochastic", EVERY_ROLE)],
)
def test_steps_below_half_a_unit_add_up(choice: Bf16Update, moves: Any):
    """50 steps of 1.5e-3 from 1. A master is rounded once (2^-9); the mean of 4,096 items, each of
    which took 50 random steps of up to 2^-8, is right within six deviations."""
    given = parameters()
    stepped(make(given, choice), 1.0, steps=50)
    for name, (_, parameter) in given.items():
        wanted = 1 - 50 * 1.5e-3 if name in moves else 1.0
        mean = float(parameter.detach().float().mean())
        is_random = choice == "stochastic" and name == "matrix"
        limit = 6 * 2**-8 * math.sqrt(50 / 4096) / 2 if is_random else 2**-9
        assert abs(mean - wanted) <= limit, name


@each_choice
def test_second_moments_decay(choice: Bf16Update):
    """By 0.999 a step: 300 steps without a gradient leave 0.741. In bf16 to the nearest, a decay by
    0.1% rounds back. Each of 300 draws is off by at most 2^-8 of what it rounds: six deviations of
    the mean of 4,096 items are below 2^-7 of it."""
    given = parameters()
    optimizer = make(given, choice)
    stepped(optimizer, 1.0, steps=5)
    moments = {name: optimizer.state[each]["exp_avg_sq"] for name, (_, each) in given.items()}
    before = {name: float(each.float().mean()) for name, each in moments.items()}
    stepped(optimizer, 0.0, steps=300)
    for name, (_, parameter) in given.items():
        left = float(optimizer.state[parameter]["exp_avg_sq"].float().mean()) / before[name]
        nearest = choice == "plain" or (choice == "vectors" and name == "matrix")
        wanted = 1.0 if nearest else 0.999**300
        assert left == pytest.approx(wanted, rel=0 if nearest else 2**-7), name


def test_small_gradients_of_many_micro_batches_add_up():
    """2^-9 added to 1 in bf16 rounds back, 64 times; in fp32 it makes 2^-3, exactly."""

    def gradient(choice: Bf16Update, num_micro_batches: int) -> Tensor:
        given = parameters()
        low_precision.widen_gradients(given, choice, num_micro_batches)
        parameter = given["norm"][1]
        for size in (1.0, *[2.0**-9] * 64):
            (parameter * torch.tensor(size, dtype=torch.bfloat16)).sum().backward()
        assert parameter.grad is not None
        return parameter.grad

    for choice in WHOLE:
        wide = gradient(choice, 65)
        assert wide.dtype == torch.float32
        assert bool((wide == 1.125).all())
    narrow = gradient("plain", 65)
    assert narrow.dtype == torch.bfloat16
    assert bool((narrow == 1).all())
    assert gradient("masters", 1).dtype == torch.bfloat16


def test_a_master_follows_what_is_done_to_its_parameter():
    """An event, or weights that are loaded: the items that were changed, and no other."""
    given = parameters()
    optimizer = make(given, "masters")
    stepped(optimizer, 1.0, steps=3)
    parameter = given["matrix"][1]
    before = optimizer.state[parameter][MASTER].clone()
    with torch.no_grad():
        parameter[0] = 5.0
    stepped(optimizer, 0.0)
    after = optimizer.state[parameter][MASTER]
    assert bool((after[0] > 4.9).all())
    # The momentum goes on with a step of at most the rate.
    assert float((after[1:] - before[1:]).abs().max()) <= 1.6e-3
    assert torch.equal(parameter, after.to(torch.bfloat16))


@each_whole_choice
def test_what_an_optimizer_forgets_is_no_master(choice: Bf16Update):
    given = parameters()
    optimizer = make(given, choice)
    stepped(optimizer, 1.0, steps=3)
    for name, (_, parameter) in given.items():
        before = optimizer.state[parameter].get(MASTER)
        before = None if before is None else before.clone()
        forget(optimizer, parameter, Forget(name), torch.Generator())
        state = optimizer.state[parameter]
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
        assert (before is None) == (MASTER not in state)
        if before is not None:
            assert torch.equal(state[MASTER], before)


# --- whole runs -----------------------------------------------------------------------------------


def bf16(corpus: Path, choice: Bf16Update, **train: Any) -> RunConfig:
    words = {"precision": "bf16", "bf16_update": choice, "eval_every_steps": 0, **train}
    return tiny(corpus, train=words)


def still(folder: Path, config: RunConfig) -> list[str]:
    """Trained tensors that end as they began."""
    saved = checkpoint.newest(folder)
    assert saved is not None
    model = load_model(saved)
    first = build(model.spec, config.train.seed, dtype=torch.bfloat16)
    return [
        name
        for name, (_, parameter) in model.trained().items()
        if torch.equal(parameter, first.get_parameter(name))
    ]


@each_whole_choice
def test_every_trained_tensor_of_a_run_moves(corpus: Path, tmp_path: Path, choice: Bf16Update):
    config = bf16(corpus, choice, steps=50, save_every_steps=0)
    run(config, tmp_path / "run")
    assert still(tmp_path / "run", config) == []


def test_in_plain_bf16_norms_of_a_run_stay(corpus: Path, tmp_path: Path):
    """And no gain: those are fp32 under every choice. The control of the test above."""
    config = bf16(corpus, "plain", steps=50, save_every_steps=0)
    run(config, tmp_path / "run")
    found = still(tmp_path / "run", config)
    assert found
    assert all("norm" in name for name in found)


@each_choice
def test_a_bf16_run_resumes_to_the_bit(corpus: Path, tmp_path: Path, choice: Bf16Update):
    config = bf16(corpus, choice, steps=6, save_every_steps=3, micro_batch_size=4)
    for name in ("whole", "halves"):
        run(config, tmp_path / name)
    (tmp_path / "halves" / "checkpoints" / "step_6").rename(tmp_path / "aside")
    run(config, tmp_path / "halves", resume=True)
    ours, wanted = (checkpoint.newest(tmp_path / name) for name in ("halves", "whole"))
    assert ours is not None
    assert wanted is not None
    assert_same(ours.weights(), wanted.weights())
    assert_same(ours.state()["optimizer"], wanted.state()["optimizer"])
    dtypes = {name: weight.dtype for name, weight in ours.weights().items()}
    assert {dtypes.pop(name) for name in list(dtypes) if name.endswith(".beta")} == {torch.float32}
    assert set(dtypes.values()) == {torch.bfloat16}


def test_a_resumed_run_keeps_its_choice(corpus: Path, tmp_path: Path):
    run(bf16(corpus, "vectors", steps=1), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^--train\.bf16-update was 'vectors'"):
        run(bf16(corpus, "masters", steps=2), tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", optimizers.names())
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_bytes_are_those_of_the_closed_form(name: str, num_micro_batches: int):
    for choice in CHOICES:
        config = override(
            RunConfig(model=small_model()),
            data={"sequence_length": 8},
            optimizer={"name": name},
            train={
                "precision": "bf16",
                "bf16_update": choice,
                "batch_size": 4,
                "micro_batch_size": 4 // num_micro_batches,
            },
        )
        work = workload(config)
        states = work.state_bytes
        probe = Probe(work, torch.device("cpu"), rounds=1)
        assert probe.state() == states | {"total": sum(states.values())}, choice


def test_bytes_of_an_item():
    """Weight, gradient and state of a matrix under AdamW, as the help has them."""
    found = {}
    for choice in CHOICES:
        for micro_batch_size in (8, 4):
            train = {"batch_size": 8, "micro_batch_size": micro_batch_size, "precision": "bf16"}
            config = override(
                RunConfig(), model={"linear": "full"}, train=train | {"bf16_update": choice}
            )
            work = workload(config)
            total = sum(work.state_bytes.values())
            found[choice, micro_batch_size] = round(total / work.num_parameters(), 1)
    wanted = {"masters": (16.0, 18.0), "vectors": (8.0, 10.0), "stochastic": (8.0, 10.0)}
    for choice, each in (wanted | {"plain": (8.0, 8.0)}).items():
        assert (found[choice, 8], found[choice, 4]) == each


# --- the gain -------------------------------------------------------------------------------------

GAIN = 1.003
"""Not a bf16 number: the nearest are 1 and 1.0078."""


def test_gains_are_fp32_in_a_bf16_model():
    """Whatever the parameterization, the stream and the choice."""
    for linear, stream in (("crnet", "residual"), ("lax", "residual"), ("full", "attnres")):
        options = {"lax": {"gate": "scalar"}} if linear == "lax" else {}
        config = override(
            RunConfig(model=small_model()), model={"linear": linear, "stream": stream, **options}
        )
        spec = model_spec(config.model)
        model = build(spec, 0, dtype=torch.bfloat16)
        found = {
            model.get_parameter(name).dtype
            for name, tensor in spec.tensors.items()
            if tensor.role == "gain"
        }
        assert found == {torch.float32}, (linear, stream)
        loss, _ = model(*batch())
        loss.backward()


@pytest.mark.parametrize("how", ["bf16", "bf16-mixed", "rebuilt"])
def test_a_map_multiplies_its_carry_with_the_gain_in_fp32(how: str):
    """One rounding, of the product: with A = 0 the map is its carried part alone."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if how == "bf16-mixed" else torch.bfloat16
    x = torch.randn(2, 3, 4, generator=generator).to(dtype)
    a, b = torch.zeros(4, 2, dtype=dtype), torch.randn(2, 5, generator=generator).to(dtype)
    carry = torch.randn(2, 3, 5, generator=generator).to(torch.bfloat16).requires_grad_()
    slope = torch.randn(2, 3, 5, generator=generator).to(torch.bfloat16)
    gain = torch.tensor([GAIN], requires_grad=True)
    wanted = (carry.detach().float() * GAIN).to(torch.bfloat16)
    assert not torch.equal(wanted, carry)
    if how == "rebuilt":
        with torch.no_grad():
            y = up_project(torch.zeros(2, 3, 2, dtype=dtype), b, carry, gain)
        assert torch.equal(y, wanted)
        return
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16-mixed"):
        y = carried_lowrank(x, a, b, carry, gain)
    assert torch.equal(y, wanted)
    y.backward(slope)
    assert carry.grad is not None
    assert torch.equal(carry.grad, (slope.float() * GAIN).to(torch.bfloat16))
    assert gain.grad is not None
    exact = float((slope.double() * carry.detach().double()).sum())
    assert float(gain.grad) == pytest.approx(exact, rel=2**-8)  # products may round to bf16
