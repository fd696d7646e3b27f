"""Every fast path of ``crnet.kernels`` against ``crnet.kernels.naive``, gradients included.

Equality: errors are relative to the largest item of the reference, which is the naive formula in
fp64. Each tolerance is named once, here:
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from crnet.kernels import carried, elementwise, loss, loss_chunks, naive

FP64 = 1e-14
"""The same sums of up to 40 items in another order: 40 x 2^-53 = 4e-15, twice for two products."""

FP32 = 5e-6
"""The same in fp32: 40 x 2^-24 = 2.4e-6, twice for two products."""

BF16 = 1e-2
"""bf16 rounds at 2^-9 = 2e-3; up to five roundings lie between an input and a gradient."""

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One operation: its two forms and their inputs; all but ``constants`` get gradients."""

    fast: Callable[..., Tensor]
    naive: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    constants: tuple[Any, ...] = ()
    casts: bool = False
    """The output is in autocast's dtype, not in the input's."""
    sums: bool = False
    """The output is a 0-d sum, fp32 or better."""

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
        """Leaves that want gradients: in fp32 and bf16 the same numbers, rounded."""
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for shape in self.shapes
        ]

    def of(self, inputs: list[Tensor], *, by: str = "fast") -> Tensor:
        extra = [
            c.to(inputs[0].dtype) if isinstance(c, Tensor) and c.is_floating_point() else c
            for c in self.constants
        ]
        return getattr(self, by)(*inputs, *extra)


TARGETS = torch.tensor([3, 0, 10, -100, 7, 7, -100, 1, 2, 9, 10])
ANGLES = torch.outer(torch.arange(5.0, dtype=torch.float64), 10 ** -torch.arange(0.0, 2.0, 0.5))
TABLES = (ANGLES.cos()[:, None], ANGLES.sin()[:, None])  # (T, 1, H/2)


def naive_rotate(x: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    return naive.rotate(x, cos_T1H[:, 0], sin_T1H[:, 0])


def chunked(chunk_rows: int | None) -> Callable[..., Tensor]:
    return lambda x, weight, target: loss.linear_cross_entropy(x, weight, target, chunk_rows)


LOSS_SHAPES = ((11, 6), (13, 6))
CASES = {
    "carried": Case(
        carried.carried_lowrank,
        naive.carried_lowrank,
        ((2, 5, 6), (6, 3), (3, 7), (2, 5, 7), (1,)),
        casts=True,
    ),
    "rms_norm": Case(
        elementwise.rms_norm, naive.rms_norm, ((2, 5, 6), (6,)), constants=(EPS,), casts=True
    ),
    "swiglu": Case(elementwise.swiglu, naive.swiglu, ((2, 5, 6), (2, 5, 6))),
    "rotate": Case(elementwise.rotate, naive_rotate, ((2, 5, 3, 8),), constants=TABLES),
    "loss": Case(
        loss.linear_cross_entropy,
        naive.linear_cross_entropy,
        LOSS_SHAPES,
        constants=(TARGETS,),
        sums=True,
    ),
} | {
    f"loss-chunks-of-{rows}": Case(
        chunked(rows),
        naive.linear_cross_entropy,
        LOSS_SHAPES,
        constants=(TARGETS,),
        sums=True,
    )
    for rows in (3, None)  # 11 rows: 3 does not divide them
}
each_case = pytest.mark.parametrize("case", [pytest.param(c, id=name) for name, c in CASES.items()])
CHUNKED = {
    rows: dataclasses.replace(CASES["loss"], fast=chunked(rows)) for rows in (1, 4, 10, 11, 64)
}


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected item; NaN if there is one."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


def incoming(y: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)


def reference(case: Case, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The naive output and gradients, in fp64, of inputs of any dtype."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y = case.of(leaves, by="naive")
    return y.detach(), list(torch.autograd.grad(y, leaves, incoming(y)))


# --- values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("case", (CASES | CHUNKED).values(), ids=[*CASES, *map(str, CHUNKED)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FP64), (torch.float32, FP32)])
def test_equals_naive(case: Case, dtype: torch.dtype, tolerance: float):
    inputs = case.inputs(dtype)
    expected_y, expected_grads = reference(case, inputs)
    y = case.of(inputs)
    assert y.dtype == dtype
    assert error(y, expected_y) < tolerance
    y.backward(incoming(y))
    for tensor, expected in zip(inputs, expected_grads, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype
        assert error(tensor.grad, expected) < tolerance


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.sums])
def test_gradcheck(name: str):
    """Not of the loss, whose backward runs once: its gradients are compared with naive's alone."""
    case = CASES[name]
    inputs = case.inputs()
    assert torch.autograd.gradcheck(lambda *tensors: case.of(list(tensors)), inputs)


@each_case
def test_bf16(case: Case):
    inputs = case.inputs(torch.bfloat16)
    expected_y, expected_grads = reference(case, inputs)
    y = case.of(inputs)
    assert y.dtype == (torch.float32 if case.sums else torch.bfloat16)
    assert error(y, expected_y) < BF16
    y.backward(incoming(y))
    for tensor, expected in zip(inputs, expected_grads, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.bfloat16
        assert error(tensor.grad, expected) < BF16


@each_case
def test_autocast(case: Case):
    inputs = case.inputs(torch.float32)
    expected_y, expected_grads = reference(case, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.of(inputs)
    assert y.dtype == (torch.bfloat16 if case.casts else torch.float32)
    assert error(y, expected_y) < BF16
    y.backward(incoming(y))
    for tensor, expected in zip(inputs, expected_grads, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32  # the parameters' own
        assert error(tensor.grad, expected) < BF16


@each_case
def test_inputs_and_incoming_gradient_are_not_written(case: Case):
    inputs = case.inputs()
    y = case.of(inputs)
    dy = incoming(y)
    y.backward(dy)
    for tensor, fresh in zip(inputs, case.inputs(), strict=True):
        assert torch.equal(tensor, fresh)
    assert torch.equal(dy, incoming(y))


@each_case
def test_second_derivative_is_refused(case: Case):
    inputs = case.inputs()
    y = case.of(inputs)
    (grad,) = torch.autograd.grad((y * y).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- strides ------------------------------------------------------------------------------------


def transposed(tensor: Tensor) -> Tensor:
    """The same items with the first and the last dimension swapped in memory."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def stepped(tensor: Tensor) -> Tensor:
    """The same items, every second one of a wider tensor."""
    wide = torch.stack((tensor, torch.full_like(tensor, float("nan"))), dim=-1)
    return wide.flatten(-2)[..., ::2]


@each_case
@pytest.mark.parametrize("layout", [transposed, stepped])
@pytest.mark.parametrize("incoming_layout", [transposed, stepped])
def test_strided(case: Case, layout: Callable, incoming_layout: Callable):
    plain = case.inputs()
    expected_y, expected_grads = reference(case, plain)
    inputs = [layout(tensor.detach()).requires_grad_() for tensor in plain]
    assert layout is transposed or not any(t.is_contiguous() for t in inputs if t.numel() > 1)
    y = case.of(inputs)
    assert error(y, expected_y) < FP64
    dy = incoming(y)
    y.backward(incoming_layout(dy) if dy.dim() else dy)
    for tensor, expected in zip(inputs, expected_grads, strict=True):
        assert tensor.grad is not None
        assert error(tensor.grad, expected) < FP64


@each_case
def test_expanded(case: Case):
    """Stride 0 in every input's first dimension and throughout the incoming gradient."""
    seeds = [tensor[:1].detach() for tensor in case.inputs()]
    grads, outputs = {}, {}
    for by in ("fast", "naive"):
        leaves = [seed.clone().requires_grad_() for seed in seeds]
        inputs = [leaf.expand(shape) for leaf, shape in zip(leaves, case.shapes, strict=True)]
        outputs[by] = case.of(inputs, by=by)
        dy = torch.tensor(0.7, dtype=torch.float64).expand(outputs[by].shape)
        grads[by] = torch.autograd.grad(outputs[by], leaves, dy)
    assert error(outputs["fast"], outputs["naive"]) < FP64
    for actual, expected in zip(grads["fast"], grads["naive"], strict=True):
        if case.sums:  # equal rows and classes: the gradients themselves may cancel to nothing
            assert float((actual - expected).abs().max()) < 1e-12
        else:
            assert error(actual, expected) < FP64


# --- frozen inputs, what is kept, what it costs -------------------------------------------------


@each_case
def test_frozen_inputs(case: Case):
    """Every subset of the inputs frozen: those get no gradient, the others bit the same as ever."""
    inputs = case.inputs()
    y = case.of(inputs)
    expected = torch.autograd.grad(y, inputs, incoming(y))
    for wanted in itertools.product((False, True), repeat=len(inputs)):
        inputs = [t.requires_grad_(want) for t, want in zip(case.inputs(), wanted, strict=True)]
        y = case.of(inputs)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(incoming(y))
        for tensor, want, grad in zip(inputs, wanted, expected, strict=True):
            assert (tensor.grad is not None) == want
            assert tensor.grad is None or torch.equal(tensor.grad, grad)


def kept_items(compute: Callable[[], Tensor]) -> int:
    """Items of the distinct storages that a forward pass keeps for its backward."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = compute()
    del y
    return sum(sizes.values())


def test_carried_keeps_its_inputs_and_z():
    case = CASES["carried"]
    inputs = case.inputs()
    (batch, tokens, _), (_, rank), *_ = case.shapes
    z = batch * tokens * rank
    assert kept_items(lambda: case.of(inputs)) == sum(t.numel() for t in inputs) + z


def test_rms_norm_keeps_its_inputs_and_a_number_a_row():
    case = CASES["rms_norm"]
    inputs = case.inputs()
    assert kept_items(lambda: case.of(inputs)) == sum(t.numel() for t in inputs) + 2 * 5


def test_swiglu_keeps_its_inputs():
    case = CASES["swiglu"]
    inputs = case.inputs()
    assert kept_items(lambda: case.of(inputs)) == sum(t.numel() for t in inputs)


def test_rotate_keeps_the_tables():
    case = CASES["rotate"]
    inputs = case.inputs()
    assert kept_items(lambda: case.of(inputs)) == sum(t.numel() for t in TABLES)


@pytest.mark.parametrize("rows", [1, 4, 11])
def test_chunked_loss_keeps_two_gradients(rows: int):
    case = CASES["loss"]
    inputs = case.inputs()
    kept = kept_items(lambda: chunked(rows)(*inputs, TARGETS))
    assert kept == sum(t.numel() for t in inputs)  # dx is shaped as x, dW as W


def flop_counter() -> FlopCounterMode:
    """torch's, which does not know the in-place product."""

    def addmm(y_shape, left_shape, right_shape, out_shape=None, **kwargs) -> int:
        return 2 * left_shape[0] * left_shape[1] * right_shape[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm})


def test_carried_flops():
    """Forward 2 M R (D + F), backward twice that, and less where a gradient is not wanted."""
    case = CASES["carried"]
    m, d, r, f = 10, 6, 3, 7
    for wanted, backward in (
        ((True,) * 5, 4 * m * r * (d + f)),
        ((True, False, False, True, True), 2 * m * r * (d + f)),  # dZ and dX
        ((False, True, False, False, False), 2 * m * r * (d + f)),  # dZ and dA
        ((False, False, True, False, False), 2 * m * r * f),  # dB alone
        ((False, False, False, True, True), 0),  # elementwise alone
    ):
        inputs = [t.requires_grad_(want) for t, want in zip(case.inputs(), wanted, strict=True)]
        with flop_counter() as counter:
            y = case.of(inputs)
        assert counter.get_total_flops() == 2 * m * r * (d + f)
        dy = incoming(y)
        with flop_counter() as counter:
            y.backward(dy)
        assert counter.get_total_flops() == backward


def test_chunked_loss_flops():
    """2 M D V for the logits, 2 M D V for each gradient that is wanted; none in the backward."""
    case = CASES["loss"]
    product = 2 * 11 * 6 * 13
    for wanted in itertools.product((False, True), repeat=2):
        inputs = [t.requires_grad_(want) for t, want in zip(case.inputs(), wanted, strict=True)]
        with FlopCounterMode(display=False) as counter:
            y = chunked(4)(*inputs, TARGETS)
        assert counter.get_total_flops() == product * (1 + sum(wanted))
        if any(wanted):
            with FlopCounterMode(display=False) as counter:
                y.backward()
            assert counter.get_total_flops() == 0


@pytest.mark.parametrize("rows", [4, None])
def test_evaluating_the_loss_computes_no_gradients(rows: int | None):
    """Under no_grad the parameters still say requires_grad, but only the logits are computed."""
    inputs = CASES["loss"].inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        chunked(rows)(*inputs, TARGETS)
    assert counter.get_total_flops() == 2 * 11 * 6 * 13


# --- the loss -----------------------------------------------------------------------------------


class LargestOutput(TorchDispatchMode):
    """Records the most items of any tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.items = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.items = max(self.items, tensor.numel())
        return out


def big_loss_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 4, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 4, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(0, 50, (64,), generator=generator)
    target[::5] = -100
    return x, weight, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [8, 7])
def test_chunked_loss_never_holds_all_logits(dtype: torch.dtype, rows: int):
    x, weight, target = big_loss_inputs(dtype)
    with LargestOutput() as largest:
        chunked(rows)(x, weight, target).backward()
    assert largest.items == rows * 50  # one chunk's logits; 64 x 50 would be all of them


@pytest.mark.parametrize(
    ("vocab_size", "device", "rows"),
    [
        (50, "cpu", 256),
        (32_000, "cpu", 256),
        (1 << 17, "cpu", 64),
        (1 << 24, "cpu", 1),
        (32_000, "cuda", 8388),
        (1 << 29, "cuda", 1),
    ],
)
def test_default_chunk_is_bounded(vocab_size: int, device: str, rows: int):
    assert loss_chunks.chunk_rows(vocab_size, device) == rows


def test_default_chunk_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_chunks, "CPU_ITEMS", 50 * 6 + 49)
    x, weight, target = big_loss_inputs(torch.float32)
    with LargestOutput() as largest:
        chunked(None)(x, weight, target).backward()
    assert largest.items == 50 * 6


def test_second_backward_through_the_loss_is_refused():
    """The first one scales the gradients where they lie."""
    x, weight, target = big_loss_inputs(torch.float32)
    y = loss.linear_cross_entropy(x, weight, target)
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph=True is not supported"):
        y.backward()


LOSSES = {
    "chunks-of-1": chunked(1),
    "chunks-of-7": chunked(7),
    "one-chunk": chunked(None),
}
each_loss = pytest.mark.parametrize("of", [pytest.param(f, id=name) for name, f in LOSSES.items()])


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_targets_ignored(of: Callable[..., Tensor], dtype: torch.dtype):
    """Exactly zero, and exactly zero gradients: no mean over nothing."""
    x, weight, target = big_loss_inputs(dtype)
    y = of(x, weight, torch.full_like(target, -100))
    y.backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert y.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@each_loss
def test_ignored_rows_get_exactly_no_gradient(of: Callable[..., Tensor]):
    x, weight, target = big_loss_inputs(torch.float32)
    (dx,) = torch.autograd.grad(of(x, weight, target), x)
    assert torch.equal((dx == 0).all(dim=1), target == -100)


@each_loss
def test_large_logits_stay_finite(of: Callable[..., Tensor]):
    """Logits of 1e4 overflow exp; a right row's loss is 0, a wrong one's the logits' distance."""
    x = (torch.eye(4) * 1e4).requires_grad_()
    weight = torch.eye(5, 4).requires_grad_()
    y = of(x, weight, torch.tensor([0, 1, 2, 0]))
    y.backward()
    assert x.grad is not None
    assert y.item() == 1e4
    assert torch.equal(x.grad, torch.tensor([[0.0] * 4] * 3 + [[-1.0, 0, 0, 1]]))


# --- corners ------------------------------------------------------------------------------------


def test_rms_norm_of_zero_rows_is_zero():
    x = torch.zeros(2, 3, 4, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    y = elementwise.rms_norm(x, weight, EPS)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(y, torch.zeros(2, 3, 4))
    # d/dx of x / sqrt(eps) at zero: 1000, rounded once by rsqrt.
    assert error(x.grad, torch.full((2, 3, 4), EPS**-0.5)) < 2**-22


def test_swiglu_of_large_gates():
    """Where the sigmoid saturates the result is gate * up or 0, and no gradient is NaN."""
    gate = torch.tensor([200.0, -200.0, 0.0], requires_grad=True)
    up = torch.tensor([3.0, 3.0, 3.0], requires_grad=True)
    y = elementwise.swiglu(gate, up)
    y.sum().backward()
    assert torch.equal(y, torch.tensor([600.0, 0.0, 0.0]))
    assert gate.grad is not None
    assert up.grad is not None
    assert torch.equal(gate.grad, torch.tensor([3.0, 0.0, 1.5]))
    assert torch.equal(up.grad, torch.tensor([200.0, 0.0, 0.0]))


def test_carried_refuses_other_widths():
    x, a, b, carry, gain = CASES["carried"].inputs()
    with pytest.raises(ValueError, match="widths disagree"):
        carried.carried_lowrank(x[..., :-1], a, b, carry, gain)
    with pytest.raises(ValueError, match="widths disagree"):
        carried.carried_lowrank(x, a, b, carry[..., :-1], gain)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4)])
def test_carried_takes_any_leading_dimensions(shape: tuple[int, ...]):
    _, a, b, _, gain = CASES["carried"].inputs()
    x = torch.randn(*shape[:-1], 6, dtype=torch.float64)
    carry = torch.randn(*shape[:-1], 7, dtype=torch.float64)
    y = carried.carried_lowrank(x, a, b, carry, gain)
    assert error(y, naive.carried_lowrank(x, a, b, carry, gain)) < FP64
