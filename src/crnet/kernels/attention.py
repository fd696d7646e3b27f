"""Attention of 16-bit tensors on a CPU, computed in fp32.

torch's fused kernel for a CPU multiplies 16-bit tiles as it finds them; where the processor has no
tiles of its own for them (AMX), its backward pass takes two to five times fp32's. Products of bf16
are exact in fp32, so that this differs from torch's by less rounding alone.

Shapes: B batch, T tokens, N heads, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_AMX = torch.cpu._is_amx_tile_supported() if hasattr(torch.cpu, "_is_amx_tile_supported") else False

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def causal_attention(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor) -> Tensor:
    """Return ``softmax(q k^T / sqrt(H)) v`` over each token and those before it.

    Args:
        q_BNTH, k_BNTH, v_BNTH: one dtype, as many heads each.
    Returns:
        (B, N, T, H), in their dtype.
    Cost: 4 B N T^2 H FLOPs, all pairs counted. Keeps the arguments, the result, and one number
        in fp32 a row and head. With 16 bits on a CPU without AMX, and for a while, copies in fp32
        of one sequence.
    """
    if _is_faster_in_fp32(q_BNTH):
        return _InFp32.apply(q_BNTH, k_BNTH, v_BNTH)
    return nn.functional.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)


def _is_faster_in_fp32(q_BNTH: Tensor) -> bool:
    return (
        type(q_BNTH) is Tensor  # others (fake ones, say) are left to torch
        and q_BNTH.device.type == "cpu"
        and q_BNTH.dtype in (torch.bfloat16, torch.float16)
        and not _AMX
        and not torch.compiler.is_compiling()
        and torch.backends.cuda.flash_sdp_enabled()  # that of a CPU too: else another was asked for
    )


class _InFp32(torch.autograd.Function):
    """A sequence at a time: the copies in fp32 are those of one."""

    @staticmethod
    def forward(ctx, q_BNTH, k_BNTH, v_BNTH):
        batch, heads, length, _ = q_BNTH.shape
        mixed_BNTH = torch.empty_like(q_BNTH)
        logs_BNT = q_BNTH.new_empty(batch, length, heads, dtype=torch.float32).transpose(1, 2)
        for one in _each(batch):
            qkv = (each[one].float() for each in (q_BNTH, k_BNTH, v_BNTH))
            mixed_BNTH[one], logs_BNT[one] = _flash(*qkv, 0.0, True)
        ctx.save_for_backward(q_BNTH, k_BNTH, v_BNTH, mixed_BNTH, logs_BNT)
        return mixed_BNTH

    @staticmethod
    @once_differentiable
    def backward(ctx, dmixed_BNTH):
        *narrow, logs_BNT = ctx.saved_tensors
        found = tuple(map(torch.empty_like, narrow[:3]))
        for one in _each(len(dmixed_BNTH)):
            wide = (each[one].float() for each in (dmixed_BNTH, *narrow))
            for into, gradient in zip(
                found, _flash_backward(*wide, logs_BNT[one], 0.0, True), strict=True
            ):
                into[one] = gradient
        return found


def _each(count: int) -> list[slice]:
    return [slice(idx, idx + 1) for idx in range(count)]
