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


def causal_attention(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor) -> Tensor:
    """Return ``softmax(q k^T / sqrt(H)) v`` over each token and those before it.

    Args:
        q_BNTH, k_BNTH, v_BNTH: one dtype, as many heads each.
    Returns:
        (B, N, T, H), in their dtype.
    Cost: 4 B N T^2 H FLOPs, all pairs counted. Keeps the arguments, the result, and one number
        in fp32 a row and head. With 16 bits on a CPU without AMX one fp32 copy of each for a while.
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
    @staticmethod
    def forward(ctx, q_BNTH, k_BNTH, v_BNTH):
        mixed_BNTH, logs_BNT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BNTH.float(), k_BNTH.float(), v_BNTH.float(), 0.0, True
        )
        mixed_BNTH = mixed_BNTH.to(q_BNTH.dtype)
        ctx.save_for_backward(q_BNTH, k_BNTH, v_BNTH, mixed_BNTH, logs_BNT)
        return mixed_BNTH

    @staticmethod
    @once_differentiable
    def backward(ctx, dmixed_BNTH):
        *wide, logs_BNT = ctx.saved_tensors
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dmixed_BNTH.float(), *(each.float() for each in wide), logs_BNT, 0.0, True
        )
        return tuple(each.to(dmixed_BNTH.dtype) for each in found)
