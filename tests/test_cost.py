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

from crnet import architectures, linears, streams
from crnet.config import presets
from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig, RunConfig, TrainConfig, field_name
from crnet.config.serialize import override
from crnet.cost.flops import block_flops
from crnet.cost.kept import kept_bytes
from crnet.cost.micro_batch import MicroBatch, Precision
from crnet.cost.peak import peak_bytes
from crnet.cost.plan_choice import cheapest, least_peak, plan_of, policies
from crnet.cost.workload import workload
from crnet.errors import ConfigError
from crnet.measure import memory
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from crnet.recompute.plan import RecomputePlan, parse_layers, segments

GIB = 2**30
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16-mixed", "bf16")


def random_case(linear: str, precision: Precision) -> MicroBatch:
    """A small micro-batch of a parameterization; its options are its ``examples`` in turn."""
    draw = random.Random(f"{linear} {precision}")
    method = linears.get(linear)
    choices = [] if method.Options is None else [method.Options(), *method.examples]
    options = {}
    if choices:
        options[field_name(linear)] = choices[PRECISIONS.index(precision) % len(choices)]
    heads = draw.choice([2, 4])
    layers = draw.randint(2, 6)
    model = ModelConfig(
        linear=linear,
        rank=draw.choice(["4", "0.25h/k=2", "3/down=5/gate=7"]),
        hidden_size=heads * draw.choice([8, 16]),
        intermediate_size=draw.choice([40, 96]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=draw.choice([None, 1, heads // 2]),
        vocab_size=draw.choice([53, 131]),
        tie_embeddings=draw.random() < 0.3,
        **options,
    )
    return MicroBatch(model_spec(model), draw.randint(1, 4), draw.randint(5, 40), precision)


def random_plans(micro_batch: MicroBatch) -> list[RecomputePlan]:
    """One of every policy that the model can have, and with attention kept."""
    spec = micro_batch.spec
    draw = random.Random(f"{spec.linear.name} {micro_batch.precision}")
    found = []
    for policy in policies(micro_batch):
        above = range(2, spec.num_layers + 1)
        layers = tuple(sorted(draw.sample(above, draw.randint(0, min(3, len(above))))))
        if policy in ("none", "block"):
            found.append(RecomputePlan(policy))
        else:
            for keep in (False, True):
                found.append(RecomputePlan(policy, layers, keep, draw.choice([0.02, 0.3])))
    return found


def built(micro_batch: MicroBatch) -> LanguageModel:
    dtype = torch.bfloat16 if micro_batch.precision == "bf16" else torch.float32
    model = build(micro_batch.spec, 0, dtype=dtype)
    model.run_events(0, 0)
    return model


def autocast(micro_batch: MicroBatch) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=micro_batch.is_mixed)


def batch(micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (micro_batch.sequences, micro_batch.length)
    vocab_size = micro_batch.spec.shape.vocab_size
    tokens, targets = (torch.randint(0, vocab_size, shape, generator=generator) for _ in range(2))
    return tokens, targets


def counted_bytes(model: LanguageModel, micro_batch: MicroBatch, plan: RecomputePlan) -> int:
    """By hooks, as in a step."""
    model.recompute(plan)
    with autocast(micro_batch), model.fixed_weights():
        return memory.saved_bytes(model, *batch(micro_batch))


def counted_flops(
    model: LanguageModel, micro_batch: MicroBatch, plan: RecomputePlan
) -> tuple[int, int]:
    """Forward without the head, and backward, by torch's counter; MATH attention (the counter does
    not know the CPU's fused one)."""
    model.recompute(plan)
    shape = micro_batch.spec.shape
    with sdpa_kernel(SDPBackend.MATH):
        with autocast(micro_batch):  # noqa: SIM117
            with FlopCounterMode(display=False) as forward:
                total, _ = model(*batch(micro_batch))
        with FlopCounterMode(display=False) as backward:
            total.backward()
    head = 6 * micro_batch.rows * shape.hidden_size * shape.vocab_size
    return forward.get_total_flops() - head, backward.get_total_flops()


@pytest.mark.parametrize("linear", linears.names())
@pytest.mark.parametrize("precision", PRECISIONS)
def test_kept_bytes_and_flops_are_exact(linear: str, precision: Precision):
    """Of every policy that the model can have."""
    micro_batch = random_case(linear, precision)
    model = built(micro_batch)
    for plan in random_plans(micro_batch):
        terms = kept_bytes(micro_batch, plan)
        assert counted_bytes(model, micro_batch, plan) == sum(terms.values()), (plan, terms)
        assert model.guard_added() == micro_batch.added_at_first(plan), plan
        if precision != "fp32" and plan.policy != "block":
            continue  # the same products, and the counter is slow
        flops = block_flops(micro_batch, plan)
        wanted = flops["forward"], flops["backward"] + flops["recompute"]
        assert counted_flops(model, micro_batch, plan) == wanted, plan


def test_random_cases_cover_every_option():
    cases = [random_case(linear, p) for linear in linears.names() for p in PRECISIONS]
    plans = [plan for case in cases for plan in random_plans(case)]
    assert {plan.policy for plan in plans} == {"none", "block", "replay", "invert"}
    assert {plan.keep_attention for plan in plans} == {False, True}
    assert {bool(plan.kept_layers) for plan in plans if plan.policy == "invert"} == {False, True}
    assert {case.spec.shape.tie_embeddings for case in cases} == {False, True}
    grouped = {case.spec.shape.num_kv_heads < case.spec.shape.num_heads for case in cases}
    assert grouped == {False, True}
    crnet = [case.spec.config.crnet for case in cases if case.spec.linear.name == "crnet"]  # type: ignore[attr-defined]
    assert {options.first_rank for options in crnet} == {None, 3}
    assert {options.carry_dtype for options in crnet} == {"compute", "fp32"}


def test_ranks_that_differ_by_block_are_exact():
    """CR-Net with another rank in every block, the guard of invert at work in the middle."""
    options = dataclasses.replace(TALL.crnet, beta_init=0.5)  # type: ignore[attr-defined]
    model = dataclasses.replace(TALL, rank="3,8,1,5,4,7,2,6", crnet=options)
    micro_batch = MicroBatch(model_spec(model), 2, 24, "bf16")
    for plan in (RecomputePlan("replay", (2, 5)), RecomputePlan("invert", (4,), tolerance=0.2)):
        counted = counted_bytes(built(micro_batch), micro_batch, plan)
        assert counted == sum(kept_bytes(micro_batch, plan).values())
    assert micro_batch.added_at_first(plan)


TALL = ModelConfig(
    hidden_size=32,
    intermediate_size=40,
    num_layers=9,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=53,
)


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
    terms = kept_bytes(MicroBatch(model_spec(model), 4, 16), RecomputePlan("invert", kept))
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
    flops = block_flops(MicroBatch(model_spec(model), 3, s), RecomputePlan("invert", kept))
    assert flops["recompute"] == 3 * printed


# --- the peak -------------------------------------------------------------------------------------

WIDE = ModelConfig(
    hidden_size=128,
    intermediate_size=344,
    num_layers=10,
    num_heads=4,
    vocab_size=500,
    rank="32",
)
PEAK_PLANS = {
    "none": RecomputePlan(),
    "block": RecomputePlan("block"),
    "replay": RecomputePlan("replay", (3, 5)),
    "replay, attention kept": RecomputePlan("replay", (4,), keep_attention=True),
    "invert": RecomputePlan("invert", (4,), tolerance=9.0),
}
BASE_CHANGES: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 1},
    {"crnet": dataclasses.replace(WIDE.crnet, carry_dtype="fp32")},  # type: ignore[attr-defined]
]


def peak_cases() -> list[Any]:
    """The default parameterization under every plan, variants and the others under every policy
    that they can have. Precisions take turns: every policy meets every one, every method too."""
    found = []
    names = [name for name in linears.names() if name != WIDE.linear]
    others: list[dict[str, Any]] = [{"linear": name} for name in names]
    others += [{"stream": name} for name in streams.names() if name != WIDE.stream]
    others += [
        {"architecture": name, "num_kv_heads": None}
        for name in architectures.names()
        if name != WIDE.architecture
    ]
    changes = [*BASE_CHANGES, *others]
    for row, change in enumerate(changes):
        is_base = row < len(BASE_CHANGES)
        model = dataclasses.replace(WIDE, num_layers=10 if is_base else 6, **change)
        micro_batch = MicroBatch(model_spec(model), 4, 128 if is_base else 96)
        known = policies(micro_batch)
        plans = [name for name, plan in PEAK_PLANS.items() if plan.policy in known]
        if row and "replay" in plans:  # attention kept by turns
            plans.remove(("replay", "replay, attention kept")[row % 2])
        for column, name in enumerate(plans):
            precision = PRECISIONS[(row + column) % 3]
            case = dataclasses.replace(micro_batch, precision=precision)
            label = f"base{row}" if is_base else str(next(iter(change.values())))
            # One in seven by turns here, the others among the slow tests.
            marks = [pytest.mark.slow] if len(found) % 7 else []
            found.append(pytest.param(case, name, id=f"{label}-{name}-{precision}", marks=marks))
    return found


@pytest.mark.parametrize(("micro_batch", "name"), peak_cases())
def test_peak_is_within_five_percent(micro_batch: MicroBatch, name: str):
    """Against a trace of every allocation of a micro-batch; gradients of parameters exist before,
    as in every micro-batch but the first. Attention Residuals below fp32 are off by up to 9%: what
    their reads cast for a moment of the backward pass is not in the closed form."""
    plan = PEAK_PLANS[name]
    casts = micro_batch.spec.stream.name == "attnres" and micro_batch.precision != "fp32"
    model = built(micro_batch)
    model.recompute(plan)
    for _, parameter in model.trained().values():
        parameter.grad = torch.zeros_like(parameter)
    tokens, targets = batch(micro_batch)

    def run() -> None:
        with model.fixed_weights():
            with autocast(micro_batch):
                total, _ = model(tokens, targets)
            total.backward()

    run()
    traced = memory.peak_bytes(run)
    predicted = peak_bytes(micro_batch, plan) - 8 * micro_batch.rows  # the tokens exist before
    assert abs(predicted / traced - 1) < (0.1 if casts else 0.05), (predicted, traced)


def test_the_peak_counts_what_the_guard_adds():
    """Outputs that the guard keeps weigh as much as those that the plan names."""
    micro_batch = MicroBatch(model_spec(WIDE), 4, 128)
    added = {position.name: (4, 7) for position in micro_batch.spec.positions}
    plain, named = (RecomputePlan("invert", layers, tolerance=9.0) for layers in ((), (4, 7)))
    assert peak_bytes(micro_batch, plain, added) == peak_bytes(micro_batch, named, {})
    assert peak_bytes(micro_batch, plain, {}) != peak_bytes(micro_batch, named, {})


# --- the choice of segments -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("linear", "num_layers", "keep_attention"),
    [
        *(("crnet", layers, layers % 2 == 0) for layers in (1, 2, 5, 9, 10)),
        ("crnet", 9, True),
        *(("lowrank", layers, layers % 2 == 1) for layers in (1, 5, 10)),
        *(("full", layers, layers % 2 == 0) for layers in (2, 9)),
        *(("resformer", layers, layers % 2 == 0) for layers in (5, 10)),
    ],
)
def test_least_peak_is_the_least_of_all(linear: str, num_layers: int, keep_attention: bool):
    """Every set of segments tried, with a head so small that the blocks decide."""
    model = dataclasses.replace(WIDE, linear=linear, num_layers=num_layers, vocab_size=53)
    micro_batch = MicroBatch(model_spec(model), 4, 64)

    def peak(layers: tuple[int, ...]) -> int:
        return peak_bytes(micro_batch, RecomputePlan("replay", layers, keep_attention))

    every = itertools.chain.from_iterable(
        itertools.combinations(range(1, num_layers), count) for count in range(num_layers)
    )
    assert peak(least_peak(micro_batch, keep_attention)) == min(map(peak, every))


def test_segments_grow_by_one_from_the_top():
    """Where outputs are nearly all there is: rank 1."""
    model = dataclasses.replace(WIDE, num_layers=60, rank="1", vocab_size=53)
    layers = least_peak(MicroBatch(model_spec(model), 4, 64))
    lengths = [top - bottom for bottom, top in segments(RecomputePlan("replay", layers), 60)][::-1]
    # The bottom segment spends one layer more for free: its first outputs are kept in any case.
    growth = [below - above for above, below in itertools.pairwise(lengths[:-1])]
    assert set(growth) <= {0, 1, 2}
    assert sum(growth) >= len(growth) - 2
    assert abs(len(lengths) - (2 * 60) ** 0.5) < 3


def test_a_head_that_decides_the_peak_wants_less_kept():
    """At the 130M shape, 1,024 tokens and a large vocabulary the peak is the loss's, so one kept
    layer is best."""
    model = dataclasses.replace(presets.get("llama-130m").model, vocab_size=64_000)
    assert least_peak(MicroBatch(model_spec(model), 4, 256)) == (7,)
    model = dataclasses.replace(model, vocab_size=32_000)
    assert len(least_peak(MicroBatch(model_spec(model), 64, 256))) == 3


def test_replay_at_the_130m_shape_keeps_less_than_promised():
    model = dataclasses.replace(presets.get("llama-130m").model, vocab_size=32000)
    micro_batch = MicroBatch(model_spec(model), 4, 256)
    terms = kept_bytes(micro_batch, RecomputePlan("replay", (7,)))
    kept = sum(size for term, size in terms.items() if term != "head weight gradient")
    assert kept <= 170 * 2**20


# --- plans from a configuration -------------------------------------------------------------------


def config(**train: object) -> RunConfig:
    base = presets.get("llama-60m")
    return override(base, model={"vocab_size": 32000}, train={"micro_batch_size": 4, **train})


def plan_for(config: RunConfig) -> RecomputePlan:
    return workload(config).plan


def test_none_is_the_default():
    assert plan_for(config()) == RecomputePlan()


def test_invert_keeps_every_eighth_by_default():
    deep = override(config(recompute="invert"), model={"num_layers": 20, "rank": "64"})
    assert plan_for(deep).kept_layers == (8, 16)


def test_replay_takes_the_layers_given():
    assert plan_for(config(recompute="replay", recompute_layers="3,8")).kept_layers == (3,)
    assert plan_for(config(recompute="replay", recompute_layers="every-3")).kept_layers == (3, 6)


def chosen(micro_batch: MicroBatch) -> list[RecomputePlan]:
    """What auto takes with budgets just above and just below each choice's peak, from generous to
    the least that anything fits."""
    found, budget = [], 10 * GIB
    with contextlib.suppress(ConfigError):
        while True:
            plan = cheapest(micro_batch, budget)
            found.append(plan)
            peak = peak_bytes(micro_batch, plan)
            assert peak <= budget
            budget = peak - 1
    return found


def test_auto_takes_the_fastest_that_fits():
    micro_batch = MicroBatch(model_spec(config().model), 4, 256)
    found = chosen(micro_batch)
    assert found[0] == RecomputePlan()
    assert ("replay", True) in {(plan.policy, plan.keep_attention) for plan in found}
    flops = [block_flops(micro_batch, plan)["recompute"] for plan in found]
    assert flops == sorted(flops)


def test_auto_names_the_least_that_would_do():
    asked = config(recompute="auto", activation_budget_gib=0.05)
    with pytest.raises(ConfigError, match=r"needs [0-9.]+ at least") as caught:
        plan_for(asked)
    needed = float(str(caught.value).split("needs ")[1].split(" ")[0])
    fitting = config(recompute="auto", activation_budget_gib=needed)
    assert plan_for(fitting).policy in ("replay", "invert")
    less = config(recompute="auto", activation_budget_gib=needed - 0.002)
    with pytest.raises(ConfigError):
        plan_for(less)


def test_auto_in_bf16_does_not_choose_invert():
    """What its guard keeps there hangs on the betas: no budget could be promised."""
    micro_batch = MicroBatch(model_spec(config().model), 4, 256, "bf16")
    assert "invert" in policies(micro_batch)
    found = [plan.policy for plan in chosen(micro_batch)]
    assert {"none", "replay"} <= {*found} <= {"none", "block", "replay"}
    tight = TrainConfig(recompute="auto", activation_budget_gib=0.05)
    with pytest.raises(ConfigError, match=r"at least \(--train.recompute (block|replay)\)"):
        plan_of(micro_batch, tight)


@pytest.mark.parametrize(
    ("text", "layers"), [("3", (3,)), ("4,2,4", (2, 4)), ("every-8", ()), ("every-3", (3, 6))]
)
def test_layers_are_read(text: str, layers: tuple[int, ...]):
    assert parse_layers(text, 7) == layers


@pytest.mark.parametrize("text", ["", "0", "8", "3-5", "every-0", "every 2", "a", "1,,2"])
def test_layers_that_cannot_be_read(text: str):
    with pytest.raises(ValueError, match=r"--train\.recompute-layers"):
        parse_layers(text, 7)
