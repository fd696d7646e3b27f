"""CR-Net's map on a CUDA device: which kernel computes it.

With Triton, one kernel reads Z, B and the carry and writes Y (``triton_carried``), in place of a
product between two passes over Y. It is a registered operator, so that a compiled block has it in
its graph, and shapes alone (fake tensors) go through it. It serves bf16 and fp16: fp32 products are
cuBLAS's, which a kernel of ours does not beat.

Shapes: M rows, R rank, F output width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crnet.kernels.compiled import INTERPRETED, takes_triton
from crnet.kernels.precision import scaled

DTYPES = (torch.bfloat16, torch.float16) + (torch.float32,) * INTERPRETED
"""Of bottlenecks that the kernel takes."""

_library = torch.library.Library("crnet_kernels", "DEF")
_library.define("carried_up(Tensor z, Tensor b, Tensor carry, Tensor gain) -> Tensor")
_library.define("carry_gradients(Tensor dy, Tensor carry, Tensor gain) -> (Tensor, Tensor)")


def _carried_up(z_MR: Tensor, b_RF: Tensor, carry_MF: Tensor, gain_1: Tensor) -> Tensor:
    from crnet.kernels import triton_carried

    return triton_carried.carried_up(z_MR, b_RF, carry_MF, gain_1)


def _carry_gradients(dy_MF: Tensor, carry_MF: Tensor, gain_1: Tensor) -> tuple[Tensor, Tensor]:
    from crnet.kernels import triton_carried

    return triton_carried.carry_gradients(dy_MF, carry_MF, gain_1)


for _device in ("CUDA", "CPU"):  # on a CPU in Triton's interpreter alone
    _library.impl("carried_up", _carried_up, _device)
    _library.impl("carry_gradients", _carry_gradients, _device)


@torch.library.register_fake("crnet_kernels::carried_up")
def _(z_MR, b_RF, carry_MF, gain_1):
    return torch.empty_like(carry_MF, memory_format=torch.contiguous_format)


@torch.library.register_fake("crnet_kernels::carry_gradients")
def _(dy_MF, carry_MF, gain_1):
    dcarry_MF = torch.empty_like(dy_MF, memory_format=torch.contiguous_format)
    return dcarry_MF, dy_MF.new_empty((), dtype=torch.float32)


def carried_up_flops(z_shape, b_shape, *shapes, **more) -> int:
    """Of the operator, for ``FlopCounterMode(custom_mapping=FLOPS)``."""
    return 2 * z_shape[0] * z_shape[1] * b_shape[1]


FLOPS = {torch.ops.crnet_kernels.carried_up: carried_up_flops}


def takes_kernel(z: Tensor) -> bool:
    """Whether ``Z B + gain * carry`` of a bottleneck is for the kernel."""
    return z.dtype in DTYPES and takes_triton(z)


def takes(z: Tensor) -> bool:
    """Whether ``up_project`` below is for a bottleneck."""
    return z.is_cuda or takes_kernel(z)


def takes_gradients(dy: Tensor) -> bool:
    """Whether ``carry_gradients`` is for dY. Inductor makes one kernel of the plain lines, and
    fuses it with its neighbours: a compiled block has those."""
    return dy.dtype != torch.float64 and takes_triton(dy) and not torch.compiler.is_compiling()


def up_project(z_MR: Tensor, b_RF: Tensor, carry_MF: Tensor, gain_1: Tensor) -> Tensor:
    """Return ``gain * carry + Z B`` in the dtype of the carry, (M, F).

    Without the kernel, as plain operations: in a compiled block they fuse with what reads Y, which
    ``addmm`` would not (it copies the carry first); a product for a wider carry is not rounded.
    """
    if takes_kernel(z_MR) and gain_1.numel() == 1:
        return torch.ops.crnet_kernels.carried_up(z_MR, b_RF, carry_MF, gain_1)
    y_MF = scaled(carry_MF, gain_1)
    if torch.compiler.is_compiling() and y_MF.dtype == z_MR.dtype:
        return y_MF + z_MR @ b_RF
    if y_MF.dtype == z_MR.dtype:
        return torch.addmm(y_MF, z_MR, b_RF, out=y_MF)
    # Not addmm(out_dtype=): torch's FLOP counter fails on it.
    return y_MF.add_(torch.mm(z_MR, b_RF, out_dtype=y_MF.dtype))


def without_product(y_MF: Tensor, z_MR: Tensor, b_RF: Tensor) -> Tensor:
    """Return ``Y - Z B``, the product as ``up_project`` has it: unrounded where Y is wider."""
    if takes_kernel(z_MR):
        one_1 = torch.ones(1, device=y_MF.device)
        return torch.ops.crnet_kernels.carried_up(z_MR, b_RF.neg(), y_MF, one_1)
    if y_MF.dtype == z_MR.dtype:
        return torch.addmm(y_MF, z_MR, b_RF, alpha=-1)
    return y_MF - torch.mm(z_MR, b_RF, out_dtype=y_MF.dtype)


def carry_gradients(dy_MF: Tensor, carry_MF: Tensor, gain_1: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``gain * dY`` and ``<dY, carry>``, 0-d fp32, by a kernel; see ``takes_gradients``."""
    return torch.ops.crnet_kernels.carry_gradients(dy_MF, carry_MF, gain_1)
