"""Activations that wait as NF4 codes: the codes themselves, what is packed, what comes of it."""

from __future__ import annotations

import contextlib
import functools
import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crnet import linears
from crnet.config.check import check
from crnet.config.sections import DataConfig, RunConfig, TrainConfig
from crnet.cost.flops import block_flops
from crnet.cost.micro_batch import MicroBatch
from crnet.cost.peak import peak_bytes as predicted_peak
from crnet.cost.plan_choice import usual_plan
from crnet.errors import ConfigError
from crnet.kernels.nf4 import NF4, PLACES, levels, quantise, read_back
from crnet.kernels.nf4_bytes import BLOCK, GROUP, nf4_bytes
from crnet.measure.contract import check_resumes
from crnet.measure.examples import Example, batch, examples, train
from crnet.measure.memory import peak_bytes, saved_bytes
from crnet.model.language_model import LanguageModel
from crnet.recompute import packed
from crnet.recompute.packed import PackedBlock, Packing
from crnet.recompute.plan import RecomputePlan
from crnet.recompute.second_run import Keep
from recompute_steps import NONE, forward, tiny
from shapes import make, random_tokens

PACKED = RecomputePlan(keep_as="nf4")
REPLAYED = RecomputePlan("replay", (2,), keep_as="nf4")

PUBLISHED = (  # QLoRA (arXiv:2305.14314), appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def back(tensor: Tensor) -> Tensor:
    """What is read back of a tensor, in its own shape."""
    flat = tensor.contiguous().view(-1)
    return read_back(quantise(flat), flat.numel(), flat.dtype).view(tensor.shape)


# --- the codes ------------------------------------------------------------------------------------


def test_levels_are_those_that_were_published():
    """Within 3e-7: they were computed in fp32."""
    assert max(abs(a - b) for a, b in zip(levels(), PUBLISHED, strict=True)) < 3e-7


@pytest.mark.parametrize("count", [1, 15, 16, 17, BLOCK * GROUP, BLOCK * GROUP + 1, 300_000])
def test_bytes_are_the_closed_form(count: int):
    parts = quantise(normal(count))
    assert sum(part.numel() * part.element_size() for part in parts) == nf4_bytes(count)
    assert read_back(parts, count, torch.float32).shape == (count,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_codes_are_those_of_the_nearest_levels(dtype: torch.dtype):
    """But for a place of the table, around the middle between two levels."""
    items = (normal(8192) * 10 ** normal(512, seed=1).repeat_interleave(16)).to(dtype)
    blocks = items.float().view(-1, BLOCK)
    quotients = (blocks / blocks.abs().amax(1, keepdim=True)).view(-1, 1)
    away = (quotients - torch.tensor(levels())).abs()
    codes = quantise(items).codes
    found = torch.stack((codes % 16, codes // 16), dim=1).view(-1)
    chosen = away.gather(1, found.long().view(-1, 1))
    assert float((chosen - away.amin(1, keepdim=True)).max()) <= 2 / PLACES
    assert int((found != away.argmin(1)).sum()) < 8192 / 200


def test_maxima_are_eight_bit_floats_around_their_mean():
    """Read back, a maximum is off by at most 1/16 of its distance from the mean (three bits of a
    fraction, rounded), or by the least step of its group."""
    items = normal(BLOCK * GROUP * 3) * (1 + normal(GROUP * 3, seed=1).abs().repeat_interleave(16))
    largest = items.view(-1, BLOCK).abs().amax(1)
    codes = quantise(items)
    ends = codes._replace(codes=torch.full_like(codes.codes, 0xFF))  # the level 1 everywhere
    found = read_back(ends, items.numel(), torch.float32).view(-1, BLOCK)[:, 0]
    step = codes.scales[:-1].repeat_interleave(GROUP) * 2.0**-9
    off = (largest - largest.mean()).abs()
    assert bool(((found - largest).abs() <= off / 16 + step + 1e-6).all())


def test_an_error_is_a_tenth_and_zeros_stay():
    items = normal(65_536)
    assert 0.07 < float((back(items) - items).norm() / items.norm()) < 0.09
    assert not back(torch.zeros(64)).any()
    assert not back(torch.ones(64)).isnan().any()


def test_what_is_not_finite_is_not_hidden():
    for value in (float("nan"), float("inf")):
        items = normal(64)
        items[3] = value
        assert not back(items).isfinite().all()


@pytest.mark.slow
def test_codes_are_those_of_bitsandbytes():
    """An oracle: its blocks have 64 items at least, so ours are asked to have as many."""
    functional = pytest.importorskip("bitsandbytes.functional")
    items = normal(64 * 256)
    theirs, state = functional.quantize_4bit(items, blocksize=64, quant_type="nf4")
    quotients = items.view(-1, 64) / items.view(-1, 64).abs().amax(1, keepdim=True)
    # A block of ours whose maximum is 1: its items are their own quotients.
    ours = torch.cat((quotients.view(-1, 8), torch.ones(len(quotients) * 8, 8)), dim=1)
    codes = quantise(ours.view(-1)).codes.view(-1, BLOCK // 2)[:, :4].reshape(-1)
    theirs = theirs.view(-1)
    swapped = (theirs << 4) | (theirs >> 4)  # they have the first in the high bits
    one = torch.stack((codes % 16, codes // 16), 1).view(-1)
    other = torch.stack((swapped % 16, swapped // 16), 1).view(-1)
    middles = torch.tensor([(a + b) / 2 for a, b in zip(levels(), levels()[1:], strict=False)])
    near = (quotients.view(-1, 1) - middles).abs().amin(1) < 2 / PLACES
    assert torch.equal(one[~near], other[~near])
    assert int(near.sum()) < len(near) / 50
    assert torch.allclose(state.code, torch.tensor(levels()), atol=3e-7)


# --- what is packed -------------------------------------------------------------------------------


def test_attention_is_run_again_from_what_is_read_back():
    """Its gradients are those of the read-back q, k and v: weights add up to one."""
    shape, run = (2, 3, 5, 8), PackedBlock(Packing())
    run._is_weight = run._is_exact = lambda tensor: False
    run.autocast = contextlib.nullcontext
    qkv = [normal(*shape, seed=seed).requires_grad_() for seed in range(3)]
    mix = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    mixed = Keep.apply(run.attend(mix, *qkv), run.shelf.take_parts(), run._open)
    slope = normal(*shape, seed=4)
    mixed.backward(slope)
    other = [back(each.detach()).requires_grad_() for each in qkv]
    mix(*other).backward(slope)
    for actual, expected in zip(qkv, other, strict=True):
        assert torch.equal(actual.grad, expected.grad)
    assert torch.equal(mixed, mix(*qkv))


@pytest.mark.parametrize("policy", ["none", "replay"])
def test_flops_are_the_closed_form(policy: Any):
    example = examples(linears.get("crnet"))[0]
    plan, model = RecomputePlan(policy, keep_as="nf4"), example.build()
    model.recompute(plan)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):
        loss, _ = model(*batch())
        with counter:
            loss.backward()
    wanted = block_flops(MicroBatch(example.spec, 4, 8), plan)
    assert counter.get_total_flops() == wanted["backward"] + wanted["recompute"]


def test_a_tensor_is_packed_once(monkeypatch: pytest.MonkeyPatch):
    """gate and up are kept by the activation and, as carries, by the block above."""
    sizes: list[int] = []
    real = packed.quantise

    def counted(flat: Tensor) -> NF4:
        sizes.append(flat.numel())
        return real(flat)

    monkeypatch.setattr(packed, "quantise", counted)
    forward(make(tiny()), PACKED)
    assert sizes.count(2 * 9 * 24) == 4 * 3  # gate, up and their product in four blocks


def alive() -> list[packed.Packed]:
    return [each for each in gc.get_objects() if type(each) is packed.Packed]


@pytest.mark.parametrize("plan", [PACKED, REPLAYED])
def test_nothing_packed_outlives_the_step(plan: RecomputePlan):
    model = make(tiny())
    gc.collect()
    gc.disable()
    try:
        others = len(alive())  # of a test that failed: its report holds its graph
        loss = forward(model, plan)
        held = alive()
        assert len(held) > others
        assert all(not each.parts for each in held)  # tensors are the graph's alone
        loss.backward()
        del loss, held
        assert len(alive()) == others
    finally:
        gc.enable()


@pytest.mark.parametrize("plan", [NONE, PACKED, REPLAYED])
def test_counting_bytes_leaves_no_graph_behind(plan: RecomputePlan):
    """Nodes keep their own outputs: handed back with their nodes, they would hold each other."""
    model = make(tiny())
    model.recompute(plan)

    def outputs() -> list[Tensor]:
        gc.collect()
        found = [each for each in gc.get_objects() if type(each) is Tensor]
        return [each for each in found if each.grad_fn is not None]

    others = outputs(), alive()  # held: what an earlier test left does not go meanwhile
    before = tuple(map(len, others))
    assert saved_bytes(model, random_tokens(2, 9), random_tokens(2, 9)) > 0
    assert (len(outputs()), len(alive())) == before


@pytest.mark.parametrize("plan", [PACKED, REPLAYED])
def test_a_second_backward_pass_is_refused(plan: RecomputePlan):
    loss = forward(make(tiny()), plan)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


# --- what comes of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("linear", linears.names())
def test_every_parameterization_has_its_loss_and_nearly_its_gradients(linear: str):
    """Losses to the bit; the whole gradient within a fifth, of two plans (measured: a tenth,
    or less where the head's exact one is most of it)."""
    example = examples(linears.get(linear))[0]
    model = example.build()
    train(example, model, example.build_optimizer(model), 2)  # off zeros, where no gradient passes

    def taken(plan: RecomputePlan) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        loss = forward(model, plan)
        loss.backward()
        found = [each.grad for each in model.parameters() if each.grad is not None]
        return loss.detach(), torch.cat([each.flatten() for each in found])

    loss, gradient = taken(NONE)
    for plan in (PACKED, REPLAYED):
        other_loss, other = taken(plan)
        assert torch.equal(other_loss, loss)
        error = float((other - gradient).norm() / gradient.norm())
        assert 1e-4 < error < 0.2, (plan.policy, error)


def test_a_run_resumes_to_the_bit(monkeypatch: pytest.MonkeyPatch):
    example = examples(linears.get("crnet"))[0]
    build = Example.build

    def built(self: Example, *args: Any, **more: Any) -> LanguageModel:
        model = build(self, *args, **more)
        model.recompute(REPLAYED)
        return model

    monkeypatch.setattr(Example, "build", built)
    assert list(check_resumes(example)) == []


@pytest.mark.slow
@pytest.mark.parametrize("linear", ["crnet", "full"])
@pytest.mark.parametrize("policy", ["none", "replay"])
def test_peaks_are_within_five_percent(linear: str, policy: Any):
    """Of one micro-batch, traced, as the closed form has them."""
    config = tiny(
        linear=linear,
        hidden_size=128,
        intermediate_size=344,
        num_layers=8,
        num_heads=4,
        num_kv_heads=None,
        rank="32",
    )
    model = make(config)
    micro_batch = MicroBatch(model.spec, 4, 128)
    usual = usual_plan(micro_batch, policy)
    plan = RecomputePlan(policy, usual.kept_layers, keep_as="nf4")
    model.recompute(plan)
    tokens = random_tokens(4, 128)

    def run() -> None:
        model(tokens, tokens)[0].backward()

    run()
    measured = peak_bytes(run) + 8 * tokens.numel()
    assert predicted_peak(micro_batch, plan) == pytest.approx(measured, rel=0.05)
    assert saved_bytes(model, tokens, tokens) < measured


def refusal(**changes: Any) -> str:
    train, model = TrainConfig(keep_as="nf4", **changes.pop("train", {})), tiny(**changes)
    with pytest.raises(ConfigError) as error:
        check(RunConfig(model=model, train=train, data=DataConfig(sequence_length=16)))
    return str(error.value)


@pytest.mark.parametrize("policy", ["invert", "block"])
def test_other_policies_are_refused_by_name(policy: str):
    told = refusal(train={"recompute": policy})
    assert f"--train.keep-as nf4: --train.recompute {policy}" in told
    assert "take --train.recompute none or replay" in told
    with pytest.raises(ValueError, match=f"policy '{policy}' keeps nothing as nf4"):
        RecomputePlan(policy, keep_as="nf4")  # type: ignore[arg-type]


def test_other_refusals_say_why():
    auto = refusal(train={"recompute": "auto", "activation_budget_gib": 1.0})
    assert "--train.recompute auto compares exact activations" in auto
    assert "keeps what its compiler chose" in refusal(train={"compile": True})
    kept = refusal(train={"recompute": "replay", "recompute_attention": "keep"})
    assert "what attention keeps does not go with other queries and keys" in kept
    assert "the last read of the stream attnres" in refusal(stream="attnres", linear="lowrank")
