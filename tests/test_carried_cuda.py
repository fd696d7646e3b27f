"""CR-Net's map as a CUDA device computes it without Triton, on fake tensors and on the CPU.

What needs Triton is in ``test_triton.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from crnet.kernels import carried, carried_cuda, compiled

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def _without_triton() -> Iterator[None]:
    compiled.choose("eager")
    yield
    compiled.choose("auto")


@pytest.mark.usefixtures("_without_triton")
def test_an_fp32_carry_on_shapes_alone():
    """The forward pass (a torch without CUDA has no backward for such tensors): shape, dtype, and
    FLOPs of a product that is not rounded."""
    with FakeTensorMode():
        shapes = ((8, 6), (6, 4), (4, 10), (8, 10), (1,))
        dtypes = (BF16, BF16, BF16, FP32, FP32)
        leaves = [
            torch.empty(shape, device="cuda", dtype=dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        with FlopCounterMode(display=False, custom_mapping=carried_cuda.FLOPS) as counter:
            y = carried.carried_lowrank(*leaves, carry_dtype=FP32)
        assert counter.get_total_flops() == 2 * 8 * 4 * (6 + 10)
    assert (y.dtype, y.device.type) == (FP32, "cuda")


@pytest.mark.usefixtures("_without_triton")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_compiled_sum_is_left_to_the_compiler():
    """``addmm`` in a graph copies the carry first and stays a pass of its own: it must not be
    there; eager has it."""
    seen: list[str] = []

    def note(graph, example):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    generator = torch.Generator().manual_seed(0)
    z, b, carry, gain = (
        torch.randn(shape, generator=generator) for shape in ((8, 4), (4, 10), (8, 10), (1,))
    )
    backend = aot_autograd(fw_compiler=note)
    y = torch.compile(carried_cuda.up_project, backend=backend, fullgraph=True)(z, b, carry, gain)
    torch.compiler.reset()
    assert "aten.mm.default" in seen
    assert not [each for each in seen if "addmm" in each]
    for found in (y, carried_cuda.up_project(z, b, carry, gain)):
        torch.testing.assert_close(found, gain * carry + z @ b)
    torch.testing.assert_close(carried_cuda.without_product(y, z, b), gain * carry)
