"""Closed forms against what is counted: bytes and FLOPs exactly, peaks within a stated share."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crnet.config import presets
from crnet.config.check import parse_layers
from crnet.config.sections import ModelConfig, RunConfig
from crnet.config.serialize import override
from crnet.cost import activations as cost
from crnet.cost.activations import Plan, Step
from crnet.errors import ConfigError
from crnet.linears.crnet import CRNetOptions
from crnet.measure.memory import peak_bytes, saved_bytes
from crnet.model.backbone import LanguageModel, build
from crnet.recompute.engine import Recomputation

GIB = 2**30


def random_case(seed: int) -> tuple[Step, Plan]:
    """A small configuration and a plan, both drawn; every option turns up among 40 seeds."""
    draw = random.Random(seed)
    heads = draw.choice([2, 4])
    hidden = heads * draw.choice([8, 16])
    layers = draw.randint(2, 9)
    linear = draw.choice(["crnet", "crnet", "crnet", "lowrank", "full"])
    ranks = draw.choice(["4", "0.25h/k=2", "3/down=5/gate=7"])
    if linear == "crnet" and draw.random() < 0.3:
        ranks = ",".join(str(draw.randint(1, 8)) for _ in range(layers - 1))
    model = ModelConfig(
        linear=linear,
        rank=ranks,
        hidden_size=hidden,
        intermediate_size=draw.choice([40, 96]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=draw.choice([None, 1, heads // 2]),
        vocab_size=draw.choice([53, 131]),
        tie_embeddings=draw.random() < 0.3,
        crnet=CRNetOptions(
            first_rank=draw.choice([None, None, 3]),
            carry_dtype=draw.choice(["compute", "compute", "fp32"]),
        ),
    )
    step = Step(model, draw.randint(1, 4), draw.randint(5, 40), draw.choice(PRECISIONS))
    policy = draw.choice(["none", "block", "replay", "replay", "invert"])
    if policy == "invert" and linear != "crnet":
        policy = "replay"
    kept = tuple(sorted(draw.sample(range(2, layers + 1), draw.randint(0, min(3, layers - 1)))))
    keep_attention = policy in ("replay", "invert") and draw.random() < 0.4
    return step, Plan(policy, kept, keep_attention, tolerance=draw.choice([0.02, 0.3]))


PRECISIONS = ("fp32", "bf16-mixed", "bf16")


def built(step: Step, plan: Plan) -> LanguageModel:
    model = build(step.model, seed=0)
    if step.precision == "bf16":
        model.bfloat16()
    model.model.recomputation = Recomputation(plan)
    return model


def autocast(step: Step) -> contextlib.AbstractContextManager[None]:
    return torch.autocast("cpu", torch.bfloat16, enabled=step.precision == "bf16-mixed")


def batch(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    assert step.model.vocab_size
    shape = (step.sequences, step.length)
    tokens, targets = (
        torch.randint(0, step.model.vocab_size, shape, generator=generator) for _ in range(2)
    )
    return tokens, targets


def seen_by_hooks(step: Step, terms: dict[str, int]) -> int:
    """torch's own loss, fp32 and not too small, keeps the head's gradients where no hook looks."""
    model = step.model
    hidden = (
        step.precision == "fp32"
        and step.rows >= model.hidden_size
        and (model.vocab_size or 0) > model.hidden_size
        and hasattr(torch.nn, "LinearCrossEntropyOptions")
    )
    unseen = ("head input gradient", "head weight gradient") if hidden else ()
    return sum(size for term, size in terms.items() if term not in unseen)


def test_random_cases_cover_every_option():
    cases = [random_case(seed) for seed in range(40)]
    assert {plan.policy for _, plan in cases} == {"none", "block", "replay", "invert"}
    assert {step.precision for step, _ in cases} == set(PRECISIONS)
    for key, values in {
        "linear": {"crnet", "lowrank", "full"},
        "tie_embeddings": {False, True},
    }.items():
        assert {getattr(step.model, key) for step, _ in cases} == values
    assert {plan.keep_attention for _, plan in cases} == {False, True}
    assert {step.model.crnet.first_rank for step, _ in cases} == {None, 3}
    assert {step.model.crnet.carry_dtype for step, _ in cases} == {"compute", "fp32"}


@pytest.mark.parametrize("seed", range(40))
def test_saved_bytes_are_exact(seed: int):
    step, plan = random_case(seed)
    model = built(step, plan)
    with autocast(step):
        counted = saved_bytes(model, *batch(step))
    recomputation = model.model.recomputation
    assert recomputation is not None
    terms = cost.saved_activations(step, plan, recomputation.added)
    assert counted == seen_by_hooks(step, terms), terms


@pytest.mark.parametrize("policy", ["none", "block", "replay", "invert"])
def test_saved_bytes_are_exact_for_llama_60m(policy: str):
    """The preset's own shape, ranks and tokenizer size; two short rows."""
    model = dataclasses.replace(presets.get("llama-60m").model, vocab_size=32000)
    step = Step(model, 2, 256)
    plan = Plan(policy, {"replay": (5,), "invert": (4,)}.get(policy, ()), tolerance=1.0)
    terms = cost.saved_activations(step, plan)
    assert saved_bytes(built(step, plan), *batch(step)) == seen_by_hooks(step, terms)


def uniform(num_layers: int) -> ModelConfig:
    """One rank everywhere, ungrouped keys: what eq. 38 and 39 are about."""
    return ModelConfig(
        hidden_size=32,
        intermediate_size=96,
        num_layers=num_layers,
        num_heads=4,
        rank="8",
        vocab_size=53,
    )


@pytest.mark.parametrize(("num_layers", "kept"), [(4, (4,)), (8, (8,)), (9, (4, 8)), (16, (8,))])
def test_invert_keeps_what_equation_38_says(num_layers: int, kept: tuple[int, ...]):
    model = uniform(num_layers)
    h, f, r, rows = model.hidden_size, model.intermediate_size, int(model.rank), 4 * 16
    terms = cost.saved_activations(Step(model, 4, 16), Plan("invert", kept))
    b = len({*kept, num_layers})
    printed = (num_layers + 5 * b) * rows * h + 2 * b * rows * f + 7 * (num_layers - 1) * rows * r
    assert terms["stream"] + terms["outputs"] + terms["bottlenecks"] == 4 * printed
    named = {"tokens", "last norm", "head input gradient", "head weight gradient"}
    others = {term for term, size in terms.items() if size} - {"stream", "outputs", "bottlenecks"}
    assert others == named


@pytest.mark.parametrize(("num_layers", "kept"), [(4, (4,)), (9, (4, 8)), (16, (8, 16))])
def test_invert_repeats_what_equation_39_says(num_layers: int, kept: tuple[int, ...]):
    model = uniform(num_layers)
    h, f, r, s = model.hidden_size, model.intermediate_size, int(model.rank), 16
    b = len({*kept, num_layers})
    # The print counts gate and up's products, 4 s f r, and five of width h; L - |A| layers.
    printed = (num_layers - b) * (10 * s * h * r + 4 * s * f * r) + 4 * num_layers * s * s * h
    flops = cost.block_flops(Step(model, 3, s), Plan("invert", kept))
    assert flops["recompute"] == 3 * printed


@pytest.mark.parametrize("seed", range(40))
def test_flops_of_the_backward_pass_are_exact(seed: int):
    """Torch's counter, MATH attention (the counter does not know the CPU's fused one)."""
    step, plan = random_case(seed)
    step = dataclasses.replace(step, precision="fp32")
    model = built(step, plan)
    with sdpa_kernel(SDPBackend.MATH):
        loss, _ = model(*batch(step))
        with FlopCounterMode(display=False) as counter:
            loss.backward()
    recomputation = model.model.recomputation
    assert recomputation is not None
    flops = cost.block_flops(step, plan, recomputation.added)
    assert counter.get_total_flops() == flops["backward"] + flops["recompute"]


def test_flops_of_the_forward_pass_are_exact():
    step, plan = random_case(0)
    model = built(step, plan)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(batch(step)[0])
    assert counter.get_total_flops() == cost.block_flops(step, plan)["forward"]


# --- the peak -------------------------------------------------------------------------------------

WIDE = ModelConfig(
    hidden_size=128,
    intermediate_size=344,
    num_layers=10,
    num_heads=4,
    vocab_size=500,
    rank="32",
)
PEAK_CHANGES: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 1},
    {"crnet": CRNetOptions(carry_dtype="fp32")},
    {"linear": "lowrank"},
    {"linear": "full"},
]
PEAK_PLANS = [
    Plan(),
    Plan("block"),
    Plan("replay", (5, 8)),
    Plan("replay", (4,), keep_attention=True),
    Plan("invert", (4,), tolerance=9.0),
]


PEAK_CASES = [
    pytest.param(plan, changes, id=f"{plan.policy}-{plan.keep_attention}-{changes}")
    for plan in PEAK_PLANS
    for changes in PEAK_CHANGES
    if plan.policy != "invert" or "linear" not in changes  # it is for maps with a carry
]


@pytest.mark.parametrize(("plan", "changes"), PEAK_CASES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_peak_is_within_five_percent(plan: Plan, precision: str, changes: dict[str, Any]):
    """Against a trace of every allocation of a micro-batch; gradients of parameters exist before,
    as in every micro-batch but the first."""
    step = Step(dataclasses.replace(WIDE, **changes), 4, 128, precision)
    model = built(step, plan)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens, targets = batch(step)

    def run() -> None:
        with autocast(step):
            loss, _ = model(tokens, targets)
        loss.backward()

    run()
    traced = peak_bytes(run)
    predicted = cost.peak_activations(step, plan) - 8 * step.rows  # the tokens exist before
    assert abs(predicted / traced - 1) < 0.05, (predicted, traced)


# --- the choice of segments -----------------------------------------------------------------------


@pytest.mark.parametrize("linear", ["crnet", "lowrank", "full"])
@pytest.mark.parametrize("num_layers", [1, 2, 5, 9, 10])
@pytest.mark.parametrize("keep_attention", [False, True])
def test_least_peak_is_the_least_of_all(linear: str, num_layers: int, keep_attention: bool):
    """Every set of segments tried, with a head so small that the blocks decide."""
    model = dataclasses.replace(WIDE, linear=linear, num_layers=num_layers, vocab_size=53)
    step = Step(model, 4, 64)

    def peak(layers: tuple[int, ...]) -> int:
        return cost.peak_activations(step, Plan("replay", layers, keep_attention))

    every = itertools.chain.from_iterable(
        itertools.combinations(range(1, num_layers), count) for count in range(num_layers)
    )
    assert peak(cost.least_peak(step, keep_attention)) == min(map(peak, every))


def test_segments_grow_by_one_from_the_top():
    """Where outputs are nearly all there is: rank 1."""
    model = dataclasses.replace(WIDE, num_layers=60, rank="1", vocab_size=53)
    layers = cost.least_peak(Step(model, 4, 64))
    lengths = [top - bottom for bottom, top in cost.segments(Plan("replay", layers), 60)][::-1]
    # The bottom segment spends one layer more for free: its first outputs are kept in any case.
    growth = [below - above for above, below in itertools.pairwise(lengths[:-1])]
    assert set(growth) <= {0, 1, 2}
    assert sum(growth) >= len(growth) - 2
    assert abs(len(lengths) - (2 * 60) ** 0.5) < 3


def test_a_head_that_decides_the_peak_wants_less_kept():
    """At the 130M shape and 1,024 tokens the peak is the loss's, so one kept layer is best."""
    model = dataclasses.replace(presets.get("llama-130m").model, vocab_size=32000)
    assert cost.least_peak(Step(model, 4, 256)) == (7,)
    assert len(cost.least_peak(Step(model, 64, 256))) == 3


def test_replay_at_the_130m_shape_keeps_less_than_promised():
    model = dataclasses.replace(presets.get("llama-130m").model, vocab_size=32000)
    step = Step(model, 4, 256)
    terms = cost.saved_activations(step, Plan("replay", cost.least_peak(step)))
    kept = sum(size for term, size in terms.items() if term != "head weight gradient")
    assert kept <= 170 * 2**20


# --- plans from a configuration -------------------------------------------------------------------


def config(**train: object) -> RunConfig:
    base = presets.get("llama-60m")
    return override(base, model={"vocab_size": 32000}, train={"micro_batch_size": 4, **train})


def test_none_is_the_default():
    assert cost.plan(config()) == Plan()


def test_invert_keeps_every_eighth_by_default():
    deep = override(config(recompute="invert"), model={"num_layers": 20, "rank": "64"})
    assert cost.plan(deep).kept_layers == (8, 16)


def test_replay_takes_the_layers_given():
    assert cost.plan(config(recompute="replay", recompute_layers="3,8")).kept_layers == (3,)
    assert cost.plan(config(recompute="replay", recompute_layers="every-3")).kept_layers == (3, 6)


def test_auto_takes_the_fastest_that_fits():
    """Budgets just above and just below each policy's peak, from generous to tight."""
    step = Step(config().model, 4, 256)
    found = []
    budget = 10 * GIB
    with contextlib.suppress(ConfigError):
        while True:
            plan = cost.cheapest(step, budget)
            found.append((plan.policy, plan.keep_attention))
            peak = cost.peak_activations(step, plan)
            assert peak <= budget
            budget = peak - 1
    assert found[0] == ("none", False)
    assert ("replay", True) in found
    flops = []
    for policy, keep in found:
        layers = cost.least_peak(step, keep) if policy == "replay" else parse_layers("every-8", 8)
        flops.append(cost.block_flops(step, Plan(policy, layers, keep))["recompute"])
    assert flops == sorted(flops)


def test_auto_names_the_least_that_would_do():
    asked = config(recompute="auto", activation_budget_gib=0.05)
    with pytest.raises(ConfigError, match=r"needs [0-9.]+ at least") as caught:
        cost.plan(asked)
    needed = float(str(caught.value).split("needs ")[1].split(" ")[0])
    fitting = config(recompute="auto", activation_budget_gib=needed)
    assert cost.plan(fitting).policy in ("replay", "invert")
    less = config(recompute="auto", activation_budget_gib=needed - 0.002)
    with pytest.raises(ConfigError):
        cost.plan(less)


def test_auto_in_bf16_does_not_choose_invert():
    """What its guard keeps there hangs on the betas: no budget could be promised."""
    step = Step(config().model, 4, 256, "bf16")
    for budget in range(1, 400):
        with contextlib.suppress(ConfigError):
            assert cost.cheapest(step, budget * 2**20).policy != "invert"


@pytest.mark.parametrize(
    ("text", "layers"), [("3", (3,)), ("4,2,4", (2, 4)), ("every-8", ()), ("every-3", (3, 6))]
)
def test_layers_are_read(text: str, layers: tuple[int, ...]):
    assert parse_layers(text, 7) == layers


@pytest.mark.parametrize("text", ["", "0", "8", "3-5", "every-0", "every 2", "a", "1,,2"])
def test_layers_that_cannot_be_read(text: str):
    with pytest.raises(ValueError, match=r"--train\.recompute-layers"):
        parse_layers(text, 7)
