"""Recomputation: gradients those of a pass that keeps everything, in the paper's order.

``replay`` and ``block`` bit for bit, ``invert`` within a tolerance stated in units of rounding."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from crnet import linears
from crnet.architectures.llama import Llama
from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig
from crnet.kernels.naive import rebuild_down, rebuild_up
from crnet.layers.block import Block
from crnet.linears import Parameterization
from crnet.linears._declarations import factors, factors_work
from crnet.linears._maps import LowRankMap
from crnet.linears.crnet import CRNetOptions
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from crnet.recompute.plan import RecomputePlan, invert_error
from crnet.specs import Read, Slot, TensorSpec, constant
from recompute_steps import (
    INVERTED,
    NONE,
    PLANS,
    SHAPES,
    UNIT,
    Plan,
    Result,
    assert_agree,
    assert_same,
    beta_of,
    each_plan,
    each_rebuilding,
    forward,
    gradients,
    intercept,
    random_model,
    same_bits,
    set_betas,
    step,
    tiny,
)
from shapes import error, one_of_every_method, policies_of, random_tokens, randomised

POSITIONS = ("q", "k", "v", "o", "gate", "up", "down")
METHODS = one_of_every_method(num_layers=4)
each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
each_model = pytest.mark.parametrize("config", (METHODS | SHAPES).values(), ids=[*METHODS, *SHAPES])

# --- 1. gradients -------------------------------------------------------------------------------


class _Loss(torch.autograd.Function):
    """A function of all parameters whose backward is done at once: gradcheck goes backward through
    one graph several times, which recomputation refuses."""

    @staticmethod
    def forward(ctx, model, plan, flat):
        nn.utils.vector_to_parameters(flat, model.parameters())
        model.recompute(plan)
        with torch.enable_grad():
            loss, _ = model(random_tokens(2, 4) % 7, random_tokens(2, 4, seed=9) % 7)
        grads = torch.autograd.grad(loss, tuple(model.parameters()))
        ctx.grad = torch.cat([grad.reshape(-1) for grad in grads])
        return loss.detach()

    @staticmethod
    def backward(ctx, dloss):
        return None, None, ctx.grad * dloss


@each_plan
def test_gradcheck(plan: Plan):
    """The loss in every parameter, the embedded inputs among them, fp64, along three directions.
    Differences over 1e-6 give seven digits; ``invert`` errs by 1e-12 only."""
    shape = {"hidden_size": 8, "intermediate_size": 6, "vocab_size": 7, "rank": "2"}
    model = random_model(tiny(num_heads=2, num_kv_heads=1, **shape), "fp64")
    flat = nn.utils.parameters_to_vector(model.parameters()).detach().requires_grad_()
    loss = functools.partial(_Loss.apply, model, plan)
    for seed in range(3):
        torch.manual_seed(seed)  # of the direction
        assert torch.autograd.gradcheck(loss, flat, atol=1e-6, rtol=1e-6, fast_mode=True)


@pytest.mark.parametrize(
    "precision",
    ["fp32", *(pytest.param(it, marks=pytest.mark.slow) for it in ("bf16-mixed", "bf16"))],
)
@each_model
def test_replay_and_block_are_exact(config: ModelConfig, precision: str):
    """Loss and every gradient bit for bit, whatever is kept and whichever way attention goes; of
    every method, under each policy that it allows."""
    model = random_model(config, precision)
    backends = itertools.cycle([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    expected = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            expected[backend] = step(model, NONE, precision)
    for policy in {"block", "replay"} & {*policies_of(model.spec)}:
        kept = ((), (2,), (1, 3), (1, 2, 3, 4)) if policy == "replay" else ((),)
        for keeps, kept_layers in zip(itertools.cycle([False, True]), kept, strict=False):
            backend = next(backends)
            with sdpa_kernel(backend):
                plan = Plan(policy, kept_layers, keeps and policy == "replay")
                assert_same(step(model, plan, precision), expected[backend])


@each_plan
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=str)
@pytest.mark.parametrize("keep_attention", [False, True])
def test_kept_attention(plan: Plan, backend: SDPBackend, keep_attention: bool):
    model = random_model(tiny())
    plan = dataclasses.replace(plan, keep_attention=keep_attention)
    with sdpa_kernel(backend):
        assert_agree(step(model, plan), step(model, NONE), plan)


INVERTIBLE = {
    name: config
    for name, config in (METHODS | SHAPES).items()
    if "invert" in policies_of(model_spec(config))
}
each_invertible = pytest.mark.parametrize("config", INVERTIBLE.values(), ids=INVERTIBLE)


@pytest.mark.parametrize(
    "precision",
    ["fp64", "bf16", *(pytest.param(it, marks=pytest.mark.slow) for it in ("fp32", "bf16-mixed"))],
)
@each_invertible
def test_invert(config: ModelConfig, precision: str):
    """Bit for bit where the plan or the guard keeps every layer; else within ``INVERTED`` units of
    rounding, 1e-4 in fp32 and 2e-13 in fp64. With an fp32 carry in another dtype the whole gradient
    within 2%: a Y is off by fp32's rounding, and on the edge between two bf16 numbers one item of
    what a block makes of it by 2^-8. (A bf16 carry: see below.)"""
    model, flatten = random_model(config, precision), nn.utils.parameters_to_vector
    expected = step(model, NONE, precision)
    for kept_layers, tolerance in (((1, 2, 3, 4), 0.05), ((), 0.0)):
        plan = Plan("invert", kept_layers, bool(kept_layers), tolerance)
        assert_same(step(model, plan, precision), expected)
    is_wide = all(read.item_bytes == 4 for read in model.spec.reads[1].values())
    for keep_attention, kept_layers in ((False, ()), (True, (2,)), (False, (1, 3))):
        plan = Plan("invert", kept_layers, keep_attention, tolerance=1e30)
        actual = step(model, plan, precision)
        if is_wide and precision != "fp32":
            flat, wanted = (flatten(grads.values()) for _, grads in (actual, expected))
            assert float((flat - wanted).norm() / wanted.norm()) < 0.02
        elif precision.startswith("fp"):
            assert_same(actual, expected, INVERTED)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
@pytest.mark.parametrize("size", [1.0, 0.8])
def test_invert_in_bf16(monkeypatch: pytest.MonkeyPatch, precision: str, size: float):
    """With gains near 1, as they start and as the guard lets them pass. Every rebuilt output, as
    the model's own run has it, within the bound of ``invert_error``: RMS of the error over the
    largest RMS of the position's outputs. The whole gradient within twice the largest bound: norm,
    softmax and products pass a relative error on about as large as it comes, and each block's
    gradient has that of its own Y and that of the gradient from above. The reference is the bf16
    gradient of a pass that keeps everything, so that its own rounding is not counted."""
    model, flatten = random_model(tiny(), precision), nn.utils.parameters_to_vector
    set_betas(model, size)
    made: dict[tuple[int, str], Tensor] = {}
    rebuilt: dict[tuple[int, str], Tensor] = {}

    def note(found, shift, call, layer, position, *args):
        result = call(*args)
        found[layer - shift, position] = result.double()
        return result

    with monkeypatch.context() as during_forward:
        intercept(during_forward, model, "up_project", functools.partial(note, made, 0))
        model.zero_grad()
        loss = forward(model, Plan("invert", tolerance=1e30), precision)
    with monkeypatch.context() as during_backward:
        intercept(during_backward, model, "carry_from", functools.partial(note, rebuilt, 1))
        loss.backward()
    actual = gradients(model)
    bounds = dict(zip((3, 2, 1), invert_error([size] * 3, UNIT[torch.bfloat16]), strict=True))
    assert rebuilt.keys() == {(layer, position) for layer in (3, 2, 1) for position in POSITIONS}
    for (layer, position), y in rebuilt.items():
        largest = max(made[each, position].norm() for each in (1, 2, 3, 4))
        off = float((y - made[layer, position]).norm() / largest)
        assert 0 < off < bounds[layer], (layer, position)
    _, expected = step(model, NONE, precision)
    flat, wanted = (flatten([grads[n].double() for n in expected]) for grads in (actual, expected))
    assert 0 < float((flat - wanted).norm() / wanted.norm()) < 2 * bounds[1]


@pytest.mark.parametrize("linear", ["lowrank", "full", "resformer"])
def test_invert_needs_a_carry(linear: str):
    with pytest.raises(ValueError, match=r"invert .* does not carry them; take replay or block"):
        forward(random_model(tiny(linear=linear)), Plan("invert"))


@each_plan
@pytest.mark.parametrize("num_layers", [1, 2])
def test_few_layers(plan: Plan, num_layers: int):
    model = random_model(tiny(num_layers=num_layers))
    plan = dataclasses.replace(plan, kept_layers=())
    assert_agree(step(model, plan), step(model, NONE), plan)


# --- 2. what a method may be like ---------------------------------------------------------------


class OtherOrder(Llama):
    """A block that asks for its maps in another order than that of the positions."""

    def make_block(self, shape, options, layer_idx, keeps_activation):
        block = super().make_block(shape, options, layer_idx, keeps_activation)

        def attend(x_BTD, project, context):
            v, k, q = (project(position, x_BTD) for position in "vkq")
            v, k, q = (it.view(*it.shape[:2], 4, -1).transpose(1, 2) for it in (v, k, q))
            mix = functools.partial(nn.functional.scaled_dot_product_attention, is_causal=True)
            mixed = project.attend(mix, q, k, v)
            return project("o", mixed.transpose(1, 2).reshape(x_BTD.shape))

        def feed_forward(x_BTD, project, context):
            up_BTF = project("up", x_BTD)
            return project("down", up_BTF * torch.tanh(project("gate", x_BTD)))

        block.self_attn.forward, block.mlp.forward = attend, feed_forward
        return block


@each_plan
@each_precision
@pytest.mark.parametrize("linear", ["crnet", "lowrank"])
def test_the_order_of_asking_does_not_matter(plan: Plan, precision: str, linear: str):
    """Bit for bit; ``invert`` where every layer is kept. Gate and up have one shape, so that one in
    the place of the other would pass for right."""
    spec = model_spec(tiny(linear=linear, num_kv_heads=None))
    spec = dataclasses.replace(spec, architecture=OtherOrder())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = randomised(build(spec, 0), dtype)
    expected = step(model, NONE, precision)
    if plan.policy == "invert":
        if linear != "crnet":
            return
        if precision == "fp32":
            assert_same(step(model, plan, precision), expected, INVERTED)
        plan = Plan("invert", (1, 2, 3, 4))
    for keep_attention in (False, True):
        plan = dataclasses.replace(plan, keep_attention=keep_attention)
        assert_same(step(model, plan, precision), expected)


@each_rebuilding
def test_maps_asked_for_twice_or_never(policy: str, monkeypatch: pytest.MonkeyPatch):
    model = random_model(tiny())
    mlp = model.model.blocks()[2].mlp

    def twice(x_BTD, project, context):
        project("up", x_BTD)
        return project("down", project("gate", x_BTD) * project("up", x_BTD))

    def never(x_BTD, project, context):
        return project("down", project("gate", x_BTD))

    monkeypatch.setattr(mlp, "forward", twice)
    with pytest.raises(RuntimeError, match="asks for the map up twice in one pass"):
        forward(model, PLANS[policy])
    monkeypatch.setattr(mlp, "forward", never)
    with pytest.raises(RuntimeError, match="did not ask for its map up"):
        forward(model, PLANS[policy])


class Carrying(Parameterization):
    """Low rank beside what an earlier block hands on; ``kind`` is the class of its maps."""

    def __init__(self, source: Any, kind: type[LowRankMap]):
        self.name = "lowrank"  # whose options it takes
        self.source, self.kind = source, kind

    def tensors(self, slot, options):
        scale = TensorSpec((1,), "gain", constant(1.0), decays=False)
        return factors(slot, "balanced", 1.0) | ({"scale": scale} if slot.layer_idx else {})

    def work(self, slot, options, rows, item_bytes):
        return factors_work(slot, rows, item_bytes)

    def reads(self, slot, options):
        width = slot.out_size if self.kind.hands == "output" else slot.rank
        return Read(self.source, width, of=self.kind.hands) if slot.layer_idx else None

    def make(self, slot, options):
        return self.kind(self.tensors(slot, options))


class BottleneckMap(LowRankMap):
    """``y = tanh(z) B``, ``z = x A + scale * carry``; z is handed on. Plain operations, which
    nothing but autocast casts."""

    hands = "bottleneck"

    def run(self, x_BTD, carry, known):
        z_BTR = x_BTD @ self.A
        if carry is not None:
            z_BTR = z_BTR + self.scale.to(carry.dtype) * carry
        if known is not None:
            z_BTR = _Known.apply(z_BTR, known[0])
        return torch.tanh(z_BTR) @ self.B, z_BTR

    def down_project(self, x_BTD, carry):
        return self.run(x_BTD, carry, None)[1]

    def up_project(self, bottleneck, carry):
        return torch.tanh(bottleneck) @ self.B


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, known):
        return known.clone()

    @staticmethod
    def backward(ctx, dz):
        return dz, None


class WholeMap(LowRankMap):
    """``y = x A B + scale * carry``; y is handed on. It does not come apart."""

    comes_apart = False

    def run(self, x_BTD, carry, known):
        output = (x_BTD @ self.A) @ self.B
        if carry is not None:
            output = output + self.scale.to(carry.dtype) * carry
        return output, output


def carrying(source: str, kind: type[LowRankMap], dtype: torch.dtype) -> LanguageModel:
    method = Carrying(source, kind)
    spec = dataclasses.replace(model_spec(tiny(linear="lowrank")), linear=method)
    assert policies_of(spec) == ["none", "block", "replay"]
    return randomised(build(spec, 0), dtype)


@pytest.mark.parametrize("source", ["below", "first"])
@pytest.mark.parametrize("kind", [BottleneckMap, WholeMap])
@each_precision
def test_other_ways_to_hand_on(source: str, kind: type[LowRankMap], precision: str):
    """Bottlenecks or outputs, of the block below or the first one, whole or apart: bit for bit."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = carrying(source, kind, dtype)
    expected = step(model, NONE, precision)
    for plan in (PLANS["block"], PLANS["replay"], PLANS["replay-one-segment"]):
        assert_same(step(model, plan, precision), expected)


def test_what_cannot_be_rebuilt_is_refused(monkeypatch: pytest.MonkeyPatch):
    model = carrying("below", WholeMap, torch.float32)
    handle = model.model.blocks()[1].mlp.register_forward_hook(lambda *args: args[2].mul_(2.0))
    with pytest.raises(RuntimeError, match="output of the map down was changed in place"):
        forward(model, PLANS["replay"])
    handle.remove()
    monkeypatch.setattr(BottleneckMap, "comes_apart", False)
    model = carrying("below", BottleneckMap, torch.float32)
    with pytest.raises(RuntimeError, match="the map q hands on its bottleneck and does not come"):
        forward(model, PLANS["replay"])


# --- 3. the order -------------------------------------------------------------------------------


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
    original = Block.run
    log: list[tuple[str, str]] = []

    def run(block, *args, **more):
        log.append((f"r{block.layer_idx + 1}", ""))
        return original(block, *args, **more)

    def rebuild(shift, call, layer, position, *args):
        log.append((f"y{layer - shift}", position))
        return call(*args)

    loss = forward(model, Plan(policy, kept_layers, tolerance=1e30))
    monkeypatch.setattr(Block, "run", run)
    intercept(monkeypatch, model, "up_project", functools.partial(rebuild, 0))
    intercept(monkeypatch, model, "carry_from", functools.partial(rebuild, 1))
    loss.backward()
    assert log == [(w, p) for w in expected.split() for p in (POSITIONS if "y" in w else [""])]


# --- 4. one map and its halves ------------------------------------------------------------------


@torch.no_grad()
def chain(gains: list[float], dtype: torch.dtype) -> tuple[list[Any], ...]:
    """Successive maps, their bottlenecks, their outputs by ``up_project`` with that below the first
    in front, and all but the last once more by ``carry_from``, from the top down. Inputs have RMS 1
    in every row, as after a norm; so have, on average, the products and the lowest output."""
    generator = torch.Generator().manual_seed(1)
    maps, z, outputs = [], [], [torch.randn(64, 48, generator=generator).to(dtype)]
    for idx, gain in enumerate(gains, start=1):
        slot = Slot("q", idx, len(gains) + 1, 48, 48, 12, 1.0)
        maps.append(linears.get("crnet").make(slot, CRNetOptions()).to(dtype))
        maps[-1].A.copy_(torch.randn(48, 12, generator=generator) / 48**0.5)
        maps[-1].B.copy_(torch.randn(12, 48, generator=generator) / 12**0.5)
        maps[-1].beta.fill_(gain)
        x = torch.randn(64, 48, generator=generator)
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        z.append(maps[-1].down_project(x.to(dtype), outputs[-1]))
        outputs.append(maps[-1].up_project(z[-1], outputs[-1]))
    rebuilt = outputs[-1:]
    for module, z_top in zip(maps[::-1], z[::-1], strict=True):
        rebuilt.append(module.carry_from(rebuilt[-1], z_top))
    return maps, z, outputs, rebuilt[1:]


def test_halves_follow_the_plain_reference():
    """fp64: ``up_project`` up and ``carry_from`` down a chain of five, against the equations:
    1e-14, as some ten roundings of 1e-16 are divided by gains whose product is 0.76."""
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
@each_model
def test_a_known_map_is_the_map(config: ModelConfig, precision: str):
    """Every map of every method: its halves repeat the forward pass, and made from what is known
    it is the same node. Bit for bit and dtype for dtype, gradients too. A map casts what it reads;
    that of an operator has no product, and what it gets has the compute dtype."""
    model, generator = random_model(config, precision), torch.Generator().manual_seed(2)
    spec, dtype, mixed = model.spec, model.lm_head.weight.dtype, precision == "bf16-mixed"
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed)
    for block, slots in zip(model.model.blocks(), spec.slots, strict=True):
        for slot in slots:
            linear, read = block.maps[slot.position], spec.linear.reads(slot, spec.linear_options)
            x = torch.randn(3, 5, slot.in_size, generator=generator)
            x = x.to(torch.bfloat16 if slot.is_operator and mixed else dtype).requires_grad_()
            carry = None
            if read is not None:
                carry = torch.randn(3, 5, read.width, generator=generator).to(dtype)
                carry.requires_grad_()
            leaves = [x, *([] if carry is None else [carry])]
            leaves += [
                it for it in linear.parameters() if it.requires_grad and it is not linear.bias
            ]
            with autocast:
                expected, handed = linear(x, carry)
                known = None
                if linear.comes_apart:
                    with torch.no_grad():
                        bottleneck = linear.down_project(x, carry)
                        known = bottleneck, linear.up_project(bottleneck, carry)
                    assert same_bits(known[1], expected)
                    wanted = {"output": known[1], "bottleneck": bottleneck}[linear.hands]
                    assert same_bits(handed, wanted)
                actual, _ = linear(x, carry, known)
            width = {"fp32": 4}.get(precision, 2)
            declared = spec.linear.output_bytes(slot, spec.linear_options, width)
            assert expected.dtype.itemsize == declared
            assert same_bits(actual, expected)
            probe = torch.randn(expected.shape, generator=generator).to(expected.dtype)
            pairs = [torch.autograd.grad(it, leaves, probe) for it in (actual, expected)]
            assert all(itertools.starmap(same_bits, zip(*pairs, strict=True)))


# --- 5. invert's guard --------------------------------------------------------------------------


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
    for layer, position in zip((2, 3, 4, 2, 3, 4, 2), POSITIONS, strict=True):
        beta_of(model, layer, position).fill_(-0.05)
        for kept_layers in ((), (layer - 1,)):
            forward(model, Plan("invert", kept_layers, tolerance=tolerance), precision)
            expected = {} if kept_layers else {position: (layer - 1,)}
            assert model.guard_added() == expected
        beta_of(model, layer, position).fill_(1.0)


def test_the_guard_is_silent_in_fp32():
    """Nothing beyond the plan at the default tolerance, with gains near 1 and with small ones; and
    gains of 1e-3 pass where the tolerance lets them."""
    model = random_model(tiny(num_layers=8, hidden_size=8, intermediate_size=8))
    for beta, tolerance in ((1.0, 0.05), (0.9, 0.05), (0.2, 0.05), (1e-3, 1e30)):
        set_betas(model, beta)
        forward(model, Plan("invert", (4,), tolerance=tolerance))
        assert model.guard_added() == {}


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
        assert model.guard_added() == dict.fromkeys(positions, (1, 2))
        if precision == "fp32" or not units:
            assert_same(actual, expected, units)


# --- 6. planted faults --------------------------------------------------------------------------


def faulty_step(patch: pytest.MonkeyPatch, model: LanguageModel, plan: Plan, fault: str) -> Result:
    """A step with a fault in its backward pass, in the third of four layers, which starts from a
    checkpoint both in ``PLANS['replay']`` and in ``PLANS['invert']``."""
    is_inverted, original = plan.policy == "invert", Block.run
    stale: dict[str, Tensor] = {}

    def rebuild(call, layer, position, *args):
        if layer != 3:
            return call(*args)
        y, z = args if is_inverted else args[::-1]
        if fault == "dropped-layer":
            return y.clone()
        if fault == "stale-checkpoint":
            y = stale.setdefault(position, y.clone())
        if fault == "wrong-gain" and position == "v":
            return call(y, z) / 1.01 if is_inverted else call(z, y * 1.01)
        return call(y, z) if is_inverted else call(z, y)

    def run(block, state, *args, **more):
        if block.layer_idx == 2 and fault == "altered-x":
            altered = state[0].detach().clone()
            altered[0, 0, 0] *= 1.01
            state = (altered.requires_grad_(),)
        return original(block, state, *args, **more)

    for seed in (5, 3):  # the first step leaves what is stale in the second
        model.zero_grad()
        loss = forward(model, plan, seed=seed)
        with patch.context() as during_backward:
            during_backward.setattr(Block, "run", run)
            intercept(
                during_backward, model, "carry_from" if is_inverted else "up_project", rebuild
            )
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


def test_a_policy_that_does_not_exist_is_refused():
    """Nothing would be recomputed, without a word."""
    with pytest.raises(ValueError, match=r"'bogus'; known are none, block, replay, invert"):
        RecomputePlan("bogus")  # type: ignore[arg-type]
