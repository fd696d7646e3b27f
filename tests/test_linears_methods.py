"""The rival parameterizations, each against a plain formula written from its paper.

Equality is to the bit where a test says so; other tolerances are named where they are used. Maps
are made and filled by themselves; models are small and never at their first step, where factors
that are zero would hide gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from crnet import linears
from crnet.config import presets
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import ModelConfig
from crnet.cost.flops import block_flops
from crnet.cost.kept import kept_bytes
from crnet.cost.micro_batch import MicroBatch
from crnet.linears import _activated as activated
from crnet.linears._maps import LinearMap
from crnet.linears.blast import BLASTOptions
from crnet.linears.cola import CoLAOptions
from crnet.linears.dlr import DLROptions
from crnet.linears.fosl import FOSLOptions
from crnet.linears.lax import LaXOptions
from crnet.linears.lora import LoRAOptions, ReLoRAOptions, SwitchLoRAOptions
from crnet.linears.loro import LOROOptions
from crnet.linears.lost import LOSTOptions
from crnet.linears.rso import RSOOptions
from crnet.linears.self_guided import SelfGuidedOptions
from crnet.linears.sltrain import SLTrainOptions
from crnet.linears.sst import SSTOptions
from crnet.linears.value_resformer import ValueResFormerOptions
from crnet.measure import memory
from crnet.model.build import build, initial_values
from crnet.model.language_model import LanguageModel
from crnet.model.seeds import generator_of
from crnet.paper import formulas
from crnet.paper.sizes import Sizes
from crnet.recompute.plan import RecomputePlan, parse_layers
from crnet.specs import Forget, Slot, Work

EXACT = 1e-10
"""Of fp64, relative to the largest item of a tensor."""
ROUNDED = 2.0**-5
"""Of bf16, the same: eight units of rounding; a result is a few rounded sums of rounded items."""

# --- one map --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A map of a method, and its formula: (map, x, carry) -> (output, what it hands on)."""

    linear: str
    options: Any
    layer_idx: int
    formula: Callable[[Any, Tensor, Tensor | None], tuple[Tensor, Tensor]]

    @property
    def slot(self) -> Slot:
        rank = 0 if self.method.fixed_rank(self.layer_idx, self.options) == 0 else 4
        return Slot("v", self.layer_idx, 3, 12, 20, rank, 0.02)

    @property
    def method(self) -> linears.Parameterization:
        return linears.get(self.linear)

    @property
    def work(self) -> Callable[[int], Work]:
        return lambda item_bytes: self.method.work(self.slot, self.options, ROWS, item_bytes)


BATCH, LENGTH = 2, 15
ROWS = BATCH * LENGTH


def naive_cola(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """``B silu(A x)``."""
    z = x @ m.A
    y = (z * torch.sigmoid(z)) @ m.B
    return y, y


def naive_dlr(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """``z B + alpha / sqrt(K) Expand_K(z)``, z = silu(A x), alpha 1.5, K = 20 / 4."""
    z = torch.nn.functional.silu(x @ m.A) if m.is_active else x @ m.A
    y = z @ m.B + 1.5 / math.sqrt(5) * z.repeat_interleave(5, dim=-1)
    return y, y


def naive_loro(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """``B A x``."""
    y = x @ m.A @ m.B
    return y, y


def naive_lost(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """``gamma sigma(A x) B + (1 - gamma) C x_I``, gamma 0.6."""
    z = x @ m.A
    h = z * torch.sigmoid(z) if m.is_active else z
    y = 0.6 * (h @ m.B) + 0.4 * (x[..., m.index.long()] @ m.columns.T)
    return y, y


def naive_fosl(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """``alpha s silu(A x) B + beta [u c ; (u c)[M]]``, u the dense outputs; alpha 0.4, s 6 / 4."""
    u = (x @ m.base.T) * m.scale
    copies = torch.cat([u, u[..., m.index[u.shape[-1] :].long()]], -1)
    y = 0.4 * 6 / 4 * (torch.nn.functional.silu(x @ m.A) @ m.B) + 0.6 * copies
    return y, y


def naive_blast(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """The matrix, block by block: ``U_i diag(s_ij) V_j^T``."""
    num = m.s.shape[1]
    vs, us = m.A.tensor_split(num, 0), m.B.T.tensor_split(num, 0)
    blocks = [[us[i] @ torch.diag(m.s[:, i, j]) @ vs[j].T for j in range(num)] for i in range(num)]
    y = x @ torch.cat([torch.cat(row, 1) for row in blocks]).T
    return y, y


def naive_lora(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """``W0 x + (alpha / r) B A x``, alpha 6, r 4."""
    y = x @ m.weight.T + 6 / 4 * (x @ m.A @ m.B)
    return y, y


def naive_guided(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """``rho W x + (1 - rho) B A x``, rho (1 + cos(pi / 3)) / 2 = 0.75 after 3 of 9 steps."""
    y = 0.75 * (x @ m.weight.T) + 0.25 * (x @ m.A @ m.B)
    return y, y


def naive_rso(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x W^T + (x P) B``."""
    y = x @ m.weight.T + x @ m.P @ m.B
    return y, y


def naive_sltrain(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """``((alpha / r) B A + S) x``, S zero but at the support; alpha 6, r 4."""
    sparse = torch.zeros(20 * 12, dtype=x.dtype).index_put((m.index.long(),), m.values)
    weight = 6 / 4 * (m.A @ m.B).T + sparse.view(20, 12)
    y = x @ weight.T
    return y, y


def naive_sst(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x V diag(s) U``; of a sampled vector the gradient without its factor s."""
    v, u, at = m.V.detach(), m.U.detach(), m.index.long()
    zero_a, zero_b = m.A - m.A.detach(), m.B - m.B.detach()
    weight = v @ m.s.diag() @ u + zero_a @ u[at] + v[:, at] @ zero_b
    y = x @ weight
    return y, y


def naive_dense(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    y = x @ m.weight.T
    return y, y


def naive_value(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """``lambda1 V_1 + lambda2 V_l``."""
    y = m.lambda1 * carry + m.lambda2 * (x @ m.weight.T)
    return y, y


def naive_lax(m: Any, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """``z_l = A x + g z_(l-1)``, ``B z_l``."""
    z = x @ m.A
    if carry is not None and m.shift is not None:
        centred = carry - carry.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        z = z + m.gate * centred / deviation + m.shift
    elif carry is not None:
        z = z + (carry if m.gate is None else m.gate * carry)
    return z @ m.B, z


LORA = LoRAOptions(alpha=6.0)
RELORA = ReLoRAOptions(alpha=6.0, merge_every=20, reset_every=30, kept_frac=0.25)
GUIDED = SelfGuidedOptions(guided_steps=9, done_steps=3)
SPARSE = SLTrainOptions(delta=0.3, alpha=6.0)
SCALAR = LaXOptions(gate="scalar")
CASES = {
    "cola": Case("cola", CoLAOptions(), 1, naive_cola),
    "dlr": Case("dlr", DLROptions(alpha=1.5), 1, naive_dlr),
    "dlr-none": Case("dlr", DLROptions(alpha=1.5, activation="none"), 1, naive_dlr),
    "loro": Case("loro", LOROOptions(), 1, naive_loro),
    "lost": Case("lost", LOSTOptions(gamma=0.6, delta=0.3), 1, naive_lost),
    "lost-released": Case("lost", LOSTOptions(gamma=0.6, released=True), 1, naive_lost),
    "fosl": Case("fosl", FOSLOptions(alpha=0.4, lora_alpha=6.0), 1, naive_fosl),
    "fosl-few": Case("fosl", FOSLOptions(alpha=0.4, lora_alpha=6.0, fold_frac=0.3), 0, naive_fosl),
    "blast": Case("blast", BLASTOptions(), 1, naive_blast),
    "blast-uneven": Case("blast", BLASTOptions(blocks=7), 0, naive_blast),
    "lora": Case("lora", LORA, 1, naive_lora),
    "relora": Case("relora", RELORA, 0, naive_lora),
    "self-guided": Case("self-guided", GUIDED, 1, naive_guided),
    "self-guided-gone": Case("self-guided", SelfGuidedOptions(guided_steps=0), 1, naive_loro),
    "rso": Case("rso", RSOOptions(), 1, naive_rso),
    "sltrain": Case("sltrain", SPARSE, 1, naive_sltrain),
    "sst": Case("sst", SSTOptions(), 1, naive_sst),
    "switchlora": Case("switchlora", SwitchLoRAOptions(alpha=6.0), 1, naive_lora),
    "value-resformer-first": Case("value-resformer", ValueResFormerOptions(), 0, naive_dense),
    "value-resformer": Case("value-resformer", ValueResFormerOptions(), 2, naive_value),
    "lax-first": Case("lax", SCALAR, 0, naive_lax),
    "lax-identity": Case("lax", LaXOptions(), 1, naive_lax),
    "lax-scalar": Case("lax", SCALAR, 2, naive_lax),
    "lax-norm": Case("lax", LaXOptions(gate="norm"), 2, naive_lax),
}
UNDECAYED = {(linear, factor) for linear in ("sst", "switchlora") for factor in "AB"}
"""Tensors that have one length, or are not to move."""
each_case = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
"""Of fp32 weights: computed in fp32, or under autocast to bf16."""


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make(case: Case, dtype: torch.dtype) -> LinearMap:
    """The case's map in that dtype, every trained or frozen weight random."""
    linear = case.method.make(case.slot, case.options)
    generator = torch.Generator().manual_seed(0)
    for name, spec in case.method.tensors(case.slot, case.options).items():
        parameter = linear.get_parameter(name)
        if spec.init.kind == "own" and name != "weight":  # which would cancel an update, rounded
            words = functools.partial(generator_of, 0, "map")
            own = case.method.initial_value(name, case.slot, case.options, words)
            parameter.data.copy_(own)
        elif spec.dtype == "int32":
            parameter.data.zero_()  # a count, as it begins
        else:
            parameter.data.copy_(random(generator, *spec.shape) / 2)
    return linear.to(dtype)


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x and the carry, in the dtype that products compute in."""
    generator = torch.Generator().manual_seed(1)
    read = case.method.reads(case.slot, case.options)
    sizes = [case.slot.in_size, *([read.width] if read else [])]
    found = [random(generator, BATCH, LENGTH, size).to(dtype).requires_grad_() for size in sizes]
    return found[0], found[1] if read else None


def gradients(
    case: Case, linear: LinearMap, run: Callable[..., Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Results of ``run(x, carry)`` and the gradient of everything that has one, both results with
    a gradient of their own."""
    linear.zero_grad()
    x, carry = inputs(case, dtype)
    results = dict(zip(("output", "handed"), run(x, carry), strict=True))
    generator = torch.Generator().manual_seed(2)
    for name, result in results.items():
        cotangent = random(generator, *result.shape).to(dtype).to(result.dtype)
        result.backward(cotangent, retain_graph=name == "output")
    leaves = dict(linear.named_parameters()) | {"x": x}
    if carry is not None:
        leaves["carry"] = carry
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    found = {name: result.detach() for name, result in results.items()}
    for name, grad in grads.items():
        assert grad is not None, name
        assert grad.any(), name
        found[name] = grad
    return found


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest item of each tensor."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (actual[name].double() - tensor).abs().max() / tensor.abs().max()
        assert error <= tolerance, (name, float(error))


@each_case
def test_formula(case: Case):
    """Output, hand-on and every gradient, fp64."""
    linear = make(case, torch.float64)
    naive = functools.partial(case.formula, linear)
    expected = gradients(case, linear, naive, torch.float64)
    assert_near(gradients(case, linear, linear, torch.float64), expected, EXACT)


@each_case
def test_formula_under_autocast(case: Case):
    """The same formula in fp64, on the same fp32 weights and bf16 inputs."""
    linear = make(case, torch.float32)

    def run(x: Tensor, carry: Tensor | None) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return linear(x, carry)

    actual = gradients(case, linear, run, torch.bfloat16)
    assert actual["output"].dtype == actual["handed"].dtype == torch.bfloat16
    wide = make(case, torch.float32).double()

    def naive(x: Tensor, carry: Tensor | None) -> Any:
        return case.formula(wide, x.double(), None if carry is None else carry.double())

    expected = gradients(case, wide, naive, torch.bfloat16)
    expected = {name: tensor.double() for name, tensor in expected.items()}
    assert_near(actual, expected, ROUNDED)


@each_case
@each_dtype
def test_comes_apart(case: Case, dtype: torch.dtype):
    """Bit: both halves are the forward; the node made from them has the gradients of the other."""
    linear = make(case, torch.float32)
    assert linear.comes_apart

    def known(x: Tensor, carry: Tensor | None) -> Any:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                bottleneck = linear.down_project(x, carry)
                output = linear.up_project(bottleneck, carry)
            return linear.run(x, carry, (bottleneck, output))

    def whole(x: Tensor, carry: Tensor | None) -> Any:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return linear(x, carry)

    expected = gradients(case, linear, whole, dtype)
    actual = gradients(case, linear, known, dtype)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@each_case
@each_dtype
def test_work(case: Case, dtype: torch.dtype):
    """Exact: FLOPs as torch counts them, bytes as autograd keeps them."""
    linear, work = make(case, torch.float32), case.work(dtype.itemsize)
    x, carry = inputs(case, dtype)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, handed, flops = counted(linear, x, carry)
    assert flops == work.forward_flops
    known = [x, output, *linear.parameters(), *([carry] if carry is not None else [])]
    apart = {tensor.untyped_storage().data_ptr() for tensor in known}
    sizes = [t.untyped_storage().nbytes() for at, t in kept.items() if at not in apart]
    casts = work.weight_items * dtype.itemsize if dtype != torch.float32 else 0
    assert sum(sizes) == work.kept_bytes + casts
    assert (x.untyped_storage().data_ptr() in kept) == work.keeps_input
    read = case.method.reads(case.slot, case.options)
    if carry is not None and read is not None:
        assert (carry.untyped_storage().data_ptr() in kept) == read.is_kept
        assert read.of == linear.hands
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward([output, handed], [torch.ones_like(t) for t in (output, handed)])
    assert counter.get_total_flops() == work.backward_flops


def counted(run: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    with FlopCounterMode(display=False) as counter:
        results = run(*args)
    results = results if isinstance(results, tuple) else (results,)
    return (*results, counter.get_total_flops())


@each_case
@each_dtype
def test_work_of_a_recomputation(case: Case, dtype: torch.dtype):
    """Exact: width of the bottleneck, FLOPs of the output from it, of the node, of torch's
    checkpoint."""
    linear, work = make(case, torch.float32), case.work(dtype.itemsize)
    x, carry = inputs(case, dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            bottleneck, _ = counted(linear.down_project, x, carry)
            output, flops = counted(linear.up_project, bottleneck, carry)
        assert flops == work.rebuild_flops
        assert bottleneck.nbytes == (work.bottleneck_bytes or output.nbytes)
        assert counted(linear.run, x, carry, (bottleneck, output))[-1] == work.rerun_flops
        with FlopCounterMode(display=False) as counter:
            output, _ = checkpoint(linear, x, carry, use_reentrant=False)
            output.sum().backward()
    twice = 2 * work.forward_flops - work.unrepeated_flops
    assert counter.get_total_flops() == twice + work.backward_flops


@each_case
def test_tensors(case: Case):
    """Names, shapes, dtypes and who is trained; a partner has this one as its partner."""
    linear, tensors = make(case, torch.float32), case.method.tensors(case.slot, case.options)
    assert list(tensors) == [name for name, _ in linear.named_parameters()]
    for name, spec in tensors.items():
        parameter = linear.get_parameter(name)
        assert (tuple(parameter.shape), parameter.requires_grad) == (spec.shape, spec.trained)
        assert (parameter.dtype == torch.int32) == (spec.dtype == "int32")
        assert spec.decays == (spec.role != "gain" and (case.linear, name) not in UNDECAYED)
        assert spec.partner is None or tensors[spec.partner].partner == name


@each_case
def test_dense_weight(case: Case):
    """The map without a carry, 1e-6; one with an activation is no matrix."""
    linear = make(case, torch.float32)
    if getattr(linear, "is_active", False):
        with pytest.raises(NotImplementedError, match="not linear"):
            linear.dense_weight()
        return
    x, carry = inputs(case, torch.float32)
    is_none = carry is None or linear.hands == "bottleneck"
    expected, _ = case.formula(linear, x, None if is_none else torch.zeros_like(carry))
    actual = x @ linear.dense_weight().T
    assert_near({"y": actual.detach()}, {"y": expected.detach()}, 1e-6)


# --- models ---------------------------------------------------------------------------------------

SMALL = ModelConfig(
    rank="8",
    hidden_size=32,
    intermediate_size=48,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=61,
)
MODELS: dict[str, dict[str, Any]] = {name: {"linear": name} for name in linears.names()} | {
    "cola-bottleneck": {"linear": "cola", "cola": CoLAOptions(activation="bottleneck")},
    "lax-scalar": {"linear": "lax", "lax": SCALAR},
}
each_model = pytest.mark.parametrize("changes", list(MODELS.values()), ids=list(MODELS))


def spec_of(**changes: Any) -> ModelSpec:
    return model_spec(dataclasses.replace(SMALL, **changes))  # type: ignore[arg-type]


def random_model(dtype: torch.dtype = torch.float32, **changes: Any) -> LanguageModel:
    """A model whose every trained weight is off its initial value."""
    model = build(spec_of(**changes), 0, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.trained().values():
            parameter += 0.05 * random(generator, *parameter.shape).to(dtype)
    return model


def tokens() -> tuple[Tensor, Tensor]:
    drawn = torch.randint(0, 61, (2, 10), generator=torch.Generator().manual_seed(4))
    return drawn[:, :-1], drawn[:, 1:]


def step(model: LanguageModel, plan: RecomputePlan, autocast: bool) -> dict[str, Tensor]:
    """The loss, and the gradient of every trained parameter, by name."""
    model.zero_grad()
    model.recompute(plan)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = model(*tokens())
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {name: grad for name, grad in grads.items() if grad is not None}
    assert found.keys() == model.trained().keys()
    for name, grad in found.items():
        assert bool(grad.isfinite().all() and grad.any()), name
    return {"loss": loss.detach()} | found


NONE = RecomputePlan()
EVERY = RecomputePlan("replay", (1, 2, 3, 4, 5, 6))
PLANS = [
    RecomputePlan("block"),
    RecomputePlan("replay", (2, 4)),
    RecomputePlan("replay", (2, 4), keep_attention=True),
    EVERY,
]


@pytest.mark.slow
@each_model
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-mixed"])
def test_recomputation(changes: dict[str, Any], autocast: bool):
    """Bit: loss and gradients of a pass that keeps everything."""
    model = random_model(**changes)
    expected = step(model, NONE, autocast)
    for plan in PLANS:
        actual = step(model, plan, autocast)
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), (plan, name)


# --- CoLA -----------------------------------------------------------------------------------------


def test_cola_without_its_activation_is_low_rank(monkeypatch: pytest.MonkeyPatch):
    """Bit."""
    case = CASES["cola"]
    linear = make(case, torch.float64)
    x, _ = inputs(case, torch.float64)
    monkeypatch.setattr(activated, "silu", lambda z: z)
    plain = linears.get("lowrank").make(case.slot, linears.get("lowrank").Options())  # type: ignore[misc]
    plain.load_state_dict(linear.state_dict())
    assert torch.equal(linear(x, None)[0], plain.double()(x, None)[0])


@pytest.mark.parametrize("linear", ["cola", "dlr"])
def test_cola_init(linear: str):
    """Standard deviation of an item of A B: (D + F)^(-1/2), within 2 %."""
    model = build(spec_of(linear=linear, hidden_size=256, intermediate_size=512, rank="64"), 0)
    for position in ("q", "down"):
        made: Any = model.model.blocks()[0].maps[position]
        product = made.A.detach() @ made.B.detach()
        wanted = sum(product.shape) ** -0.5
        assert float(product.std()) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(
    ("activation", "hidden_size", "kept"),
    [
        ("auto", 768, True),
        ("auto", 1024, False),
        ("both", 1024, True),
        ("bottleneck", 768, False),
    ],
)
def test_cola_activation(activation: Any, hidden_size: int, kept: bool):
    options = CoLAOptions(activation=activation)
    assert spec_of(linear="cola", cola=options, hidden_size=hidden_size).keeps_activation == kept


def cola_m(dtype: torch.dtype, num_layers: int) -> tuple[LanguageModel, RecomputePlan, MicroBatch]:
    """CoLA under ``--train.recompute replay --train.recompute-layers every-1``."""
    model = random_model(dtype, linear="cola", num_layers=num_layers, num_kv_heads=None)
    plan = RecomputePlan("replay", parse_layers("every-1", num_layers))
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    sequences, length = tokens()[0].shape
    return model, plan, MicroBatch(model.spec, sequences, length, precision)


@each_dtype
def test_cola_replay_keeps_less_than_cola_m(dtype: torch.dtype):
    """Exact, a token and layer: seven bottlenecks and the state that enters the block, where CoLA-M
    keeps two; counted, and by the cost model."""
    rank, hidden_size = 8, SMALL.hidden_size
    found = []
    for depth in (5, 6):
        model, plan, micro_batch = cola_m(dtype, depth)
        model.recompute(plan)
        counted = memory.saved_bytes(model, *(each.contiguous() for each in tokens()))
        assert counted == sum(kept_bytes(micro_batch, plan).values())
        found.append(counted)
    item_rows = dtype.itemsize * tokens()[0].numel()
    assert found[1] - found[0] == item_rows * (7 * rank + hidden_size)
    sizes = Sizes(1, hidden_size, SMALL.intermediate_size, SMALL.num_heads)
    theirs = dtype.itemsize * formulas.kept_items_of_cola_m(sizes, rank, tokens()[0].numel())
    assert theirs == item_rows * (7 * rank + 2 * hidden_size) > found[1] - found[0]


def test_cola_replay_repeats_what_cola_m_does():
    """Exact: FLOPs as torch counts them and as the cost model has them are eq. 40's."""
    model, plan, micro_batch = cola_m(torch.float32, 6)
    repeated = []
    for each in (NONE, plan):
        model.recompute(each)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*tokens())[0].backward()
        repeated.append(counter.get_total_flops())
    sequences, length = tokens()[0].shape
    sizes = Sizes(6, SMALL.hidden_size, SMALL.intermediate_size, SMALL.num_heads)
    eq_40 = sequences * formulas.recompute_flops_of_cola_m(sizes, 8, length)
    assert eq_40 == repeated[1] - repeated[0] == block_flops(micro_batch, plan)["recompute"]
    at_8_3 = dataclasses.replace(sizes, hidden_size=30, intermediate_size=80)
    eq_41 = formulas.recompute_flops(at_8_3, 8, 6, tokens=length)
    assert formulas.recompute_flops_of_cola_m(at_8_3, 8, length) == pytest.approx(eq_41)


def test_cola_m_has_the_gradients_of_cola():
    """fp64, 1e-10: the block as published, only its bottlenecks kept, against one in one piece."""
    model, plan, _ = cola_m(torch.float64, 3)
    expected = step(model, NONE, autocast=False)
    assert_near(step(model, plan, autocast=False), expected, EXACT)


# --- LoRA and ReLoRA ------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", ["lora", "relora"])
def test_lora_starts_as_its_frozen_matrix(linear: str):
    """A within its bound and not zero, B zero, W0 frozen; the first gradient reaches B."""
    model = build(spec_of(linear=linear), 0)
    loss, _ = model(*tokens())
    loss.backward()
    maps: Any = [each for block in model.model.blocks() for each in block.maps.values()]
    for each in maps:
        bound = each.A.shape[0] ** -0.5
        assert 0.9 * bound < float(each.A.detach().abs().max()) <= bound
        assert not each.B.any()
        assert each.weight.grad is None
        assert each.B.grad.any()
        assert float(each.weight.std()) == pytest.approx(0.02, rel=0.2)


@torch.no_grad()
def test_relora_merge():
    """The function stays as it was, fp64 1e-12; B is zero after it, A drawn anew; nothing else
    moves, and the optimizer forgets nothing. The same seed and step draw the same A."""
    one, other = (random_model(torch.float64, linear="relora", relora=RELORA) for _ in range(2))
    before = {name: parameter.detach().clone() for name, parameter in one.named_parameters()}
    logits = one.logits(tokens()[0])
    assert one.run_events(20, seed=7) == other.run_events(20, seed=7) == {}
    assert float((one.logits(tokens()[0]) - logits).abs().max()) <= 1e-12
    twin = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, twin[name])
        touched = ".self_attn." in name or ".mlp." in name
        assert torch.equal(parameter, before[name]) != touched
        if name.endswith(".B"):
            assert not parameter.any()
        if name.endswith(".A"):
            assert 0 < float(parameter.detach().abs().max()) <= parameter.shape[0] ** -0.5


@torch.no_grad()
def test_relora_merges_small_updates():
    """bf16 weights: the sum is rounded once, to the nearest."""
    model = random_model(torch.bfloat16, linear="relora", relora=RELORA)
    linear: Any = model.model.blocks()[1].maps["up"]
    update = RELORA.alpha / 8 * (linear.A.double() @ linear.B.double()).T
    expected = (linear.weight.double() + update).to(torch.bfloat16)
    model.run_events(20, seed=7)
    # Where fp32 and fp64 fall on two sides of a rounding boundary, one unit.
    assert (linear.weight == expected).float().mean() > 0.99


def test_relora_reset():
    """The optimizer forgets A and B of every map and nothing else; no weight moves."""
    model = random_model(linear="relora", relora=RELORA)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    forgets = model.run_events(30, seed=7)
    factors = {name for name in before if name.endswith((".A", ".B"))}
    assert forgets == {name: Forget(name[-1], kept_frac=0.25) for name in factors}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("step_idx", "due"),
    [(0, ()), (1, ()), (20, ("merge",)), (21, ()), (30, ("reset",)), (60, ("merge", "reset"))],
)
def test_relora_clocks(step_idx: int, due: tuple[str, ...]):
    assert linears.get("relora").events(step_idx, RELORA) == due


# --- SLTrain --------------------------------------------------------------------------------------


def test_sltrain_support():
    """Unique, ascending, inside the matrix; the same for one seed and name, and for these alone."""

    def supports(seed: int) -> dict[str, Tensor]:
        parameters = build(spec_of(linear="sltrain"), seed).named_parameters()
        return {name: p.detach() for name, p in parameters if name.endswith(".index")}

    one, twin, other = supports(0), supports(0), supports(1)
    shapes = {"gate_proj": 48 * 32, "up_proj": 48 * 32}
    for name, index in one.items():
        assert index.dtype == torch.int32
        assert bool((index.diff() > 0).all())
        assert int(index[0]) >= 0
        assert torch.equal(index, twin[name])
        assert not torch.equal(index, other[name])
        items = shapes.get(name.split(".")[-2])
        assert items is None or (int(index[-1]) < items and len(index) == items * 3 // 100)
    blocks = [one[f"model.layers.{idx}.mlp.up_proj.index"] for idx in range(2)]
    assert not torch.equal(*blocks)


@pytest.mark.parametrize("linear", ["sltrain", "cola"])
def test_maps_have_values_of_their_own(linear: str):
    """No two tensors begin with the same random numbers: each has a seed of its own name."""
    spec = model_spec(dataclasses.replace(SMALL, linear=linear))
    firsts = [
        (name, value.flatten()[:6] / value.flatten()[0])
        for name, value in initial_values(spec, 0)
        if spec.tensors[name].init.kind != "constant"
    ]
    for (one, left), (other, right) in itertools.combinations(firsts, 2):
        assert not torch.allclose(left.double(), right.double()), (one, other)


def test_sltrain_support_reaches_both_ends():
    case = CASES["sltrain"]
    ends = set()
    for seed in range(40):
        words = functools.partial(generator_of, seed, "map")
        index = case.method.initial_value("index", case.slot, case.options, words)
        ends |= {int(index[0]), int(index[-1])}
    assert {0, 12 * 20 - 1} <= ends


@pytest.mark.parametrize(
    ("delta", "sizes", "count"),
    [(0.29, (10, 10), 29), (0.03, (512, 1376), 21135), (1.0, (3, 4), 12)],
)
def test_sltrain_count(delta: float, sizes: tuple[int, int], count: int):
    slot = Slot("q", 0, 1, *sizes, 2, 0.02)
    tensors = linears.get("sltrain").tensors(slot, SLTrainOptions(delta=delta))
    assert tensors["values"].shape == tensors["index"].shape == (count,)


# --- value ResFormer and LaX ----------------------------------------------------------------------


def test_value_resformer_of_zero_and_one_is_full_rank():
    """Bit: loss, and the gradient of every weight that both models have."""
    models = [random_model(linear=linear) for linear in ("value-resformer", "full")]
    shared = dict(models[1].named_parameters())
    with torch.no_grad():
        for name, parameter in models[0].named_parameters():
            if name in shared:
                shared[name].copy_(parameter)
            else:
                parameter.fill_(float(name.endswith("lambda2")))
    mixed, plain = (step(model, NONE, autocast=False) for model in models)
    for name, tensor in plain.items():
        assert torch.equal(mixed[name], tensor), name
    assert len(mixed) - len(plain) == 2 * (SMALL.num_layers - 1)


def test_lax_chain():
    """Three maps, each reading the bottleneck below: the last output, every gradient, fp64."""
    results = []
    for naive in (False, True):
        maps = [make(CASES["lax-first"], torch.float64)]
        maps += [make(CASES["lax-identity"], torch.float64) for _ in range(2)]
        x, _ = inputs(CASES["lax-first"], torch.float64)
        carry: Tensor | None = None
        outputs = []
        for linear in maps:
            y, carry = naive_lax(linear, x, carry) if naive else linear(x, carry)
            outputs.append(y)
        sum(y.square().sum() for y in outputs).backward()  # type: ignore[union-attr]
        grads = {
            f"{idx} {name}": p.grad
            for idx, linear in enumerate(maps)
            for name, p in linear.named_parameters()
        }
        results.append({"y": outputs[-1].detach(), "x": x.grad} | grads)
    assert_near(results[0], results[1], EXACT)


def test_lax_with_a_gate_of_one_is_the_identity():
    """fp32, 1e-6 of the loss."""
    models = [random_model(linear="lax", lax=options) for options in (SCALAR, LaXOptions())]
    plain = dict(models[1].named_parameters())
    with torch.no_grad():
        for name, parameter in models[0].named_parameters():
            if name in plain:
                plain[name].copy_(parameter)
            else:
                parameter.fill_(1.0)
    losses = [float(model(*tokens())[0].detach()) for model in models]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# --- what is refused; sizes of published models ---------------------------------------------------

LARGE = Slot("down", 0, 1, 2**16, 2**15, 8, 0.02)
"""2^31 items: one more than int32 can name."""


def slots_of(**changes: Any) -> list[Slot]:
    return [slot for block in spec_of(**changes).slots for slot in block]


@pytest.mark.parametrize(
    ("linear", "options", "slots", "fragments"),
    [
        ("cola", CoLAOptions(lr_factor=0.0), [], ["--model.cola.lr-factor is 0.0"]),
        ("lora", LoRAOptions(alpha=0.0), [], ["--model.lora.alpha is 0.0"]),
        (
            "relora",
            ReLoRAOptions(alpha=-1.0, merge_every=0, reset_every=0, kept_frac=1.0),
            [],
            ["relora.alpha is", "relora.merge-every is 0", "reset-every is 0", "kept-frac 1.0: it"],
        ),
        (
            "relora",
            ReLoRAOptions(reset="zero", kept_frac=0.5),
            [],
            ["kept-frac 0.5 has no effect with --model.relora.reset zero"],
        ),
        ("rso", RSOOptions(restart_every=0), [], ["--model.rso.restart-every is 0"]),
        ("sst", SSTOptions(resample_every=0), [], ["--model.sst.resample-every is 0"]),
        (
            "switchlora",
            SwitchLoRAOptions(alpha=0.0, switch_every=0.0, decay_steps=-1.0, held_steps=0),
            [],
            ["switchlora.alpha is", "switch-every is 0.0", "decay-steps is -1.0", "held-steps is"],
        ),
        ("sltrain", SLTrainOptions(alpha=0.0, delta=0.0), [], ["alpha is", "delta is 0.0"]),
        ("sltrain", SLTrainOptions(), [LARGE], ["down (65536 x 32768) has more items"]),
        ("sltrain", SLTrainOptions(), [Slot("q", 0, 1, 4, 8, 2, 0.02)], ["leaves no item of"]),
        ("value-resformer", ValueResFormerOptions(), slots_of(linear="full"), []),
        (
            "value-resformer",
            ValueResFormerOptions(),
            [LARGE],
            ["a position v, and this architecture has none"],
        ),
        ("lax", LaXOptions(), slots_of(linear="lax"), []),
        (
            "lax",
            LaXOptions(lr_factor=-1.0),
            slots_of(linear="lax", rank="8/k=4x2,8x4"),
            ["lax.lr-factor is -1.0", "but k has 4 in block 2 and 8 in block 3;"],
        ),
    ],
)
def test_problems(linear: str, options: Any, slots: list[Slot], fragments: list[str]):
    problems = linears.get(linear).problems(options, slots)
    assert len(problems) == len(fragments)
    for problem, fragment in zip(problems, fragments, strict=True):
        assert fragment in problem


@pytest.mark.parametrize(
    ("preset", "rank", "delta"),
    [
        ("llama-60m", 128, 0.03),
        ("llama-130m", 256, 0.03),
        ("llama-350m", 256, 0.03),
        ("llama-1b", 512, 0.03),
        ("llama-7b", 1024, 0.05),
    ],
)
def test_published_sizes(preset: str, rank: int, delta: float):
    """Exact: the formulas of the published totals."""
    config = dataclasses.replace(presets.get(preset).model, vocab_size=32_000)
    h, f, blocks = config.hidden_size, config.intermediate_size, config.num_layers

    def total(linear: str, **changes: Any) -> tuple[int, int]:
        spec = model_spec(dataclasses.replace(config, linear=linear, **changes))
        trained = sum(tensor.num_items for tensor in spec.tensors.values() if tensor.trained)
        return trained, sum(tensor.num_items for tensor in spec.tensors.values()) - trained

    outside = 2 * 32_000 * h + 2 * blocks * h + h
    factors = blocks * rank * (8 * h + 3 * (h + f))
    dense = blocks * (4 * h * h + 3 * h * f)
    sparse = blocks * (4 * math.floor(delta * h * h) + 3 * math.floor(delta * h * f))
    assert total("cola") == total("lax") == (outside + factors, 0)
    assert total("lora") == total("relora") == (outside + factors, dense)
    pools, held = blocks * h * (8 * h + 3 * (h + f)), 14 * blocks * rank
    assert total("switchlora") == (outside + factors, dense + pools + held)
    of_b, of_p = (blocks * rank * (4 * h + each) for each in (2 * f + h, 2 * h + f))
    assert total("rso") == (outside + of_b, dense + of_p)
    values = total("sltrain", sltrain=SLTrainOptions(delta=delta))
    assert values == (outside + factors + sparse, sparse)
    assert total("value-resformer") == (outside + dense + 2 * (blocks - 1), 0)
