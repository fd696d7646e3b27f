"""Parameterizations made of factors, each against the plain formula of its source.

What every parameterization is held to (formula, autocast, both halves, bytes and FLOPs) stands in
``test_linears_methods``, which runs ``CASES`` too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet import linears
from crnet.config import presets
from crnet.config.model_spec import model_spec
from crnet.linears._maps import LinearMap, duplicated
from crnet.linears.blast import BLASTOptions
from crnet.linears.blast import module as blast
from crnet.linears.dlr import DLROptions
from crnet.linears.fosl import FOSLOptions
from crnet.linears.loro import LOROOptions
from crnet.linears.lost import LOSTOptions
from crnet.model.seeds import generator_of
from crnet.specs import Slot
from test_linears_methods import CASES, assert_near, gradients, inputs, make, spec_of

WIDE = Slot("up", 0, 1, 48, 80, 8, 0.02)


def initial(linear: str, options: Any, slot: Slot = WIDE, seed: int = 0) -> dict[str, Tensor]:
    """The tensors that are no random numbers, or that the method fills itself."""
    method = linears.get(linear)
    words = functools.partial(generator_of, seed, "map")
    found = {}
    for name, spec in method.tensors(slot, options).items():
        if spec.init.kind == "own":
            found[name] = method.initial_value(name, slot, options, words)
        elif spec.init.kind == "constant":
            found[name] = torch.full(spec.shape, spec.init.value)
    return found


def expanded(z: Tensor, out_size: int) -> Tensor:
    """Each item repeated ceil(F / R) times, cut off at F."""
    return z.repeat_interleave(math.ceil(out_size / z.shape[-1]), dim=-1)[..., :out_size]


@pytest.mark.parametrize(("rank", "out_size"), [(4, 20), (4, 5), (3, 8), (5, 5), (6, 4), (1, 7)])
def test_duplicated(rank: int, out_size: int):
    """fp64 1e-12: ``z B + alpha / sqrt(K) Expand_K(z)``; the gradient is that of B alone."""
    generator = torch.Generator().manual_seed(0)
    z, b = (torch.randn(*s, generator=generator).double() for s in ((9, rank), (rank, out_size)))
    b.requires_grad_()
    scale = 0.7 / math.sqrt(math.ceil(out_size / rank))
    expected = z @ b + scale * expanded(z, out_size)
    actual = z @ duplicated(b, 0.7)
    assert float((actual - expected).detach().abs().max()) < 1e-12
    cotangent = torch.randn(9, out_size, generator=generator).double()
    (gradient,) = torch.autograd.grad(actual, b, cotangent)
    assert float((gradient - z.T @ cotangent).abs().max()) < 1e-12


def test_duplicated_by_nothing_is_the_factor():
    b = torch.randn(3, 8)
    before = b.clone()
    assert duplicated(b, 0.0) is b
    duplicated(b, 2.0)
    assert torch.equal(b, before)
    across = b.T  # of another memory layout
    assert torch.equal(duplicated(across, 2.0), duplicated(across.contiguous(), 2.0))


# --- DLR ------------------------------------------------------------------------------------------


def test_dlr_folds_into_cola():
    """fp64 1e-12: CoLA's map with ``B* = B + alpha / sqrt(K) E`` is the same function."""
    case = CASES["dlr"]
    linear = make(case, torch.float64)
    cola = make(dataclasses.replace(CASES["cola"], layer_idx=case.layer_idx), torch.float64)
    with torch.no_grad():
        cola.get_parameter("A").copy_(linear.get_parameter("A"))
        cola.get_parameter("B").copy_(duplicated(linear.get_parameter("B"), case.options.alpha))
    x, _ = inputs(case, torch.float64)
    assert float((linear(x, None)[0] - cola(x, None)[0]).detach().abs().max()) <= 1e-12


@pytest.mark.parametrize(("activation", "other"), [("silu", "cola"), ("none", "lowrank")])
def test_dlr_without_its_residual(activation, other: str):
    """Bit: alpha 0 is CoLA, or plain low rank."""
    options = DLROptions(alpha=0.0, activation=activation)
    case = dataclasses.replace(CASES["dlr"], options=options)
    linear, method = make(case, torch.float64), linears.get(other)
    plain = method.make(case.slot, method.Options and method.Options()).double()
    plain.load_state_dict(linear.state_dict())
    x, _ = inputs(case, torch.float64)
    assert torch.equal(linear(x, None)[0], plain(x, None)[0])


def assert_takes_an_update(name: str, tolerance: float):
    """The map with an adapter's update in it is one of its own kind, of a larger rank."""
    case = CASES[name]
    linear = make(case, torch.float32)
    update = torch.randn(12, 3), torch.randn(3, 20)
    found = linear.with_update(*update)
    assert found is not None
    wider = case.method.make(dataclasses.replace(case.slot, rank=7), case.options)
    wider.load_state_dict(found)
    x, _ = inputs(case, torch.float32)
    expected = linear(x, None)[0] + x @ update[0] @ update[1]
    torch.testing.assert_close(wider(x, None)[0], expected, rtol=tolerance, atol=tolerance)


def test_dlr_with_an_update():
    """fp32 1e-5: without an activation an adapter's update makes it a DLR of a larger rank, whose
    constant is another."""
    assert_takes_an_update("dlr-none", 1e-5)
    update = torch.randn(12, 3), torch.randn(3, 20)
    assert make(CASES["dlr"], torch.float32).with_update(*update) is None


def test_dlr_is_refused():
    assert linears.get("dlr").problems(DLROptions(alpha=-1.0, lr_factor=0.0), []) == [
        "--model.dlr.lr-factor is 0.0; it must be above zero",
        "--model.dlr.alpha is -1.0; take 0 or more",
    ]


# --- LORO -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "factor"), [("llama-60m", 1 / 4), ("llama-130m", 1 / 3), ("llama-1b", 1 / 4)]
)
def test_loro_rates_and_values(preset: str, factor: float):
    """r / h for every factor, also of the feed-forward; Xavier's deviation of each."""
    config = dataclasses.replace(
        presets.get(preset).model, linear="loro", rank="aligned-parameters", vocab_size=32_000
    )
    spec = model_spec(config)
    for slot in spec.slots[-1]:
        tensors = spec.linear.tensors(slot, spec.linear_options)
        for tensor in tensors.values():
            assert tensor.lr_factor == pytest.approx(factor)
            assert tensor.init.value == pytest.approx(math.sqrt(2 / sum(tensor.shape)))
    given = spec.linear.tensors(WIDE, LOROOptions(lr_factor=0.7))
    assert {tensor.lr_factor for tensor in given.values()} == {0.7}
    assert linears.get("loro").problems(LOROOptions(lr_factor=0.0), [])


# --- LOST -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("released", [False, True])
def test_lost_begins_in_one_matrix(released: bool):
    """fp32 1e-6: A B is the best approximation of a W, and C has W's own columns, those that are
    largest in the rest of W; the released code looks at 256 triples of it."""
    options = LOSTOptions(delta=0.1, released=released)
    slot = dataclasses.replace(WIDE, in_size=420, out_size=400)
    found = initial("lost", options, slot)
    draw = generator_of(0, "map", "dense")
    weight_FD = torch.empty(420, 400).normal_(0, 0.02, generator=draw).T
    u, values, v = torch.linalg.svd(weight_FD, full_matrices=False)
    best = (u[:, :8] * values[:8]) @ v[:8]
    assert float(((found["A"] @ found["B"]).T - best).abs().max()) < 1e-6
    assert torch.allclose(found["A"].T @ found["A"], found["B"] @ found["B"].T, atol=1e-6)
    last = 8 + 256 if released else 400
    rest = (u[:, 8:last] * values[8:last]) @ v[8:last]
    index = found["index"]
    assert index.dtype == torch.int32
    assert index.tolist() == sorted(rest.norm(dim=0).argsort()[-42:].tolist())
    assert torch.equal(found["columns"], weight_FD[:, index.long()])
    other = initial("lost", options, slot, seed=1)
    assert not torch.equal(other["index"], index)


def test_lost_channels_differ_between_both():
    """Else the test above would say nothing of which triples are looked at."""
    slot = dataclasses.replace(WIDE, in_size=420, out_size=400)
    one, other = (
        initial("lost", LOSTOptions(delta=0.1, released=released), slot)["index"]
        for released in (False, True)
    )
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("delta", "count"), [(0.29, 29), (0.01, 1), (0.001, 1), (1.0, 100)])
def test_lost_count(delta: float, count: int):
    slot = dataclasses.replace(WIDE, in_size=100)
    tensors = linears.get("lost").tensors(slot, LOSTOptions(delta=delta))
    assert tensors["columns"].shape == (80, count)
    assert tensors["index"].shape == (count,)


# --- FOSL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fold_frac", "width"), [(0.9, 8), (0.3, 56), (0.5, 40), (0.01, 80)])
def test_fosl_copies(fold_frac: float, width: int):
    """Every computed output is used as often as any other, to one; each run of copies is a
    permutation; c is the inverse root of the count."""
    found = initial("fosl", FOSLOptions(fold_frac=fold_frac))
    index, scale = found["index"], found["scale"]
    assert index.shape == (80,)
    assert index[:width].tolist() == list(range(width))
    for part in index.split(width):
        assert len(part.unique()) == len(part)
    counts = index.bincount(minlength=width)
    assert int(counts.max() - counts.min()) <= 1
    torch.testing.assert_close(scale, counts.float() ** -0.5)
    other = initial("fosl", FOSLOptions(fold_frac=fold_frac), seed=1)["index"]
    assert torch.equal(index, other) == (fold_frac == 0.01)  # no copy there


def test_fosl_keeps_the_variance():
    """A sum over the outputs has the variance of a dense map's of the same entries, 5 %: what the
    scales are for."""
    slot = dataclasses.replace(WIDE, in_size=64, out_size=2000)
    options = FOSLOptions()
    found = initial("fosl", options, slot)
    linear: Any = linears.get("fosl").make(slot, options)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(linear.base.shape, generator=generator)
    with torch.no_grad():
        linear.A.zero_()
        linear.B.zero_()
        linear.base.copy_(base)
        linear.index.copy_(found["index"])
        linear.scale.copy_(found["scale"])
        output = linear(torch.randn(4000, 64, generator=generator)[None], None)[0][0]
    squares = output.square().sum() / 0.3**2 / len(output)
    assert float(squares) == pytest.approx(len(base) * 64, rel=0.05)


# --- BLAST ----------------------------------------------------------------------------------------


def test_blast_of_one_block_is_low_rank():
    """fp64 1e-12: with s = 1, the output and every gradient that both have."""
    case = dataclasses.replace(CASES["blast"], options=BLASTOptions(blocks=1, coupling="ones"))
    linear = make(case, torch.float64)
    plain = linears.get("lowrank").make(case.slot, linears.get("lowrank").Options()).double()  # type: ignore[misc]
    with torch.no_grad():
        linear.get_parameter("s").fill_(1.0)
        plain.load_state_dict({name: linear.get_parameter(name) for name in "AB"})
    outputs = []
    for each in (linear, plain):
        x, _ = inputs(case, torch.float64)
        output, _ = each(x, None)
        output.square().sum().backward()
        grads = [each.get_parameter(name).grad for name in "AB"]
        outputs.append([output.detach(), x.grad, *grads])
    for one, other in zip(*outputs, strict=True):
        assert float((one - other).abs().max()) <= 1e-12 * float(other.abs().max())


def test_blast_takes_rows_in_turns(monkeypatch: pytest.MonkeyPatch):
    """fp64 1e-12: 30 rows at once, or 7 by 7: output and every gradient."""
    case, found = CASES["blast"], []
    for at_once in (1024, 7):
        monkeypatch.setattr(blast, "ROWS_AT_ONCE", at_once)
        linear = make(case, torch.float64)
        found.append(gradients(case, linear, linear, torch.float64))
    assert_near(found[1], found[0], 1e-12)


def test_blast_reaches_more_than_its_rank():
    options = BLASTOptions(blocks=4)
    linear = make(dataclasses.replace(CASES["blast"], options=options), torch.float64)
    assert torch.linalg.matrix_rank(linear.dense_weight().double(), rtol=1e-5) == 12  # of 4 x 4


@pytest.mark.parametrize("coupling", ["uniform", "ones"])
def test_blast_init(coupling: Any):
    """The matrix begins with the deviation of a dense one, 3 %."""
    slot = dataclasses.replace(WIDE, in_size=600, out_size=800, rank=64)
    options = BLASTOptions(coupling=coupling)
    linear = linears.get("blast").make(slot, options)
    fill(linear, "blast", options, slot)
    assert float(linear.dense_weight().std()) == pytest.approx(0.02, rel=0.03)


def fill(linear: LinearMap, name: str, options: Any, slot: Slot) -> None:
    """As a model's maps are filled: Gaussians as declared, the method's own values."""
    generator = torch.Generator().manual_seed(5)
    own = initial(name, options, slot)
    with torch.no_grad():
        for key, spec in linears.get(name).tensors(slot, options).items():
            parameter = linear.get_parameter(key)
            if spec.init.kind == "normal":
                parameter.normal_(0, spec.init.value, generator=generator)
            elif spec.init.kind == "constant":
                parameter.fill_(spec.init.value)
            else:
                parameter.copy_(own[key])


# --- what is refused; updates ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("linear", "options", "fragments"),
    [
        ("lost", LOSTOptions(gamma=1.0, delta=0.0), ["gamma is 1.0", "delta is 0.0"]),
        ("lost", LOSTOptions(lr_factor=0.0), ["lr-factor is 0.0"]),
        ("fosl", FOSLOptions(alpha=0.0, fold_frac=1.0), ["alpha is 0.0", "fold-frac is 1.0"]),
        ("fosl", FOSLOptions(lora_alpha=-1.0), ["lora-alpha is -1.0"]),
        ("blast", BLASTOptions(blocks=0), ["blocks is 0; take 1 to 16"]),
        ("blast", BLASTOptions(blocks=17), ["blocks is 17; take 1 to 16, the smallest width"]),
        ("blast", BLASTOptions(coupling_lr_factor=0.0), ["coupling-lr-factor is 0.0"]),
    ],
)
def test_problems(linear: str, options: Any, fragments: list[str]):
    slots = [slot for block in spec_of(linear=linear).slots for slot in block]
    problems = linears.get(linear).problems(options, slots)
    assert len(problems) == len(fragments)
    for problem, fragment in zip(problems, fragments, strict=True):
        assert fragment in problem


@pytest.mark.parametrize("name", ["lost-released", "blast"])
def test_an_update_makes_the_rank_larger(name: str):
    """fp32 1e-4."""
    assert_takes_an_update(name, 1e-4)
