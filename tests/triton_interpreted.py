"""The Triton kernels in Triton's interpreter, on a CPU. Run by ``test_triton.py`` in a process of
its own, with TRITON_INTERPRET=1, which Triton reads when it is imported.

The reference is the naive formula in fp64. The interpreter multiplies bf16 after bringing it to
fp32, and cuts instead of rounding where it stores bf16 (2^-7 instead of 2^-8): bits are compared in
fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from crnet.kernels import carried, carried_cuda, compiled, naive, triton_carried
from recompute_steps import NONE, Plan, assert_same, random_model, same_bits, step
from shapes import tiny
from test_kernels import error, incoming, transposed

assert compiled.INTERPRETED
assert triton_carried.INTERPRETED

FP32 = 5e-6
"""Sums of up to 300 items in fp32."""
BF16 = 2**-6
"""Inputs are exact; Z is rounded once (2^-8), Y and every gradient cut once (2^-7)."""

SIZES = [(1, 3, 5), (16, 16, 128), (37, 24, 70), (128, 64, 128), (130, 100, 259), (300, 130, 17)]
"""M, R, F: of one tile, multiples of tiles, and not."""
each_size = pytest.mark.parametrize(("m", "r", "f"), SIZES)
Z_B_CARRY = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
each_dtype = pytest.mark.parametrize(("dtype", "carry_dtype"), Z_B_CARRY)


def inputs(m: int, r: int, f: int, dtype: torch.dtype, carry_dtype: torch.dtype, d: int = 7):
    """x, A, B, carry, gain: gain in fp32, as a parameter of a mixed model is."""
    generator = torch.Generator().manual_seed(m + r + f)
    shapes = ((m, d), (d, r), (r, f), (m, f), (1,))
    dtypes = (dtype, dtype, dtype, carry_dtype, torch.float32)
    made = [
        torch.randn(shape, generator=generator).to(d)
        for shape, d in zip(shapes, dtypes, strict=True)
    ]
    return [tensor.requires_grad_() for tensor in made]


def bound(dtype: torch.dtype) -> float:
    return FP32 if dtype == torch.float32 else BF16


@each_size
@each_dtype
def test_kernel_equals_the_formula(m, r, f, dtype, carry_dtype):
    _, _, b, carry, gain = (tensor.detach() for tensor in inputs(m, r, f, dtype, carry_dtype))
    z = torch.randn(m, r, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = gain.double() * carry.double() + z.double() @ b.double()
    y = triton_carried.carried_up(z, b, carry, gain)
    assert (y.dtype, y.shape) == (carry_dtype, (m, f))
    assert error(y, expected) < bound(carry_dtype)


@each_size
@each_dtype
def test_map_equals_naive_with_all_gradients(m, r, f, dtype, carry_dtype):
    leaves = inputs(m, r, f, dtype, carry_dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    y = carried.carried_lowrank(*leaves, carry_dtype=carry_dtype)
    expected = naive.carried_lowrank(*wide)
    assert y.dtype == carry_dtype
    assert error(y, expected) < bound(dtype)
    dy = incoming(y)
    y.backward(dy)
    expected.backward(dy.double())
    for name, one, other in zip(("x", "A", "B", "carry", "gain"), leaves, wide, strict=True):
        assert one.grad is not None, name
        assert one.grad.dtype == one.dtype, name
        assert error(one.grad, other.grad) < bound(dtype), name


@pytest.mark.parametrize("size", [(5, 3), (64, 128), (33, 1000), (3, 8192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_carry_gradients(size, dtype):
    generator = torch.Generator().manual_seed(0)
    dy, carry = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    gain = torch.tensor([-0.7])
    dcarry, dgain = triton_carried.carry_gradients(dy, carry, gain)
    assert (dcarry.dtype, dgain.dtype, dgain.shape) == (dtype, torch.float32, ())
    assert error(dcarry, gain.double() * dy.double()) < bound(dtype)
    products = dy.double() * carry.double()
    # A sum that may cancel: against the sum of sizes.
    assert float((dgain.double() - products.sum()).abs() / products.abs().sum()) < 1e-6


def second(tensor: Tensor) -> Tensor:
    """The same items, every second one of a wider tensor."""
    return torch.stack((tensor, tensor), -1)[..., 0]


@pytest.mark.parametrize("layout", [transposed, second])
def test_any_strides(layout: Callable[[Tensor], Tensor]):
    _, _, b, carry, gain = (each.detach() for each in inputs(20, 5, 30, *Z_B_CARRY[0]))
    z = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    expected = triton_carried.carried_up(z, b, carry, gain)
    z, b, carry = (layout(each) for each in (z, b, carry))
    assert not any(each.is_contiguous() for each in (z, b, carry))
    assert same_bits(triton_carried.carried_up(z, b, carry, gain), expected)
    dcarry, dgain = triton_carried.carry_gradients(carry, b.new_ones(20, 30), gain)
    again = triton_carried.carry_gradients(carry.contiguous(), b.new_ones(20, 30), gain)
    assert same_bits(dcarry, again[0])
    assert same_bits(dgain, again[1])


def test_nothing_to_compute():
    z, b, carry = torch.ones(0, 3), torch.ones(3, 5), torch.ones(0, 5)
    assert triton_carried.carried_up(z, b, carry, torch.ones(1)).shape == (0, 5)
    dcarry, dgain = triton_carried.carry_gradients(carry, carry, torch.ones(1))
    assert (dcarry.shape, dgain.item()) == ((0, 5), 0)


def test_gain_is_not_rounded():
    """1 + 2^-10 is 1 in bf16; the kernel reads it in fp32: with Z B = 0 and a carry of 2^7 in fp32
    the product shows it."""
    z, b = torch.zeros(16, 16, dtype=torch.bfloat16), torch.zeros(16, 16, dtype=torch.bfloat16)
    carry, gain = torch.full((16, 16), 128.0), torch.tensor([1 + 2**-10])
    y = carried.up_project(z, b, carry, gain, torch.float32)
    assert torch.equal(y, torch.full((16, 16), 128.125))


def test_eager_has_torch_kernels():
    _, _, b, carry, gain = (each.detach() for each in inputs(8, 4, 6, *Z_B_CARRY[0]))
    z = torch.ones(8, 4)
    assert carried_cuda.takes_kernel(z)
    compiled.choose("eager")
    try:
        assert not carried_cuda.takes(z)
        assert not carried_cuda.takes_gradients(z)
        assert error(carried.up_project(z, b, carry, gain), gain * carry + z @ b) < FP32
    finally:
        compiled.choose("auto")


def test_replay_changes_no_bit():
    """fp32: a whole model, its maps by the kernel in both runs."""
    model = random_model(tiny(num_layers=3))
    expected = step(model, NONE)
    assert_same(step(model, Plan("replay", (2,))), expected)
    compiled.choose("eager")
    try:
        plain = step(model, NONE)
    finally:
        compiled.choose("auto")
    assert not all(same_bits(plain[1][name], each) for name, each in expected[1].items())
    for name, gradient in expected[1].items():
        scale = 1.0 if name.endswith(".beta") else float(gradient.abs().max())
        assert float((plain[1][name] - gradient).abs().max()) < 1e-3 * scale, name


def test_invert_undoes_the_kernel():
    """bf16 with an fp32 carry: the gain that it divides by is the one that the map took."""
    _, _, b, carry, _ = (each.detach() for each in inputs(8, 4, 6, torch.bfloat16, torch.float32))
    z, gain = torch.ones(8, 4, dtype=torch.bfloat16), torch.tensor([1.003])
    y = carried.up_project(z, b, carry, gain, torch.float32)
    assert error(carried.carry_from(y, z, b, gain), carry) < FP32


# --- traced, and on shapes alone ----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_compiled_map_has_the_kernel_in_its_graph():
    from torch._dynamo.backends.common import aot_autograd

    seen: list[set[str]] = []

    def note(graph, example):
        seen.append({str(node.target) for node in graph.graph.nodes})
        return graph

    leaves = inputs(20, 5, 30, *Z_B_CARRY[0])
    expected = carried.carried_lowrank(*leaves)
    expected_grads = torch.autograd.grad(expected, leaves, incoming(expected))
    traced = torch.compile(
        carried.carried_lowrank, backend=aot_autograd(fw_compiler=note), fullgraph=True
    )
    y = traced(*leaves)
    assert same_bits(y, expected)
    grads = torch.autograd.grad(y, leaves, incoming(y))
    for one, other in zip(grads, expected_grads, strict=True):
        assert error(one, other) < FP32
    forward, backward = seen
    assert "crnet_kernels.carried_up.default" in forward
    assert "crnet_kernels.carry_gradients.default" not in backward  # Inductor's to fuse


def test_shapes_alone():
    """Fake tensors of a CUDA device: the operators have shapes, and FLOPs."""
    with FakeTensorMode():
        z, b = (torch.empty(*s, device="cuda", dtype=torch.bfloat16) for s in ((8, 4), (4, 6)))
        carry, gain = torch.empty(8, 6, device="cuda"), torch.empty(1, device="cuda")
        with FlopCounterMode(display=False, custom_mapping=carried_cuda.FLOPS) as counter:
            y = torch.ops.crnet_kernels.carried_up(z, b, carry, gain)
        dcarry, dgain = torch.ops.crnet_kernels.carry_gradients(y, carry, gain)
    assert (y.shape, y.dtype, y.device.type) == ((8, 6), torch.float32, "cuda")
    assert (dcarry.shape, dgain.shape) == ((8, 6), ())
    assert counter.get_total_flops() == 2 * 8 * 4 * 6


def test_operators_are_as_registered():
    """torch's own check of the schema, and of the fake results against real ones."""
    z, b, carry = torch.randn(8, 4), torch.randn(4, 6), torch.randn(8, 6)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.crnet_kernels.carried_up, (z, b, carry, torch.ones(1)), test_utils=tests
    )
    torch.library.opcheck(
        torch.ops.crnet_kernels.carry_gradients, (carry, carry, torch.ones(1)), test_utils=tests
    )
