"""Parameterizations with events: what an event leaves as it was, what it makes anew, what the
optimizer forgets. Equality is to the bit where a test says so; other tolerances are named.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet import linears
from crnet.cli.app import main
from crnet.config.check import check
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.errors import ConfigError
from crnet.linears._maps import refactored
from crnet.linears.lora import LoRAOptions, ReLoRAOptions, SwitchLoRAOptions
from crnet.linears.lowrank import LowRankOptions
from crnet.linears.rso import RSOOptions
from crnet.linears.sst import SSTOptions
from crnet.linears.sst.module import draw
from crnet.measure import examples as small
from crnet.model.build import build
from crnet.model.events import run_events
from crnet.model.language_model import LanguageModel
from crnet.model.seeds import generator_of
from crnet.optimizers import forget
from crnet.specs import Forget, Slot
from crnet.storage import checkpoint
from crnet.train import start
from crnet.train.run import Result
from test_optimizer_state import adamw, stepped
from test_train import run, tiny, weights_of


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- factors of the same product ------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(12, 4, 20), (20, 4, 12), (3, 5, 7), (7, 5, 3)])
def test_refactored(sizes: tuple[int, int, int]):
    """The product of before and balanced factors, fp64 1e-12; the best of every smaller rank."""
    in_size, rank, out_size = sizes
    generator = torch.Generator().manual_seed(0)
    a, b = random(generator, in_size, rank), random(generator, rank, out_size)
    left, right = refactored(a, b)
    assert (left.shape, right.shape) == (a.shape, b.shape)
    assert torch.allclose(left @ right, a @ b, rtol=0, atol=1e-12)
    gram = left.T @ left
    assert torch.allclose(gram, right @ right.T, rtol=0, atol=1e-12)
    values = torch.linalg.svdvals(a @ b)
    known = min(rank, len(values))
    assert torch.allclose(gram.diag()[:known], values[:known], rtol=0, atol=1e-12)
    assert torch.allclose(gram, gram.diag().diag(), rtol=0, atol=1e-12)
    first = left[:, :2] @ right[:2]
    assert torch.linalg.svdvals(a @ b - first)[0] == pytest.approx(float(values[2]), abs=1e-12)


def test_refactored_of_lower_precision():
    """bf16 factors: the result is fp64, of the product of the very numbers that were given."""
    generator = torch.Generator().manual_seed(0)
    a, b = (random(generator, *shape).bfloat16() for shape in ((6, 3), (3, 5)))
    left, right = refactored(a, b)
    assert left.dtype == right.dtype == torch.float64
    assert torch.allclose(left @ right, a.double() @ b.double(), rtol=0, atol=1e-12)


def test_refactored_leaves_zeros_that_fill_up():
    """Bit: rows of A and columns of B that are zero (a padded width) stay so."""
    generator = torch.Generator().manual_seed(0)
    a, b = random(generator, 24, 4), random(generator, 4, 16)
    a[20:], b[:, 11:] = 0, 0
    left, right = refactored(a, b)
    assert not left[20:].any()
    assert not right[:, 11:].any()


# --- models of one method, trained for some steps -------------------------------------------------


def example_of(linear: str, options: Any) -> small.Example:
    example = small.examples(linears.get(linear))[0]
    chosen = {linear.replace("-", "_"): options}
    return dataclasses.replace(example, model=dataclasses.replace(example.model, **chosen))


def trained(linear: str, options: Any, steps: int) -> tuple[LanguageModel, torch.optim.Optimizer]:
    """A small model after so many steps and their events, and its optimizer."""
    example = example_of(linear, options)
    model = example.build()
    optimizer = example.build_optimizer(model)
    small.train(example, model, optimizer, steps)
    return model, optimizer


@torch.no_grad()
def logits_of(model: LanguageModel) -> Tensor:
    return model.logits(small.batch()[0])


def maps_of(model: LanguageModel) -> list[Any]:
    return [each for block in model.model.blocks() for each in block.maps.values()]


# --- ReLoRA ---------------------------------------------------------------------------------------


def test_the_largest_moments_stay():
    """Bit: exactly the share, of the largest first moments, in both moments; nothing is drawn."""
    parameter = torch.nn.Parameter(torch.ones(20, 10))
    optimizer = adamw(parameter)
    stepped(optimizer)
    before = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    forget(optimizer, parameter, Forget("weight", kept_frac=0.2, kept="largest"), torch.Generator())
    state, size = optimizer.state[parameter], before["exp_avg"].abs()
    kept = size >= size.flatten().sort().values[-40]
    assert int(kept.sum()) == 40
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key], torch.where(kept, before[key], 0.0))
    assert state["step"] == 1


@pytest.mark.parametrize(("reset", "share"), [("random", 0.001), ("magnitude", 0.2), ("zero", 0.0)])
def test_relora_resets_the_moments_of_its_factors_alone(reset: Any, share: float):
    """Exact shares of magnitude and zero; every other moment is what it was, to the bit."""
    model, optimizer = trained("relora", ReLoRAOptions(reset=reset), 3)
    names: Any = {parameter: name for name, parameter in model.named_parameters()}
    states = {names[p]: state for p, state in optimizer.state.items()}
    before = {name: state["exp_avg"].clone() for name, state in states.items()}
    run_events(model, optimizer, 1000, seed=0)
    kept = dict.fromkeys(("A", "B"), 0)
    items = dict.fromkeys(("A", "B"), 0)
    for name, state in states.items():
        factor = name.rpartition(".")[2]
        if factor in kept:
            kept[factor] += int((state["exp_avg"] != 0).sum())
            items[factor] += state["exp_avg"].numel()
            assert torch.equal(state["exp_avg"] != 0, state["exp_avg_sq"] != 0)
        else:
            assert torch.equal(state["exp_avg"], before[name]), name
    for factor, count in kept.items():
        # Random: six deviations of a binomial count. Magnitude: every tensor's share is rounded.
        slack = {"random": 6 * (items[factor] * share) ** 0.5, "magnitude": 21, "zero": 0}[reset]
        assert abs(count - share * items[factor]) <= slack, (factor, count, items[factor])


def test_relora_as_released_begins_with_zeros():
    """Both factors are zero and no gradient reaches them before the first merge; then A is drawn
    and B trains."""
    options = ReLoRAOptions(released=True, merge_every=2)
    model, _ = trained("relora", options, 1)
    assert not any(each.A.any() or each.B.any() for each in maps_of(model))
    model, _ = trained("relora", options, 3)
    assert all(each.A.any() and each.B.any() for each in maps_of(model))


def test_codes_have_no_largest_moment():
    """Refused before the run, with the mend."""
    changes = {"model": {"linear": "relora", "relora": {"reset": "magnitude"}}}
    check(override(RunConfig(), **changes))
    with pytest.raises(ConfigError, match=r"keeps codes of moments.*take another optimizer"):
        check(override(RunConfig(), **changes, optimizer={"name": "adam8bit"}))
    check(override(RunConfig(), model={"linear": "relora"}, optimizer={"name": "adam8bit"}))


@pytest.mark.slow
def test_lora_is_that_of_peft():
    """PEFT's layer as the oracle, fp64 1e-12: output, and the gradients of x and both factors; PEFT
    merges to the matrix that we export, fp32 1e-6."""
    peft = pytest.importorskip("peft")
    slot = Slot("q", 0, 1, 12, 20, 4, 0.02)
    ours = linears.get("lora").make(slot, LoRAOptions(alpha=6.0)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        parameter.data.copy_(random(generator, *parameter.shape))
    model = torch.nn.Sequential(torch.nn.Linear(12, 20, bias=False)).double()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"])
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    theirs: Any = adapted.base_model.model[0]
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    theirs.base_layer.weight.data.copy_(ours.weight)
    a.data.copy_(ours.A.T)
    b.data.copy_(ours.B.T)
    x, cotangent = random(generator, 3, 5, 12), random(generator, 3, 5, 20)
    results = []
    for layer in (lambda x: ours(x, None)[0], theirs):
        given = x.clone().requires_grad_()
        output = layer(given)
        output.backward(cotangent)
        results.append((output, given.grad))
    pairs = [*zip(*results, strict=True), (ours.A.grad, a.grad.T), (ours.B.grad, b.grad.T)]
    for found, wanted in pairs:
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    merged = adapted.merge_and_unload()[0].weight
    assert torch.allclose(ours.dense_weight().double(), merged, rtol=0, atol=1e-5)


# --- refactorisation ------------------------------------------------------------------------------


def test_lowrank_refactors():
    """The function stays, fp64 1e-12; factors are balanced; the optimizer begins anew on them and
    on nothing else."""
    options = LowRankOptions(refactor_every=4)
    model, optimizer = trained("lowrank", options, 3)
    wide = build(example_of("lowrank", options).spec, 0, dtype=torch.float64)
    wide.load_state_dict(model.state_dict())
    logits = logits_of(wide)
    assert not wide.run_events(3, seed=0)
    wide.run_events(4, seed=0)
    assert float((logits_of(wide) - logits).abs().max()) <= 1e-12
    for each in maps_of(wide):
        a, b = each.A.detach(), each.B.detach()
        gram = a.T @ a
        assert torch.allclose(gram, b @ b.T, rtol=0, atol=1e-12)
        assert torch.allclose(gram, gram.diag().diag(), rtol=0, atol=1e-12)
    run_events(model, optimizer, 4, seed=0)
    for name, (_, parameter) in model.trained().items():
        state, is_new = optimizer.state[parameter], name.endswith((".A", ".B"))
        assert float(state["step"]) == (0 if is_new else 3), name
        assert bool(state["exp_avg"].any() or state["exp_avg_sq"].any()) != is_new, name


def test_lowrank_without_refactoring_has_no_events():
    """It goes into other loops and is split as before; with them, neither."""
    method, slot = linears.get("lowrank"), Slot("q", 0, 1, 12, 20, 4, 0.02)
    for options in (LowRankOptions(), LowRankOptions(refactor_every=4)):
        is_plain = options.refactor_every is None
        assert method.has_events(options) != is_plain
        assert isinstance(method.split(slot, options), str) != is_plain
        assert not method.events(0, options)
    assert method.problems(LowRankOptions(refactor_every=0), []) == [
        "--model.lowrank.refactor-every is 0; it must be above zero"
    ]


# --- RSO ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_rso_restart():
    """The function stays, fp64 1e-12; B is zero and P another draw of variance 1/r; a resumed run
    and every process draw the same; the update is in the frozen matrix."""
    config = small.small_model(linear="rso", rank="8", hidden_size=64, intermediate_size=96)
    one, other = (build(model_spec(config), 0, dtype=torch.float64) for _ in range(2))
    generator = torch.Generator().manual_seed(3)
    for model in (one, other):
        generator.manual_seed(3)
        for _, parameter in model.trained().values():
            parameter += 0.05 * random(generator, *parameter.shape)
    tokens, _ = small.batch()
    logits = one.logits(tokens)
    before = {name: parameter.clone() for name, parameter in one.named_parameters()}
    assert one.run_events(200, seed=7) == other.run_events(200, seed=7)
    assert float((one.logits(tokens) - logits).abs().max()) <= 1e-12
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))
        if name.endswith(".P"):
            assert not torch.equal(parameter, before[name])
            assert float(parameter.std()) == pytest.approx(8**-0.5, rel=0.1)
        if name.endswith(".B"):
            assert not parameter.any()
    assert not one.run_events(199, seed=7)
    draws = [each.P[0] for each in maps_of(one)]
    assert len({tuple(row.tolist()) for row in draws}) == len(draws)


def test_rso_begins_its_optimizer_anew():
    """A step after a restart is a first step of AdamW: the rate times the sign of the gradient, to
    1e-4; without the restart of the count it would be three times as long. The rest goes on."""
    model, optimizer = trained("rso", RSOOptions(restart_every=5), 5)
    for name, (_, parameter) in model.trained().items():
        state = optimizer.state[parameter]
        is_new = name.endswith(".B")
        assert float(state["step"]) == (0 if is_new else 5), name
        assert bool(state["exp_avg"].any()) != is_new, name
    total, count = model(*small.batch())
    optimizer.zero_grad()
    (total / count).backward()
    optimizer.step()
    for each in maps_of(model):
        large = each.B.grad.abs() > 1e-3  # beside AdamW's eps
        rate = optimizer.param_groups[0]["lr"]
        assert torch.allclose(each.B[large], -rate * each.B.grad[large].sign(), rtol=1e-4, atol=0)


def test_rso_keeps_no_input():
    """A map's graph holds r numbers a token beside its weights; its gradient is that of a dense
    matrix, projected: dB = (dY^T X P)^T, fp64 1e-12."""
    slot = Slot("q", 0, 1, 48, 20, 4, 0.02)
    linear: Any = linears.get("rso").make(slot, RSOOptions()).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in linear.parameters():
        parameter.data.copy_(random(generator, *parameter.shape))
    x, cotangent = random(generator, 7, 48).requires_grad_(), random(generator, 7, 20)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = linear(x, None)
    output.backward(cotangent)
    own = {parameter.data_ptr() for parameter in linear.parameters()}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(7, 4)]
    dense = cotangent.T @ x.detach()
    assert torch.allclose(linear.B.grad, (dense @ linear.P).T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("proximal", [True, False])
def test_rso_proximal_term(proximal: bool):
    """Weight decay acts on B where it is the proximal term, and nowhere else in the maps."""
    spec = example_of("rso", RSOOptions(proximal=proximal)).spec
    assert {t.decays for name, t in spec.tensors.items() if name.endswith(".B")} == {proximal}


# --- SST ------------------------------------------------------------------------------------------


def sst_map(in_size: int, out_size: int, rank: int = 4) -> Any:
    """An fp64 map, filled as a run begins."""
    slot = Slot("q", 0, 1, in_size, out_size, rank, 0.02)
    method = linears.get("sst")
    linear = method.make(slot, SSTOptions()).double()
    for name, parameter in linear.named_parameters():
        value = method.initial_value(
            name, slot, SSTOptions(), functools.partial(generator_of, 0, "map")
        )
        parameter.data.copy_(value)
    return linear


@pytest.mark.parametrize("sizes", [(12, 20), (20, 12)])
def test_sst_begins_as_the_decomposition_of_a_gaussian(sizes: tuple[int, int]):
    """Orthonormal to fp32's rounding, values fall; A and B are the vectors that ``index`` names."""
    linear = sst_map(*sizes)
    eye = torch.eye(12, dtype=torch.float64)
    assert torch.allclose(linear.V.T @ linear.V, eye, rtol=0, atol=1e-5)
    assert torch.allclose(linear.U @ linear.U.T, eye, rtol=0, atol=1e-5)
    assert bool((linear.s.diff() < 0).all())
    assert float(linear.dense_weight().std()) == pytest.approx(0.02, rel=0.15)
    at = linear.index.long()
    assert len(set(at.tolist())) == 4
    assert torch.equal(linear.A, linear.V[:, at])
    assert torch.equal(linear.B, linear.U[at])


def test_sst_from_factor_to_factor_is_the_matrix():
    """Few rows and many: output and every gradient, fp64 1e-12; which is taken hangs on the rows
    alone."""
    linear = sst_map(12, 20)
    assert [linear.builds(count) for count in (1, 20, 21, 30)] == [False, False, True, True]
    generator = torch.Generator().manual_seed(1)
    x, cotangent = random(generator, 30, 12), random(generator, 30, 20)
    results = []
    for parts in ([x], x.split(10)):
        given = [part.clone().requires_grad_() for part in parts]
        linear.zero_grad()
        output = torch.cat([linear(part, None)[0] for part in given])
        output.backward(cotangent)
        gradients: list[Any] = [each.grad for each in (*given, linear.s, linear.A, linear.B)]
        results.append([output.detach(), torch.cat(gradients[:-3]), *gradients[-3:]])
    for found, wanted in zip(*results, strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


@torch.no_grad()
def test_sst_after_a_step():
    """Values at or above zero, vectors of length 1, V and U are what A and B have become; others
    stay to the bit."""
    linear = sst_map(12, 20)
    before = {name: parameter.clone() for name, parameter in linear.named_parameters()}
    linear.A.add_(0.1)
    linear.B.mul_(-3)
    linear.s[7] = -0.5
    assert linear.run_event("normalise", torch.Generator()) == ()
    assert linear.s[7] == 0
    at = linear.index.long()
    assert torch.equal(linear.V[:, at], linear.A)
    assert torch.equal(linear.U[at], linear.B)
    assert torch.allclose(linear.A.norm(dim=0), torch.ones(4, dtype=torch.float64))
    assert torch.allclose(linear.B, -before["B"], rtol=0, atol=1e-6)  # fp32's length at the start
    rest = torch.ones(12, dtype=torch.bool)
    rest[at] = False
    assert torch.equal(linear.V[:, rest], before["V"][:, rest])
    assert torch.equal(linear.U[rest], before["U"][rest])


@torch.no_grad()
def test_sst_samples_and_rounds_leave_the_function():
    """fp64 1e-12. A sample is of the same vectors; a round, every third sample of 4 of 12, makes
    them orthonormal again. The optimizer begins anew on what is another tensor then."""
    linear = sst_map(12, 20)
    linear.A.add_(0.1)
    linear.run_event("normalise", torch.Generator())
    weight = linear._weight()
    x = random(torch.Generator().manual_seed(1), 5, 12)
    output, _ = linear(x, None)
    for number in (1, 2, 3):
        vectors = linear.V.clone()
        forgets = linear.run_event(f"sample {number}", torch.Generator().manual_seed(number))
        is_round = number == 3
        names = ("A", "B", "s") if is_round else ("A", "B")
        assert forgets == tuple(Forget(name, restarts=True) for name in names)
        assert torch.equal(linear.V, vectors) != is_round
        assert torch.equal(linear.A, linear.V[:, linear.index.long()])
        assert torch.allclose(linear._weight(), weight, rtol=0, atol=1e-12)
        assert torch.allclose(linear(x, None)[0], output, rtol=0, atol=1e-12)
    eye = torch.eye(12, dtype=torch.float64)
    assert torch.allclose(linear.V.T @ linear.V, eye, rtol=0, atol=1e-12)
    assert torch.allclose(linear.U @ linear.U.T, eye, rtol=0, atol=1e-12)


def test_sst_draws_half_uniformly_and_half_by_value():
    """Of 4000 draws of one vector; six deviations. A matrix of zeros can be drawn from."""
    values, count = torch.tensor([6.0, 3.0, 1.0, 0.0]), 4000
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw(values, 1, generator) for _ in range(count)])
    for idx, share in enumerate((0.425, 0.275, 0.175, 0.125)):
        deviation = (share * (1 - share) / count) ** 0.5
        assert abs(float((drawn == idx).double().mean()) - share) < 6 * deviation
    assert sorted(draw(torch.zeros(4), 4, generator).tolist()) == [0, 1, 2, 3]


def test_sst_state_of_the_optimizer():
    """Two moments of r (in + out) + min(in, out) items a map."""
    _, optimizer = trained("sst", SSTOptions(), 1)
    spec = example_of("sst", SSTOptions()).spec
    sizes = [(slot.in_size, slot.out_size) for block in spec.slots for slot in block]
    outside = sum(t.num_items for name, t in spec.tensors.items() if "_proj" not in name)
    held = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert held - outside == sum(4 * (one + other) + min(one, other) for one, other in sizes)


# --- SwitchLoRA -----------------------------------------------------------------------------------

RARE = SwitchLoRAOptions(switch_every=1e9)
"""No exchange but those that a test makes."""


def test_switchlora_begins_as_a_dense_matrix():
    """The sum is a Gaussian of the model's deviation; factors and pools have the published ones,
    within 5 %."""
    example = example_of("switchlora", SwitchLoRAOptions())
    model = small.small_model(linear="switchlora", rank="32", hidden_size=64, intermediate_size=96)
    linear: Any = maps_of(dataclasses.replace(example, model=model).build())[6]  # down: 96 to 64
    assert float(linear.dense_weight().std()) == pytest.approx(0.02, rel=0.05)
    std_a = (64**0.5 * 32 / 96**1.5) ** 0.25 / 3**0.25
    std_b = (32 / (96 * 64) ** 0.5) ** 0.25 / 3**0.25
    for name, std in (("A", std_a), ("B", std_b), ("pool_A", std_a), ("pool_B", std_b)):
        drawn = linear.get_parameter(name).detach()
        assert float(drawn.std()) == pytest.approx(std, rel=0.05), name
        assert float(drawn.abs().max()) <= 3**0.5 * std
    assert (linear.pool_A.shape, linear.pool_B.shape) == ((96, 64), (64, 64))


@torch.no_grad()
def test_switchlora_exchanges_leave_the_function():
    """fp64 1e-12, square maps too. Vectors and pool together are what they were; as many have
    changed as are said, and their counterparts are held; the same seed exchanges the same."""
    config = example_of("switchlora", SwitchLoRAOptions(switch_every=2.0)).spec
    one, other = (build(config, 0, dtype=torch.float64) for _ in range(2))
    logits, before = logits_of(one), {k: v.clone() for k, v in one.state_dict().items()}
    forgets = one.run_events(1, seed=7)
    assert forgets == other.run_events(1, seed=7)
    assert float((logits_of(one) - logits).abs().max()) <= 1e-12
    named = dict(one.named_parameters())
    changed = 0
    for name, parameter in named.items():
        assert torch.equal(parameter, other.get_parameter(name))
        owner, _, factor = name.rpartition(".")
        if not owner.endswith("_proj") or factor not in ("A", "B"):
            continue
        pool, counterpart = f"{owner}.pool_{factor}", "B" if factor == "A" else "A"
        turned = (lambda t: t.T) if factor == "A" else (lambda t: t)
        rows = [turned(each) for each in (named[name], before[name], named[pool], before[pool])]
        is_new = (rows[0] != rows[1]).any(1)
        found = forgets.get(f"{owner}.{counterpart}")
        at = sorted(found.indices or ()) if found else []
        assert is_new.nonzero().flatten().tolist() == at
        assert named[f"{owner}.held_{counterpart}"].nonzero().flatten().tolist() == at
        together = [sorted(torch.cat([rows[idx], rows[idx + 2]]).tolist()) for idx in (0, 1)]
        assert together[0] == together[1]
        changed += len(at)
    # 21 maps, two factors of 4 vectors, 0.3^(1/4000) of half of which are exchanged.
    assert changed == pytest.approx(21 * 2 * 2, abs=6 * (42 / 4) ** 0.5)


@torch.no_grad()
def test_switchlora_number_of_exchanges():
    """Over 400 steps that halve it more than once: the sum of the means, six deviations of what is
    rounded at random."""
    options = SwitchLoRAOptions(switch_every=10.0, decay_steps=200.0)
    linear = maps_of(build(example_of("switchlora", options).spec, 0))[0]
    generator, counts = torch.Generator().manual_seed(0), dict.fromkeys("AB", 0)
    for number in range(1, 401):
        for each in linear.run_event(f"switch {number}", generator):
            counts[each.tensor] += len(each.indices)
    mean = sum(4 / 10 * 0.3 ** (number / 200) for number in range(1, 401))
    assert mean == pytest.approx(60, abs=1)
    for count in counts.values():
        assert abs(count - mean) < 6 * (400 / 4) ** 0.5


@pytest.mark.parametrize("factor", ["A", "B"])
def test_switchlora_holds_a_counterpart_for_five_steps(factor: str):
    """Bit: it stays for five steps, under weight decay, its moments zero; the sixth moves it. Its
    neighbours move all the time."""
    example = example_of("switchlora", RARE)
    model = example.build()
    optimizer = example.build_optimizer(model)
    small.train(example, model, optimizer, 2)
    linear = maps_of(model)[4]
    held = "B" if factor == "A" else "A"
    dim = 0 if held == "B" else 1
    with torch.no_grad():
        at = linear._exchange(factor, 2.0, torch.Generator().manual_seed(1))
    assert len(at) == 2
    parameter = linear.get_parameter(held)
    forget(optimizer, parameter, Forget(held, at, dim), torch.Generator())
    others = [idx for idx in range(4) if idx not in at]
    before = parameter.detach().clone()
    for number in range(6):
        latest = parameter.detach().clone()
        small.train(example, model, optimizer, 1, start=2 + number)
        is_still = (parameter == before).all(1 - dim)
        assert is_still[list(at)].tolist() == [number < 5] * 2
        moved = (parameter != latest).any(1 - dim)
        assert bool(moved[others].all())
        moments = optimizer.state[parameter]["exp_avg"].index_select(dim, torch.tensor(at))
        assert bool(moments.any()) == (number == 5)


def test_rows_or_columns_are_forgotten():
    """Bit, both moments; the others stay."""
    for dim, indices in ((0, (1, 3)), (1, (0,))):
        parameter = torch.nn.Parameter(torch.ones(5, 4))
        optimizer = adamw(parameter)
        stepped(optimizer)
        before = optimizer.state[parameter]["exp_avg"].clone()
        forget(optimizer, parameter, Forget("weight", indices, dim), torch.Generator())
        lost = torch.zeros(5, 4, dtype=torch.bool)
        lost.index_fill_(dim, torch.tensor(indices), True)
        state = optimizer.state[parameter]
        assert torch.equal(state["exp_avg"], before.masked_fill(lost, 0))
        assert torch.equal(state["exp_avg_sq"] == 0, lost)


# --- a run that begins with full-rank weights -----------------------------------------------------


@pytest.fixture(scope="module")
def dense_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("dense") / "run"
    return run(tiny(corpus, model={"linear": "full"}), folder)


SLOW = ((), pytest.mark.slow)
TAKE_DENSE = [name for name in linears.names() if linears.get(name).takes_dense]


@pytest.mark.parametrize(
    "linear", [pytest.param(name, marks=SLOW[name != "lora"]) for name in TAKE_DENSE]
)
def test_a_run_begins_with_full_rank_weights(
    linear: str, dense_run: Result, corpus: Path, tmp_path: Path
):
    """Before its first step it has the loss that full rank ended with, to 1e-6; its optimizer is
    new; it trains on and is found again."""
    train = {"init_from": dense_run.run_dir, "steps": 4, "seed": 5}
    config = tiny(corpus, model={"linear": linear, "rank": "4"}, train=train)
    result = run(config, tmp_path / "run")
    assert dense_run.after is not None
    assert result.before is not None
    assert result.before.loss == pytest.approx(dense_run.after.loss, rel=1e-6)
    assert result.after is not None
    assert result.after.loss < result.before.loss
    began = json.loads((tmp_path / "run" / "run.json").read_text())["init_from"]
    assert began["checkpoint"] == str(dense_run.checkpoint)
    ours, given = weights_of(tmp_path / "run"), weights_of(dense_run.run_dir)
    assert given.keys() - ours.keys() <= {name for name in given if name.endswith("_proj.weight")}


@pytest.mark.slow
def test_a_bias_begins_as_it_was_trained(corpus: Path, tmp_path: Path):
    """GPT-2's positions have one: it is the checkpoint's, no initial value."""
    model = {"linear": "full", "architecture": "gpt2", "num_kv_heads": None}
    dense = run(tiny(corpus, model=model), tmp_path / "dense")
    train = {"init_from": dense.run_dir, "steps": 1}
    changes = {"linear": "lora", "rank": "4"}
    result = run(tiny(corpus, model=model | changes, train=train), tmp_path / "run")
    assert result.before == dense.after


def test_what_cannot_begin_with_full_rank_weights(dense_run: Result, corpus: Path, tmp_path: Path):
    """A map that is not any matrix; another size; the other way round. Every problem at once."""
    train = {"init_from": dense_run.run_dir}
    model = {"linear": "lowrank", "rank": "4"}
    with pytest.raises(ConfigError) as caught:
        run(tiny(corpus, train=train, model=model), tmp_path / "run")
    said = "; ".join(caught.value.problems)
    assert "--model.linear is 'lowrank'" in said
    assert "these --model.linear: " + ", ".join(TAKE_DENSE) in said
    with pytest.raises(ConfigError, match=r"--model\.norm-eps is 0\.5"):
        run(
            tiny(corpus, train=train, model={"linear": "relora", "norm_eps": 0.5}),
            tmp_path / "run",
        )
    beside = tiny(corpus, train=train | {"adapter": "lora"}, model={"linear": "lora"})
    with pytest.raises(ConfigError, match=r"--model\.linear is 'lora', and"):
        start.check_same_model(checkpoint.resolve(dense_run.run_dir), beside)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_finetune_takes_another_parameterization(
    dense_run: Result, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """``crnet finetune RUN --model.linear relora``: the words of the documentation."""
    words = ["finetune", str(dense_run.run_dir), "--data.source", str(corpus)]
    words += ["--data.documents", "paragraph"]
    words += ["--model.linear", "relora", "--model.rank", "4", "--out", str(tmp_path / "run")]
    words += ["--train.epochs", "none", "--train.steps", "2", "--json"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code
    figures = json.loads(capsys.readouterr().out)
    assert figures["val_loss"] < dense_run.before.loss  # type: ignore[union-attr]
