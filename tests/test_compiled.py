"""What torch's compiler is given: every block of a pass that trains, and the bodies of norm, SwiGLU
and rotation where a device wants them compiled.

Graphs are counted by a backend of our own, which runs them as they are: no compiler is needed for
that. Equality: bit, where the graphs run as they are; else what a test says.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet.config.sections import TrainConfig
from crnet.errors import ConfigError
from crnet.kernels import compiled, elementwise
from crnet.layers.compiled_blocks import kind_of
from crnet.model.language_model import LanguageModel
from crnet.train.run import choose_kernels
from recompute_steps import NONE, PLANS, Plan, assert_same, random_model, step
from shapes import make, one_of_every_method, random_tokens, tiny
from test_kernels import CASES, FP32, FP64, error, incoming, reference

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's compiler

needs_cxx = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch compiles C++ on a CPU: no g++"
)


class Counter:
    """A backend of ``torch.compile``: graphs made, and how often each is run."""

    def __init__(self) -> None:
        self.runs: list[int] = []

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.runs.append(0)
        number = len(self.runs) - 1

        def run(*tensors: Tensor) -> Any:
            self.runs[number] += 1
            return graph(*tensors)

        return run


@pytest.fixture(autouse=True)
def no_graph_outlives_a_test() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# --- blocks -------------------------------------------------------------------------------------

LIKE_130M = tiny(num_layers=12, rank="4x3,6x8", num_kv_heads=None)
"""As the published 130M: a dense block, two ranks above it; the last hands nothing on."""


def counted(model: LanguageModel, plan: Plan) -> Counter:
    """Compile a model's blocks with a counter."""
    counter = Counter()
    model.compile_blocks(backend=counter)
    model.recompute(plan)
    return counter


def train_once(model: LanguageModel, tokens: Tensor) -> None:
    loss, _ = model(tokens, tokens)
    loss.backward()


def test_blocks_of_one_kind_are_one_graph():
    """Evaluations of two batch sizes come first, and compile nothing."""
    model, tokens = make(tiny(num_layers=5, linear="full")), random_tokens(4, 8)
    counter = counted(model, NONE)
    for steps in (1, 2):
        with torch.no_grad():
            model(tokens, tokens)
            model(tokens[:3], tokens[:3])
        train_once(model, tokens)
        assert counter.runs == [steps * 5]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "runs_a_block"), [("none", 1), ("block", 2)])
def test_every_block_is_compiled_after_an_evaluation(
    policy: Any, runs_a_block: int, caplog: pytest.LogCaptureFixture
):
    """Evaluations of two batch sizes come first: they compile nothing, and no graph is lost."""
    model, tokens = make(LIKE_130M), random_tokens(4, 8)
    counter = counted(model, Plan(policy))
    with caplog.at_level(logging.WARNING, "torch._dynamo"):
        for steps in (1, 2):
            with torch.no_grad():
                model(tokens, tokens)
                model(tokens[:3], tokens[:3])
            train_once(model, tokens)
            assert sum(counter.runs) == steps * runs_a_block * 12
    # Dense; 3 of rank 4; 7 of rank 6; the last, which hands nothing on.
    assert sorted(counter.runs) == sorted(2 * runs_a_block * each for each in (1, 3, 7, 1))
    assert caplog.messages == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "crnet-llama-residual",
        "full-llama-residual",
        "lax-llama-residual",
        "shared-llama-residual",
        "crnet-llama-attnres",
    ],
)
def test_methods_share_graphs(name: str):
    """Of maps with a carry, without one, with a bottleneck handed on, and of a stream with weights
    (tracing takes 20 s each): no block has a graph of its own. There are at most a first, one
    between and a last. A stream that hands all earlier outputs on has a state of its own at every
    block."""
    config = one_of_every_method(num_layers=4)[name]
    model = make(config)
    counter = counted(model, NONE)
    train_once(model, random_tokens(2, 8))
    assert sum(counter.runs) == 4
    assert len(counter.runs) <= (3 if config.stream == "residual" else 4)


def test_generation_is_not_compiled():
    model, tokens = make(LIKE_130M), random_tokens(1, 8)
    counter = counted(model, NONE)
    with torch.no_grad():
        caches = model.new_caches(16)
        model.logits(tokens, caches)
        model.logits(tokens[:, :1], caches)
    assert counter.runs == []


@pytest.mark.slow
def test_more_shapes_than_torch_recompiles():
    """Nine shapes of one block: torch's limit of eight is that of a code object."""
    model = make(tiny(num_layers=1))
    counter = counted(model, NONE)
    for length in range(3, 12):
        train_once(model, random_tokens(1, length))
    assert counter.runs == [1] * 9


@pytest.mark.slow
def test_traced_blocks_compute_the_same():
    """To some units of rounding: torch traces ``addcmul`` as two operations."""
    model = random_model(tiny(num_layers=3))
    expected = step(model, NONE)
    counter = counted(model, NONE)
    loss, gradients = step(model, NONE)
    assert counter.runs == [1, 1, 1]
    assert loss.item() == pytest.approx(expected[0].item(), rel=100 * 2**-24)
    assert_same((expected[0], gradients), expected, units=300)


# --- without a compiler -------------------------------------------------------------------------


def test_compile_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    choose_kernels(TrainConfig(device="cpu"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"--train.compile: .*or leave --train.compile out"):
        choose_kernels(TrainConfig(compile=True, device="cpu"))
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(ConfigError, match="CXX names /nowhere/g"):
        choose_kernels(TrainConfig(compile=True, device="cpu"))
    choose_kernels(TrainConfig(device="cpu"))  # not asked for, not missed


# --- bodies -------------------------------------------------------------------------------------

BODIES = {name: CASES[name] for name in ("rms_norm", "swiglu", "rotate")}
each_body = pytest.mark.parametrize("name", list(BODIES))


@each_body
def test_bodies_stay_plain_on_a_cpu(name: str):
    """The golden losses hang on it."""
    case, made = BODIES[name], Counter()
    with compiled.compiled_everywhere(made):
        pass
    case.of(case.inputs()).sum().backward()
    assert made.runs == []
    assert compiled.fused(elementwise._rotate, torch.zeros(1)) is elementwise._rotate


@each_body
def test_forward_and_backward_are_compiled_once_a_shape(name: str):
    case, made = BODIES[name], Counter()
    expected = case.of(case.inputs())
    with compiled.compiled_everywhere(made):
        for _ in range(2):
            inputs = case.inputs()
            y = case.of(inputs)
            y.backward(incoming(y))
            with torch.no_grad():
                case.of(inputs)  # neither evaluation nor generation
        assert made.runs == [2, 2]
    assert error(y, expected) < FP64  # torch writes addcmul as two operations


def test_more_shapes_of_a_body_than_torch_recompiles():
    with compiled.compiled_everywhere(made := Counter()):
        for length in range(2, 12):
            x = torch.randn(length, 4, requires_grad=True)
            elementwise.swiglu(x, x).sum().backward()
    assert made.runs == [1] * 20


def test_fake_tensors_are_not_compiled():
    """What counts FLOPs or bytes on shapes alone must not start a compiler."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with compiled.compiled_everywhere(made := Counter()), FakeTensorMode():
        x = torch.randn(3, 4, requires_grad=True)
        elementwise.swiglu(x, x).sum().backward()
    assert made.runs == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_attention", [False, True])
def test_replay_changes_no_bit_with_compiled_bodies(dtype: torch.dtype, keep_attention: bool):
    """Every policy that rebuilds exactly: the same graphs in both runs."""
    model = random_model(tiny(num_layers=4), "bf16" if dtype == torch.bfloat16 else "fp32")
    with compiled.compiled_everywhere(made := Counter()):
        loss, expected = step(model, NONE)
        graphs = len(made.runs)
        assert graphs > 0
        for plan in (Plan("block"), Plan("replay", (2,), keep_attention)):
            again, actual = step(model, plan)
            assert torch.equal(loss, again)
            for name, gradient in expected.items():
                assert torch.equal(gradient, actual[name]), (plan.policy, name)
        assert len(made.runs) == graphs  # none is made for a second run


@pytest.mark.slow
@needs_cxx
@each_body
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_bodies_equal_naive(name: str, dtype: torch.dtype):
    """torch's own compiler on a CPU, values and gradients: fp32 as the plain bodies; bf16 within
    four roundings (it rounds less often than they do)."""
    case = BODIES[name]
    inputs = case.inputs(dtype)
    expected_y, expected_grads = reference(case, inputs)
    with compiled.compiled_everywhere():
        y = case.of(inputs)
        y.backward(incoming(y))
    bound = FP32 if dtype == torch.float32 else 2**-6
    assert y.dtype == dtype
    assert error(y, expected_y) < bound
    for tensor, wanted in zip(inputs, expected_grads, strict=True):
        assert tensor.grad is not None
        assert error(tensor.grad, wanted) < bound


@pytest.mark.slow
@needs_cxx
def test_every_policy_with_bodies_compiled_by_torch():
    """replay and block to the bit, invert as without. Against fp64 the gradients of this model (far
    from its start, badly conditioned) are at most ten times as far off as the plain bodies', whose
    exponential is more exact than that of torch's compiler (one body: ``FP32``, above)."""
    config = dataclasses.replace(tiny(num_layers=4), num_kv_heads=None)
    exact, model = step(random_model(config, "fp64"), NONE), random_model(config)
    plain = step(model, NONE)
    with compiled.compiled_everywhere():
        expected = step(model, NONE)
        for name in ("block", "replay", "replay-one-segment"):
            assert_same(step(model, PLANS[name]), expected)
        assert_same(step(model, PLANS["invert"]), expected, units=2000)
    assert worst_error(expected, exact) < 10 * worst_error(plain, exact) < 1e-3


def worst_error(actual: Any, exact: Any) -> float:
    """Of the gradient of any matrix or norm."""
    names = [name for name in exact[1] if not name.endswith(".beta")]
    return max(error(actual[1][name], exact[1][name]) for name in names)


def test_eager_refuses_fused_kernels():
    cuda = torch.device("cuda")
    try:
        compiled.choose("eager")
        assert not compiled.fused_on(cuda)
        compiled.choose("auto")
        assert compiled.fused_on(cuda) == (compiled.compiler_problem(cuda) is None)
        assert not compiled.fused_on(torch.device("cpu"))
    finally:
        compiled.choose("auto")


def test_kinds_of_blocks():
    """Equal maps are one kind; a carry, a rank or a frozen parameter makes another."""
    first, second, third, *_, last = make(tiny(num_layers=6, rank="4x3,6x2")).model.blocks()
    assert kind_of(second) == kind_of(third)
    assert len({kind_of(each) for each in (first, second, last)}) == 3
    next(third.parameters()).requires_grad_(False)
    assert kind_of(second) != kind_of(third)
