"""CR-Net's variants, each against its plain formula; the paper's ablations in one word.

A map with every option is held to what other methods' maps are (``test_linears_methods``): fp64
and bf16 against the formula, both halves to the bit, bytes and FLOPs exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import test_linears_methods as methods
from crnet import linears
from crnet.config import presets
from crnet.config.check import check, policy_problem
from crnet.config.check_tensor import parts_problems
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.cost.micro_batch import MicroBatch, Precision
from crnet.cost.traffic import micro_batch_passes
from crnet.errors import ConfigError
from crnet.linears.crnet import CRNetOptions
from crnet.measure import examples as small
from crnet.measure.traffic import traffic
from crnet.model.build import build
from crnet.model.events import run_events
from crnet.recompute.plan import RecomputePlan
from crnet.specs import Slot
from shapes import make, random_tokens, randomised, tiny

# --- one map --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case(methods.Case):
    """A map whose output is four heads."""

    @property
    def slot(self) -> Slot:
        return dataclasses.replace(super().slot, head_size=5)


def formula(options: CRNetOptions) -> Callable[[Any, Tensor, Tensor | None], Any]:
    """``gain * carry + h(x A) f(B)``, every part as the options' docstrings say it."""

    def naive(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        z, b = x @ m.A, m.B
        if options.norm:
            z = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if options.norm == "gain":
            z = z * m.norm
        if options.duplicate:  # rank 4, five columns for each
            ones = torch.zeros(4, 20, dtype=b.dtype)
            for idx in range(20):
                ones[idx // 5, idx] = 1
            b = b + options.duplicate / 5**0.5 * ones
        y = z @ b
        if carry is None:
            return y, y
        gain = torch.sign(m.beta) * (m.beta.abs() + 1e-6)
        if options.gain_warmup_steps:
            share = m.done / options.gain_warmup_steps
            gain = (1 - share) * options.gain_start + share * gain
        if options.gain == "head":
            gain = torch.cat([each.expand(5) for each in gain])
        y = gain * carry + y
        return y, y

    return naive


VARIANTS = {
    "head": CRNetOptions(gain="head"),
    "channel": CRNetOptions(gain="channel"),
    "channel-fixed": CRNetOptions(gain="channel", learnable_beta=False),
    "no-carry": CRNetOptions(carries="q,k"),
    "warm-up": CRNetOptions(gain_warmup_steps=10, gain_start=0.3),
    "warm-up-fixed": CRNetOptions(gain_warmup_steps=10, beta=0.5),
    "norm": CRNetOptions(norm="rms"),
    "norm-gain": CRNetOptions(norm="gain"),
    "duplicate": CRNetOptions(duplicate=1.5),
    "all": CRNetOptions(gain="head", gain_warmup_steps=10, norm="gain", duplicate=0.5),
    "first-block": CRNetOptions(first_rank=4, norm="gain", duplicate=0.5),
}
CASES = {
    name: Case("crnet", options, 0 if options.first_rank else 1, formula(options))
    for name, options in VARIANTS.items()
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@each_case
def test_formula(case: Case):
    """Output and every gradient, fp64, and under autocast."""
    methods.test_formula(case)
    methods.test_formula_under_autocast(case)


@each_case
@each_dtype
def test_halves_and_work(case: Case, dtype: torch.dtype):
    """Bit: both halves are the forward. Exact: FLOPs and bytes, of a recomputation too."""
    methods.test_comes_apart(case, dtype)
    methods.test_work(case, dtype)
    methods.test_work_of_a_recomputation(case, dtype)


@each_case
def test_the_output_below_follows(case: Case):
    """Eq. 7 of every variant, fp64: 1e-9, for the division by a small gain."""
    linear: Any = methods.make(case, torch.float64)
    x, carry = methods.inputs(case, torch.float64)
    if carry is None:
        return
    with torch.no_grad():
        output, _ = linear(x, carry)
        found = linear.carry_from(output, linear.down_project(x, carry))
        carry = carry.detach()
        gains = output - formula(case.options)(linear, x, torch.zeros_like(carry))[0]
        smallest = (gains / carry).abs().min()
    assert float((found - carry).abs().max()) < 1e-9
    assert linear.gain().shape == (1,)
    assert float(linear.gain().abs()) == pytest.approx(float(smallest), rel=1e-9)


def test_dense_weight():
    methods.test_dense_weight(CASES["duplicate"])
    with pytest.raises(NotImplementedError, match="not linear"):
        methods.make(CASES["norm"], torch.float32).dense_weight()


@pytest.mark.parametrize("position", ["v", "o"])
def test_shapes_of_gains(position: str):
    """A gain for each head where the output is heads, else one; for each channel everywhere."""
    width = {"v": 8, "o": 16}[position]
    counts = {"scalar": 1, "head": {"v": 2, "o": 1}[position], "channel": width}
    for gain, count in counts.items():
        spec = model_spec(tiny(crnet=CRNetOptions(gain=gain)))  # type: ignore[arg-type]
        found = {slot.position: spec.map_tensors(slot) for slot in spec.slots[1]}[position]
        assert found["beta"].shape == (count,)
        assert found["beta"].decays is False


def test_carries():
    """Only the named positions read; the others are plain low rank, and nothing is handed for
    them."""
    spec = model_spec(tiny(crnet=CRNetOptions(carries="q,k,v,gate,up")))
    assert [set(reads) for reads in spec.reads] == [set(), *[set("qkv") | {"gate", "up"}] * 2]
    assert [set(hands) for hands in spec.hands] == [*[set("qkv") | {"gate", "up"}] * 2, set()]
    assert "model.layers.1.self_attn.o_proj.beta" not in spec.tensors
    assert "invert" in (policy_problem(spec, "invert") or "")
    assert policy_problem(spec, "replay") is None
    assert policy_problem(model_spec(tiny(crnet=CRNetOptions(gain="channel"))), "invert") is None


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp32", CRNetOptions(gain="head", norm="gain")),
        ("bf16", CRNetOptions(gain="channel", norm="rms")),
        ("bf16-mixed", CRNetOptions(gain_warmup_steps=3, norm="gain", duplicate=1.0)),
    ],
)
def test_passes_are_what_operations_move(precision: Precision, options: CRNetOptions):
    """Of the eager step, bytes within 2% and kernels within 4%, as other maps' (test_clock)."""
    sizes = {"hidden_size": 256, "intermediate_size": 640, "vocab_size": 1000, "rank": "48"}
    micro_batch = MicroBatch(model_spec(tiny(crnet=options, **sizes)), 4, 128, precision)
    passes, _ = traffic(micro_batch)
    eager = micro_batch_passes(micro_batch).eager
    assert eager.moved_bytes == pytest.approx(passes.moved_bytes, rel=0.02)
    assert eager.kernels == pytest.approx(passes.kernels, rel=0.04)


# --- initial factors ------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "r", "f"), [(96, 24, 256), (256, 64, 96)])
def test_initial_factors(d: int, r: int, f: int):
    """orthogonal: every singular value of A B is init_std (D F / R)^1/2, to fp32's 1e-5. fans:
    items of A B of (D + F)^-1/2, within 2%."""
    slot, method = Slot("up", 1, 3, d, f, r, 0.02), linears.get("crnet")
    factors = {}
    for init in ("orthogonal", "fans"):
        options = CRNetOptions(init=init)  # type: ignore[arg-type]
        for name in ("A", "B"):
            spec = method.tensors(slot, options)[name]
            generator = torch.Generator().manual_seed(ord(name))
            if spec.init.kind == "own":
                value = method.initial_value(name, slot, options, lambda _, it=generator: it)
            else:
                value = torch.empty(spec.shape).normal_(0, spec.init.value, generator=generator)
            assert value.shape == spec.shape
            factors[init, name] = value.double()
    product = factors["orthogonal", "A"] @ factors["orthogonal", "B"]
    values = torch.linalg.svdvals(product)[:r]
    assert values.tolist() == pytest.approx([0.02 * (d * f / r) ** 0.5] * r, rel=1e-5)
    assert float(product.square().mean().sqrt()) == pytest.approx(0.02, rel=1e-5)
    product = factors["fans", "A"] @ factors["fans", "B"]
    assert float(product.std()) == pytest.approx((d + f) ** -0.5, rel=0.02)


# --- events ---------------------------------------------------------------------------------------


def small_run(**options: Any) -> small.Example:
    method = linears.get("crnet")
    example = small.examples(method)[0]
    model = dataclasses.replace(example.model, crnet=CRNetOptions(**options))
    return dataclasses.replace(example, model=model, is_default=False)


def gains(model: Any) -> list[float]:
    return [float(model.model.blocks()[1].maps[each].gain()) for each in ("q", "down")]


def test_the_gain_warms_up():
    """From the start to beta in a line, by what the events have counted; then it stays."""
    example = small_run(gain_warmup_steps=4, gain_start=0.2, beta=1.0)
    model = example.build()
    optimizer = example.build_optimizer(model)
    seen = [gains(model)]
    for step in range(1, 7):
        run_events(model, optimizer, step, seed=0)
        seen.append(gains(model))
    wanted = [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0]
    for found, value in zip(seen, wanted, strict=True):
        assert found == pytest.approx([value] * 2, abs=2e-6)  # eps of eq. 6
    assert [model.has_events(step) for step in range(6)] == [False, *[True] * 4, False]
    saved = model.state_dict()
    again = example.build(seed=1)
    again.load_state_dict(saved)
    assert gains(again) == seen[-1]


def test_a_warm_up_holds_back_the_gradient_of_beta():
    """The slope of the gain is the share that is done."""
    found = []
    for done in (1.0, 3.0):
        linear: Any = methods.make(CASES["warm-up"], torch.float64)
        linear.done.data.fill_(done)
        x, carry = methods.inputs(CASES["warm-up"], torch.float64)
        linear(x, carry)[0].sum().backward()
        found.append(float(linear.beta.grad))
    assert found[1] == pytest.approx(3 * found[0], rel=1e-12)


@pytest.mark.parametrize("more", [{}, {"duplicate": 1.0}, {"first_rank": 3}, {"carries": "q,up"}])
@torch.no_grad()
def test_refactoring_changes_no_output(more: dict[str, Any]):
    """Logits stay, fp64 1e-12; factors are balanced; the optimizer forgets both."""
    example = small_run(refactor_every=3, **more)
    model = example.build()
    optimizer = example.build_optimizer(model)
    with torch.enable_grad():
        small.train(example, model, optimizer, 2)
    model.double()
    tokens, _ = small.batch()
    before = model.logits(tokens)
    map_: Any = model.model.blocks()[1].maps["up"]
    optimizer.state[map_.A]["exp_avg"].fill_(1.0)
    run_events(model, optimizer, 2, seed=0)
    assert torch.equal(before, model.logits(tokens))
    old = map_.A.detach().clone()
    run_events(model, optimizer, 3, seed=0)
    assert float((model.logits(tokens) - before).abs().max()) < 1e-12
    assert not torch.allclose(old, map_.A)
    assert not optimizer.state[map_.A]["exp_avg"].any()
    a, b = map_.A.detach(), map_.inside.factor(map_.B.detach())
    assert float((a.T @ a - b @ b.T).abs().max()) < 1e-12


# --- one word -------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_a_fixed_beta_is_one_word(beta: float):
    """The same model as its two words make."""
    one, two = CRNetOptions(beta=beta), CRNetOptions(beta_init=beta, learnable_beta=False)
    ours, theirs = (model_spec(tiny(crnet=options)) for options in (one, two))
    assert ours.tensors == theirs.tensors
    assert ours.reads == theirs.reads
    found = build(ours, 0)
    assert gains(found) == [pytest.approx(beta + 1e-6)] * 2
    assert not any(name.endswith(".beta") for name in found.trained())


@pytest.mark.parametrize(
    ("word", "high"), [("s1", range(2, 9)), ("s2", range(10, 17)), ("s3", range(18, 25))]
)
def test_rank_profiles_of_the_paper(word: str, high: range):
    """Appendix E.2.6, layer by layer, of 350M; all three have as many parameters."""
    _, run = presets.PRESETS["llama-350m"]
    model = dataclasses.replace(run.model, rank=word, vocab_size=32_000)
    spec = model_spec(model)
    ranks = [{slot.rank for slot in block} for block in spec.slots]
    assert ranks == [{0}, *({256 if layer in high else 192} for layer in range(2, 25))]
    assert sum(tensor.num_items for tensor in spec.tensors.values()) == 172_897_441


def test_rank_profiles_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"--model\.rank s2: no published table .* give numbers"):
        model_spec(tiny(rank="s2"))
    with pytest.raises(ValueError, match=r"'s2' cannot be read"):
        model_spec(tiny(linear="lowrank", rank="s2"))


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"beta": 0.5, "beta_init": 0.5}, "beta 0.5 is fixed and says how large"),
        ({"beta": 0.0}, "beta 0 with a fixed beta is plain low rank"),
        ({"carries": "q,w"}, "carries q,w: 'w' is no position; known: q, k, v, o"),
        ({"carries": ""}, "Without a carry at all take lowrank"),
        ({"gain_warmup_steps": -1}, "gain-warmup-steps is -1; take 1 or more"),
        ({"gain_start": 0.5}, "gain-start 0.5 has no effect without gain-warmup-steps"),
        ({"duplicate": 0.0}, "duplicate is 0.0; it must be above zero"),
        ({"refactor_every": 0}, "refactor-every is 0; take 1 or more"),
        ({"refactor_every": 5, "norm": "rms"}, "its norm would give something else"),
    ],
)
def test_problems(options: dict[str, Any], fragment: str):
    run = RunConfig(model=tiny(crnet=CRNetOptions(**options)))
    with pytest.raises(ConfigError) as caught:
        check(run)
    (problem,) = caught.value.problems
    assert problem.startswith("--model.crnet.")
    assert fragment in problem


def test_options_from_words():
    words = {"gain": "head", "norm": "gain", "carries": "q,k", "duplicate": 1.0}
    run = override(RunConfig(), model={"crnet": words})
    assert run.model.crnet == CRNetOptions(**words)  # type: ignore[attr-defined,arg-type]


# --- models ---------------------------------------------------------------------------------------

WHOLE = CRNetOptions(gain="head", carries="q,v,gate,down", gain_warmup_steps=3, norm="gain")


@pytest.mark.parametrize("options", [WHOLE, CRNetOptions(gain="channel", duplicate=1.0)])
def test_replay_is_exact_in_a_model(options: CRNetOptions):
    """Bit: loss and gradients of a replayed model with grouped heads, in two segments."""
    model = randomised(make(tiny(crnet=options, num_layers=4)), torch.float32)
    tokens = random_tokens(2, 9)
    found = []
    for plan in (RecomputePlan(), RecomputePlan("replay", (2,))):
        model.recompute(plan)
        model.zero_grad()
        loss, _ = model(tokens, tokens)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([loss.detach(), *grads])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (WHOLE, None),
        (CRNetOptions(gain="channel"), None),
        (CRNetOptions(duplicate=1.0), "hangs on the whole width"),
        (CRNetOptions(refactor_every=5), "wants whole tensors"),
    ],
)
def test_who_can_be_split(options: CRNetOptions, reason: str | None):
    spec = model_spec(tiny(crnet=options))
    found = list(parts_problems(spec, 2))
    assert (reason is None) == (not found)
    assert all(str(reason) in each for each in found)
    assert spec.pads == (reason is None)


@pytest.mark.slow
@torch.no_grad()
def test_in_transformers():
    """The same logits, and again from a folder."""
    import crnet.hf
    from crnet.hub.names import own_names

    for options in (WHOLE, CRNetOptions(gain="channel", duplicate=1.0)):
        config = tiny(crnet=options)
        own = randomised(make(config), torch.float32).eval()
        model = crnet.hf.CRNetForCausalLM(crnet.hf.CRNetConfig(crnet=own_names(config))).eval()
        model.load_state_dict(own.state_dict(), strict=True)
        tokens = random_tokens(2, 9)
        assert torch.equal(model(tokens).logits, own.logits(tokens))
