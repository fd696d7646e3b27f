"""Recomputation: gradients those of a pass that keeps everything, in the paper's order, then freed.

``replay`` and ``block`` bit for bit, ``invert`` within a tolerance stated in units of rounding."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from crnet.config.sections import ModelConfig
from crnet.cost.activations import Plan, invert_error
from crnet.linears import POSITIONS, Slot
from crnet.linears.crnet import CRNetOptions
from crnet.linears.crnet.module import CRNetLinear
from crnet.model.backbone import Block, LanguageModel
from crnet.recompute.engine import Recomputation, rebuild_down, rebuild_up
from shapes import TINY
from test_model import error, random_tokens, randomised

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}

INVERTED = 2000
"""Units of rounding that a gradient of ``invert`` may be off, relative to its largest item. Gains
are at least 0.2, three layers are crossed, one adds five units: 5 x 5^3 = 625; and what is made of
a Y (norm, softmax, products) amplifies its error little."""


def tiny(**changes: Any) -> ModelConfig:
    return dataclasses.replace(TINY, **({"num_layers": 4} | changes))


SHAPES = {
    "mha": tiny(num_kv_heads=None),
    "gqa": tiny(),
    "by-position": tiny(rank="4,5,3/k=2/down=0.5h"),
    "first-rank": tiny(crnet=CRNetOptions(first_rank=3)),
    "fp32-carry": tiny(crnet=CRNetOptions(carry_dtype="fp32")),
    "tied": tiny(tie_embeddings=True),
    "lowrank": tiny(linear="lowrank"),
    "full": tiny(linear="full"),
}
CARRIED = [name for name, config in SHAPES.items() if config.linear == "crnet"]
each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])

NONE = Plan()
PLANS = {
    "block": Plan("block"),
    "replay": Plan("replay", (2,)),
    "replay-one-segment": Plan("replay", (), keep_attention=True),
    "invert": Plan("invert", (3,)),
}
each_plan = pytest.mark.parametrize("plan", list(PLANS.values()), ids=list(PLANS))

Result = tuple[Tensor, dict[str, Tensor]]
"""The loss, and the gradient of every parameter that is trained."""


def random_model(config: ModelConfig, precision: str = "fp32") -> LanguageModel:
    dtypes = {"fp64": torch.float64, "bf16": torch.bfloat16}
    return randomised(config, dtypes.get(precision, torch.float32))


def beta_of(model: LanguageModel, layer: int, position: str) -> Tensor:
    return model.model.blocks()[layer - 1].linear(position).beta.data


def set_betas(model: LanguageModel, size: float) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(".beta"):
            parameter.data = size * parameter.data.sign()


def forward(model: LanguageModel, plan: Plan, precision: str = "fp32", seed: int = 3) -> Tensor:
    model.model.recomputation = Recomputation(plan)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        return model(random_tokens(2, 9, seed=seed), random_tokens(2, 9, seed=seed + 6))[0]


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    """Of every trained parameter, none of the frozen ones; finite, and not all zeros."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, grad in grads.items():
        assert bool(grad.isfinite().all() and grad.any()), name
    return grads


def step(model: LanguageModel, plan: Plan, precision: str = "fp32", seed: int = 3) -> Result:
    model.zero_grad()
    loss = forward(model, plan, precision, seed)
    loss.backward()
    return loss.detach(), gradients(model)


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """The sign of a zero counts."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    one, other = (it.detach().contiguous().view(-1).view(torch.uint8) for it in (actual, expected))
    return torch.equal(one, other)


def assert_same(actual: Result, expected: Result, units: float = 0) -> None:
    """Bit for bit; with ``units`` the loss still, as nothing changes it, and gradients within so
    many units of rounding of the parameter's largest item; of all betas' for a beta, whose one item
    is a sum that may cancel."""
    assert actual[1].keys() == expected[1].keys()
    assert same_bits(actual[0], expected[0]), "loss"
    largest = {name: float(grad.abs().max()) for name, grad in expected[1].items()}
    betas = max((size for name, size in largest.items() if name.endswith(".beta")), default=0.0)
    for name, grad in expected[1].items():
        if units:
            limit = units * UNIT[grad.dtype] * (betas if name.endswith(".beta") else largest[name])
            assert float((actual[1][name] - grad).abs().max()) < limit, name
        else:
            assert same_bits(actual[1][name], grad), name


def assert_agree(actual: Result, expected: Result, plan: Plan) -> None:
    assert_same(actual, expected, INVERTED if plan.policy == "invert" else 0)


# --- 1. gradients -------------------------------------------------------------------------------


class _Loss(torch.autograd.Function):
    """A function of parameters whose backward is done at once: gradcheck goes backward through one
    graph several times, which recomputation refuses."""

    @staticmethod
    def forward(ctx, model, plan, *values):
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)
        model.model.recomputation = Recomputation(plan)
        with torch.enable_grad():
            loss, _ = model(random_tokens(2, 4) % 7, random_tokens(2, 4, seed=9) % 7)
        ctx.grads = torch.autograd.grad(loss, tuple(model.parameters()))
        return loss.detach()

    @staticmethod
    def backward(ctx, dloss):
        return None, None, *(grad * dloss for grad in ctx.grads)


@each_plan
def test_gradcheck(plan: Plan):
    """The loss in every parameter, the embedded inputs among them, fp64. Differences over 1e-6 give
    seven digits; ``invert`` errs by 1e-12 only."""
    shape = {"hidden_size": 8, "intermediate_size": 6, "vocab_size": 7, "rank": "2"}
    model = random_model(tiny(num_heads=2, num_kv_heads=1, **shape), "fp64")
    values = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    loss = functools.partial(_Loss.apply, model, plan)
    assert torch.autograd.gradcheck(loss, values, atol=1e-6, rtol=1e-6, fast_mode=True)


@each_precision
@pytest.mark.parametrize("attention", ["FLASH_ATTENTION", "MATH"])
@pytest.mark.parametrize("shape", SHAPES)
def test_replay_and_block_are_exact(shape: str, attention: str, precision: str):
    """Loss and every gradient bit for bit, whatever is kept and whichever way attention goes."""
    model = random_model(SHAPES[shape], precision)
    signs = {p.sign().item() for name, p in model.named_parameters() if name.endswith(".beta")}
    assert signs == ({-1.0, 1.0} if shape in CARRIED else set())
    with sdpa_kernel(getattr(SDPBackend, attention)):
        expected = step(model, NONE, precision)
        assert_same(step(model, Plan("block"), precision), expected)
        for kept_layers in ((), (2,), (4,), (1, 3), (1, 2, 3, 4)):
            for keep_attention in (False, True):
                plan = Plan("replay", kept_layers, keep_attention)
                assert_same(step(model, plan, precision), expected)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("shape", CARRIED)
def test_invert(shape: str, precision: str):
    """Bit for bit where the plan or the guard keeps every layer; else within ``INVERTED`` units of
    rounding, 1e-4 in fp32 and 2e-13 in fp64. With an fp32 carry in another dtype the whole gradient
    within 2%: a Y is off by fp32's rounding, and on the edge between two bf16 numbers one item of
    what a block makes of it by 2^-8. (A bf16 carry: finite, no more.)"""
    model, flatten = random_model(SHAPES[shape], precision), nn.utils.parameters_to_vector
    expected = step(model, NONE, precision)
    for keep_attention in (False, True):
        for kept_layers, tolerance in (((1, 2, 3, 4), 0.05), ((), 0.0)):
            plan = Plan("invert", kept_layers, keep_attention, tolerance)
            assert_same(step(model, plan, precision), expected)
        for kept_layers in ((), (2,), (1, 3)):
            plan = Plan("invert", kept_layers, keep_attention, tolerance=1e30)
            actual = step(model, plan, precision)
            if shape == "fp32-carry" and precision != "fp32":
                flat, wanted = (flatten(grads.values()) for _, grads in (actual, expected))
                assert float((flat - wanted).norm() / wanted.norm()) < 0.02
            elif precision.startswith("fp"):
                assert_same(actual, expected, INVERTED)


@pytest.mark.parametrize("linear", ["lowrank", "full"])
def test_invert_needs_a_carry(linear: str):
    with pytest.raises(ValueError, match=r"invert .* does not carry them; take replay or block"):
        forward(random_model(tiny(linear=linear)), Plan("invert"))


@each_plan
@pytest.mark.parametrize("num_layers", [1, 2])
def test_few_layers(plan: Plan, num_layers: int):
    model = random_model(tiny(num_layers=num_layers))
    plan = dataclasses.replace(plan, kept_layers=())
    assert_agree(step(model, plan), step(model, NONE), plan)


# --- 2. the order -------------------------------------------------------------------------------


def intercept(
    patch: pytest.MonkeyPatch, model: LanguageModel, name: str, around: Callable[..., Tensor]
) -> None:
    """From now on every map's method of that name is called by ``around(call, layer, position,
    *arguments)``; layers count from 1."""
    places = {
        block.linear(slot.position): (slot.layer_idx + 1, slot.position)
        for block in model.model.blocks()
        for slot in block.slots
    }
    for kind in {type(module) for module in places}:
        if original := getattr(kind, name, None):

            def method(self, *args, original=original):
                return around(functools.partial(original, self), *places[self], *args)

            patch.setattr(kind, name, method)


@pytest.mark.parametrize(
    ("policy", "num_layers", "kept_layers", "expected"),
    [
        ("block", 4, (), "r4 r3 r2 r1"),
        # Algorithm 1: for l = L .. 1, Y_(l-1) is rebuilt unless l is 1 or l - 1 is in A.
        ("invert", 2, (), "y1 r2 r1"),
        ("invert", 4, (4,), "y3 r4 y2 r3 y1 r2 r1"),
        ("invert", 4, (1, 4), "y3 r4 y2 r3 r2 r1"),
        ("invert", 4, (1, 2, 3, 4), "r4 r3 r2 r1"),
        ("invert", 5, (2, 4, 5), "r5 y3 r4 r3 y1 r2 r1"),
        ("invert", 6, (3, 6), "y5 r6 y4 r5 r4 y2 r3 y1 r2 r1"),
        ("invert", 8, (2, 5, 8), "y7 r8 y6 r7 r6 y4 r5 y3 r4 r3 y1 r2 r1"),
        # Segments downwards, inside them upwards; the segment above has the top of a lower one.
        ("replay", 3, (), "y1 y2 y3 r3 r2 r1"),
        ("replay", 3, (1,), "y2 y3 r3 r2 r1"),
        ("replay", 3, (1, 2, 3), "y3 r3 r2 r1"),
        ("replay", 6, (3,), "y4 y5 y6 r6 r5 r4 y1 y2 r3 r2 r1"),
        ("replay", 6, (2, 5), "y6 r6 y3 y4 r5 r4 r3 y1 r2 r1"),
        ("replay", 7, (2, 4), "y5 y6 y7 r7 r6 r5 y3 r4 r3 y1 r2 r1"),
    ],
)
def test_order(
    monkeypatch: pytest.MonkeyPatch, policy: Any, num_layers: int, kept_layers: Any, expected: str
):
    """All that a backward pass does: ``yl`` rebuilds the seven outputs of layer l, ``rl`` runs its
    block again. So nothing is rebuilt that is kept, nothing twice, nothing before its turn."""
    model = random_model(tiny(num_layers=num_layers))
    blocks, compute = model.model.blocks(), Block.compute
    log: list[tuple[str, str]] = []

    def run(block, *args):
        log.append((f"r{blocks.index(block) + 1}", ""))
        return compute(block, *args)

    def rebuild(shift, call, layer, position, *args):
        log.append((f"y{layer - shift}", position))
        return call(*args)

    loss = forward(model, Plan(policy, kept_layers, tolerance=1e30))
    monkeypatch.setattr(Block, "compute", run)
    intercept(monkeypatch, model, "expand", functools.partial(rebuild, 0))
    intercept(monkeypatch, model, "shrink", functools.partial(rebuild, 1))
    loss.backward()
    assert log == [(w, p) for w in expected.split() for p in (POSITIONS if "y" in w else [""])]


# --- 3. one map and its halves ------------------------------------------------------------------


@torch.no_grad()
def chain(gains: list[float], dtype: torch.dtype) -> tuple[list[Any], ...]:
    """Successive maps, their bottlenecks, their outputs by ``expand`` with that below the first in
    front, and all but the last again by ``shrink``, from the top down. Inputs have RMS 1 in every
    row, as after a norm; so have, on average, the products and the lowest output."""
    generator = torch.Generator().manual_seed(1)
    maps, z, outputs = [], [], [torch.randn(64, 48, generator=generator).to(dtype)]
    for idx, gain in enumerate(gains, start=1):
        slot = Slot("q", idx, 48, 48, 12, len(gains) + 1)
        maps.append(CRNetLinear(slot, CRNetOptions(), init_std=1.0).to(dtype))
        maps[-1].A.copy_(torch.randn(48, 12, generator=generator) / 48**0.5)
        maps[-1].B.copy_(torch.randn(12, 48, generator=generator) / 12**0.5)
        maps[-1].beta.fill_(gain)
        x = torch.randn(64, 48, generator=generator)
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        z.append(maps[-1].reduce(x.to(dtype)))
        outputs.append(maps[-1].expand(z[-1], outputs[-1]))
    rebuilt = outputs[-1:]
    for module, z_top in zip(maps[::-1], z[::-1], strict=True):
        rebuilt.append(module.shrink(rebuilt[-1], z_top))
    return maps, z, outputs, rebuilt[1:]


def test_halves_follow_the_plain_reference():
    """fp64: ``expand`` up and ``shrink`` down a chain of five, against the equations: 1e-14, as
    some ten roundings of 1e-16 are divided by gains whose product is 0.76."""
    betas = [0.5, -0.7, 1.2, -2.0, 0.9]
    maps, z, outputs, rebuilt = chain(betas, torch.float64)
    factors, gains = [m.B.detach() for m in maps], [m.gain() for m in maps]
    for gain, beta in zip(gains, betas, strict=True):
        assert gain.item() == pytest.approx(math.copysign(abs(beta) + 1e-6, beta), rel=1e-15)
    up = rebuild_up(outputs[0], z, factors, gains)
    down = rebuild_down(outputs[-1], z[::-1], factors[::-1], gains[::-1])
    pairs = [*zip(up, outputs[1:], strict=True), *zip(down, rebuilt, strict=True)]
    pairs += zip(down, outputs[-2::-1], strict=True)
    assert max(error(*pair) for pair in pairs) < 1e-14


@each_precision
@pytest.mark.parametrize("shape", SHAPES)
def test_expand_repeats_the_forward_pass(shape: str, precision: str):
    """Bit for bit and dtype for dtype, every map of every kind."""
    model, generator = random_model(SHAPES[shape], precision), torch.Generator().manual_seed(2)
    dtype = model.lm_head.weight.dtype
    for block in model.model.blocks():
        for slot in block.slots:
            module = block.linear(slot.position)
            x = torch.randn(3, 5, slot.in_size, generator=generator).to(dtype)
            y = torch.randn(3, 5, slot.out_size, generator=generator).to(dtype)
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
            with torch.no_grad(), autocast:
                expected, actual = module(x, y), module.expand(module.reduce(x), y)
            is_wide = precision == "fp32" or (shape == "fp32-carry" and slot.layer_idx > 0)
            assert expected.dtype == (torch.float32 if is_wide else torch.bfloat16)
            assert same_bits(actual, expected)


# --- 4. invert's guard --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gain", [0.2, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("depth", [4, 8, 16])
def test_the_bound_holds(dtype: torch.dtype, gain: float, depth: int):
    """RMS error of every rebuilt Y over the largest output RMS of the chain: below the bound, and
    the last within a factor of 200 of it (errors add up as random ones do, bounds in full)."""
    _, _, outputs, rebuilt = chain([gain] * depth, dtype)
    outputs, rebuilt = ([y.double() for y in several] for several in (outputs, rebuilt))
    largest = max(y.norm() for y in outputs)
    pairs = zip(rebuilt, outputs[-2::-1], strict=True)
    errors = [float((y - expected).norm() / largest) for y, expected in pairs]
    limits = invert_error([gain] * depth, UNIT[dtype])
    assert all(off < limit for off, limit in zip(errors, limits, strict=True))
    assert errors[-1] > limits[-1] / 200


@pytest.mark.parametrize(
    ("precision", "carry_dtype"),
    [("fp32", "compute"), ("bf16-mixed", "compute"), ("bf16", "compute"), ("bf16", "fp32")],
)
def test_the_guard_keeps_what_a_small_gain_would_spoil(precision: str, carry_dtype: Any):
    """Gains of 1 cost five units of rounding a layer, 15 over three; one of 0.05 costs 43. Between
    the two, the output below it is kept, that one alone, and what it costs is not passed on."""
    is_wide = "fp32" in (precision, carry_dtype)
    tolerance = 25 * UNIT[torch.float32 if is_wide else torch.bfloat16]
    model = random_model(tiny(crnet=CRNetOptions(carry_dtype=carry_dtype)), precision)
    set_betas(model, 1.0)
    for layer, position in itertools.product((2, 3, 4), POSITIONS):
        beta_of(model, layer, position).fill_(-0.05)
        for kept_layers in ((), (layer - 1,)):
            forward(model, Plan("invert", kept_layers, tolerance=tolerance), precision)
            expected = {} if kept_layers else {position: (layer - 1,)}
            assert model.model.recomputation.added == expected
        beta_of(model, layer, position).fill_(1.0)


def test_the_guard_is_silent_in_fp32():
    """Nothing beyond the plan at the default tolerance, with gains near 1 and with small ones; and
    gains of 1e-3 pass where the tolerance lets them."""
    model = random_model(tiny(num_layers=8, hidden_size=8, intermediate_size=8))
    for beta, tolerance in ((1.0, 0.05), (0.9, 0.05), (0.2, 0.05), (1e-3, 1e30)):
        set_betas(model, beta)
        forward(model, Plan("invert", (4,), tolerance=tolerance))
        assert model.model.recomputation.added == {}


@each_precision
@pytest.mark.parametrize("tolerance", [0.5, 1e30, math.inf])
def test_no_gain_at_all(precision: str, tolerance: float):
    """What lies below a beta of exactly 0 is kept under any tolerance. Gradients: of fp32 close; of
    all bit for bit once every beta is 0 and nothing is rebuilt."""
    model = random_model(tiny(num_layers=3), precision)
    set_betas(model, 1.0)
    for positions, units in ((("q", "down"), INVERTED), (POSITIONS, 0)):
        for layer, position in itertools.product((2, 3), positions):
            beta_of(model, layer, position).zero_()
        expected = step(model, NONE, precision)
        actual = step(model, Plan("invert", tolerance=tolerance), precision)
        assert model.model.recomputation.added == dict.fromkeys(positions, (1, 2))
        if precision == "fp32" or not units:
            assert_same(actual, expected, units)


# --- 5. composition -----------------------------------------------------------------------------


@each_plan
@pytest.mark.parametrize("order", ["one-by-one", "older-graph-first", "both-at-once"])
def test_accumulation_and_clipping(plan: Plan, order: str):
    """Two micro-batches into one gradient, then clipped: the second forward pass after the first
    backward pass, or before it, or one backward pass through both graphs."""
    model = random_model(tiny())

    def accumulated(plan: Plan) -> Result:
        model.zero_grad()
        losses = [forward(model, plan)]
        if order == "one-by-one":
            losses.pop().backward()
        losses.append(forward(model, plan, seed=5))
        for loss in [sum(losses)] if order == "both-at-once" else losses:
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss.detach(), gradients(model)

    assert_agree(accumulated(plan), accumulated(NONE), plan)


FROZEN: dict[str, Callable[[str], bool]] = {
    "nothing": lambda name: False,
    "betas": lambda name: name.endswith(".beta"),
    "factors": lambda name: name.endswith((".A", ".B")),
    "all-but-factors": lambda name: not name.endswith((".A", ".B")),
    "all-but-betas": lambda name: not name.endswith(".beta"),
    "embedding": lambda name: "embed" in name,
    "lower-half": lambda name: "embed" in name or "layers.0." in name or "layers.1." in name,
    "upper-half": lambda name: "layers.2." in name or "layers.3." in name,
    "all-but-head": lambda name: name != "lm_head.weight",
}


def freeze(model: LanguageModel, what: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not FROZEN[what](name))


@each_plan
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters(plan: Plan, frozen: str):
    """Those that are trained have their gradient, the others none."""
    model = random_model(tiny(crnet=CRNetOptions(learnable_beta=frozen != "betas")))
    if frozen != "betas":
        freeze(model, frozen)
    assert all(p.requires_grad for p in model.parameters()) == (frozen == "nothing")
    assert_agree(step(model, plan), step(model, NONE), plan)


@each_plan
def test_nothing_is_recomputed_without_a_graph(monkeypatch: pytest.MonkeyPatch, plan: Plan):
    """Losses and logits of an evaluation, cached ones with gradients on too: the same bits."""
    model = random_model(tiny()).eval()
    tokens = random_tokens(2, 9)

    def results() -> list[Tensor]:
        found = []
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                cache = model.new_cache(9)
                found += [model.logits(part, cache) for part in tokens.split((5, 1, 3), dim=1)]
                if not torch.is_grad_enabled():
                    found += [model(tokens, tokens)[0], model.logits(tokens)]
        return found

    expected = results()
    model.model.recomputation = Recomputation(plan)
    monkeypatch.delattr(Recomputation, "steps")
    with pytest.raises(AttributeError, match="steps"):
        model(tokens, tokens)
    for actual, wanted in zip(results(), expected, strict=True):
        assert same_bits(actual, wanted)


@each_plan
def test_second_backward(plan: Plan):
    """``block`` allows it as torch does; the others say what to do. The next step is as ever.
    (fp64, as torch's own loss in fp32 refuses a second backward pass under any policy.)"""
    model = random_model(tiny(), "fp64")
    expected = step(model, NONE)
    model.zero_grad()
    loss = forward(model, plan)
    loss.backward(retain_graph=True)
    model.zero_grad()
    if plan.policy == "block":
        loss.backward()
        assert_same((loss.detach(), gradients(model)), expected)
    else:
        with pytest.raises(RuntimeError, match="retain_graph=True is not supported"):
            loss.backward()
    assert_agree(step(model, plan), expected, plan)


@pytest.mark.parametrize("policy", ["replay", "invert"])
def test_model_changed_before_the_backward_pass(policy: str):
    """Factors frozen meanwhile: the others' gradients are as ever. A norm above frozen inputs keeps
    nothing once it is frozen, and its block too few tensors: an error."""
    model, plan, results = random_model(tiny()), PLANS[policy], []
    for tried in (NONE, plan):
        model.zero_grad()
        loss = forward(model, tried)
        freeze(model, "factors")
        loss.backward()
        results.append((loss.detach(), gradients(model)))
        model.requires_grad_(True)
    assert_agree(results[1], results[0], plan)
    freeze(model, "embedding")
    loss = forward(model, plan)
    freeze(model, "all-but-factors")
    with pytest.raises(RuntimeError, match="was the model changed"):
        loss.backward()


@pytest.mark.parametrize("policy", ["replay", "invert"])
def test_weights_changed_before_the_backward_pass(policy: str):
    """A block run once more with other weights would mix two models' gradients."""
    model = random_model(tiny())
    loss = forward(model, PLANS[policy])
    with torch.no_grad():
        model.model.blocks()[2].linear("up").B.mul_(1.5)
    with pytest.raises(RuntimeError, match="weights were changed in place"):
        loss.backward()


@pytest.mark.parametrize("policy", ["replay", "invert"])
def test_another_attention_kernel_in_the_backward_pass(policy: str):
    """The kernels keep other tensors: MATH the probabilities, the fused one the log-sum-exp."""
    model = random_model(tiny())
    with sdpa_kernel(SDPBackend.MATH):
        loss = forward(model, PLANS[policy])
    with pytest.raises(RuntimeError, match="attention kernel switched"):
        loss.backward()


# --- 6. memory ----------------------------------------------------------------------------------


def storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


class Storages(TorchDispatchMode):
    """Every storage that an operation returns, to be asked whether it still exists."""

    def __init__(self):
        super().__init__()
        self.refs: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.refs += [storage(it) for it in tree_iter(result) if isinstance(it, Tensor)]
        return result

    def alive(self) -> set[int]:
        return {ref.cdata for ref in self.refs if not ref.expired()}


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def fail(*_: Any) -> None:
    raise ZeroDivisionError


@each_plan
@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("ends", ["unused", "done", "two-graphs", "fails-forward", "fails"])
@pytest.mark.parametrize("frozen", ["nothing", "lower-half"])
def test_nothing_outlives_the_loss(plan: Plan, ends: str, frozen: str):
    """Without the cycle collector: once the loss is gone, all that is left of a step is gradients;
    and a step that failed leaves the next one as it should be."""
    model = random_model(tiny())
    freeze(model, frozen)
    expected = step(model, NONE)
    with Storages() as storages:
        forward(model, NONE)  # gone at once, except for what it merely looks at
    permanent = storages.alive() | {storage(parameter).cdata for parameter in model.parameters()}
    model.zero_grad()

    def run() -> None:
        losses = [forward(model, plan, seed=seed) for seed in ([3, 5] if "two" in ends else [3])]
        assert len(storages.alive() - permanent) > 20
        if ends != "unused":
            losses[0].backward()
        if ends == "done":  # with the loss still there, nothing but it and the gradients
            trained = [it for it in model.parameters() if it.requires_grad]
            assert len(storages.alive() - permanent) <= 1 + len(trained)

    hook = {"fails-forward": fail, "fails": lambda _, args: args[0].register_hook(fail) and None}
    handle = model.model.layers[3].register_forward_pre_hook(hook.get(ends, lambda *_: None))
    with Storages() as storages, contextlib.ExitStack() as stack:
        if ends in hook:
            stack.enter_context(pytest.raises(ZeroDivisionError))
        run()
    handle.remove()
    grads = {storage(p.grad).cdata for p in model.parameters() if p.grad is not None}
    assert bool(grads) == (ends not in ("unused", "fails-forward"))
    assert storages.alive() - permanent == grads
    assert_agree(step(model, plan), expected, plan)


@pytest.mark.usefixtures("_no_collector")
@each_precision
@pytest.mark.parametrize(
    ("policy", "kept_layers", "expected"),
    [
        ("replay", (), {6: "2345", 5: "234", 4: "23", 3: "2", 2: "", 1: ""}),
        ("replay", (3,), {6: "45", 5: "4", 4: "", 3: "2", 2: "", 1: ""}),
        ("invert", (), {6: "5", 5: "4", 4: "3", 3: "2", 2: "1", 1: ""}),
        ("invert", (3,), {6: "5", 5: "4", 4: "", 3: "2", 2: "1", 1: ""}),
    ],
)
def test_rebuilt_outputs_are_freed(
    monkeypatch: pytest.MonkeyPatch, precision: str, policy: Any, kept_layers: Any, expected: Any
):
    """The layers whose rebuilt outputs exist when the gradient of layer l's input is there: under
    ``replay`` those of the segment below l, under ``invert`` l - 1. (Of a dense layer 1, replay
    keeps the outputs.)"""
    model = random_model(tiny(num_layers=6), precision)
    rebuilt: list[tuple[int, StorageWeakRef]] = []
    alive: dict[int, list[int]] = {}

    def before(block: Block, args: Any) -> None:
        def look(_: Tensor) -> None:
            layer = model.model.blocks().index(block) + 1
            alive[layer] = [at for at, ref in rebuilt if not ref.expired()]

        args[0].register_hook(look)

    def note(call, layer, position, *args):
        result = call(*args)
        if layer > 1:
            rebuilt.append((layer - (policy == "invert"), storage(result)))
        return result

    for block in model.model.blocks():
        block.register_forward_pre_hook(before)
    loss = forward(model, Plan(policy, kept_layers, tolerance=1e30), precision)
    intercept(monkeypatch, model, {"replay": "expand", "invert": "shrink"}[policy], note)
    loss.backward()
    assert alive == {at: [int(y) for y in ys for _ in POSITIONS] for at, ys in expected.items()}


# --- 7. planted faults --------------------------------------------------------------------------


def faulty_step(patch: pytest.MonkeyPatch, model: LanguageModel, plan: Plan, fault: str) -> Result:
    """A step with a fault in its backward pass, in the third of four layers, which starts from a
    checkpoint both in ``PLANS['replay']`` and in ``PLANS['invert']``."""
    is_shrink, compute = plan.policy == "invert", Block.compute
    stale: dict[str, Tensor] = {}

    def rebuild(call, layer, position, *args):
        if layer != 3:
            return call(*args)
        y, z = args if is_shrink else args[::-1]
        if fault == "dropped-layer":
            return y.clone()
        if fault == "stale-checkpoint":
            y = stale.setdefault(position, y.clone())
        if fault == "wrong-gain" and position == "v":
            return call(y, z) / 1.01 if is_shrink else call(z, y * 1.01)
        return call(y, z) if is_shrink else call(z, y)

    def run(block, x_BTD, *args):
        if block is model.model.layers[2] and fault == "altered-x":
            x_BTD = x_BTD.detach().clone()
            x_BTD[0, 0, 0] *= 1.01
            x_BTD.requires_grad_()
        return compute(block, x_BTD, *args)

    for seed in (5, 3):  # the first step leaves what is stale in the second
        model.zero_grad()
        loss = forward(model, plan, seed=seed)
        with patch.context() as during_backward:
            during_backward.setattr(Block, "compute", run)
            intercept(during_backward, model, "shrink" if is_shrink else "expand", rebuild)
            loss.backward()
    return loss.detach(), gradients(model)


FAULTS = ["wrong-gain", "dropped-layer", "stale-checkpoint", "altered-x"]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (name, fault)
        for name, plan in PLANS.items()
        for fault in (FAULTS if plan.policy != "block" else ["altered-x"])
    ],
)
def test_planted_faults_are_seen(monkeypatch: pytest.MonkeyPatch, name: str, fault: str):
    """What the tests above compare with tells each of these from a right step: a gain wrong by 1%
    at one position, a layer left out, the checkpoint of the step before, one item of X off by 1%.
    (``block`` rebuilds no outputs.)"""
    plan = PLANS[name]
    model = random_model(tiny())
    expected = step(model, NONE)
    assert_agree(faulty_step(monkeypatch, model, plan, "none"), expected, plan)
    actual = faulty_step(monkeypatch, model, plan, fault)
    with pytest.raises(AssertionError, match=r"^model\."):
        assert_agree(actual, expected, plan)
