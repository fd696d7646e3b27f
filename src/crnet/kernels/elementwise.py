"""RMSNorm, SwiGLU and rotary embedding with backwards written by hand.

Autograd's versions keep every intermediate of the plain formulas (``naive``): for SwiGLU four
tensors of the feed-forward width where two are enough, for the rotation two where none is needed.
These keep the inputs alone and work in place on what they allocate themselves.

Shapes: B batch, T tokens, D model width, F feed-forward width, N heads, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crnet.kernels.compiled import fused
from crnet.kernels.precision import compute_dtype


def _rms_norm_forward(x_BTD, weight_D, eps, dtype):
    x = x_BTD if x_BTD.dtype == torch.float64 else x_BTD.float()
    inverse_BT1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse_BT1 = inverse_BT1.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * inverse_BT1).to(dtype).mul_(weight_D.to(dtype)), inverse_BT1


def _rms_norm_backward(dy_BTD, x_BTD, weight_D, inverse_BT1, wants_weight):
    normed = x_BTD * inverse_BT1
    dy = dy_BTD.to(normed.dtype)
    dweight_D = None
    if wants_weight:
        dweight_D = (dy * normed).flatten(0, -2).sum(0).to(weight_D.dtype)
    dx = dy * weight_D
    along_BT1 = torch.linalg.vecdot(dx, normed).unsqueeze(-1).div_(normed.shape[-1])
    dx.addcmul_(normed, along_BT1, value=-1).mul_(inverse_BT1)
    return dx.to(x_BTD.dtype), dweight_D


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, weight_D, eps, dtype, trains):
        body = fused(_rms_norm_forward, x_BTD) if trains else _rms_norm_forward
        y_BTD, inverse_BT1 = body(x_BTD, weight_D, eps, dtype)
        ctx.save_for_backward(x_BTD, weight_D, inverse_BT1)
        return y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTD):
        body = fused(_rms_norm_backward, dy_BTD)
        dx_BTD, dweight_D = body(dy_BTD, *ctx.saved_tensors, ctx.needs_input_grad[1])
        return dx_BTD, dweight_D, None, None, None


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    Args:
        x_BTD: any floating dtype.
        weight_D: the norm's gains.
    Returns:
        (B, T, D) in the dtype the next product computes in (autocast's where it is on).
    Cost: keeps ``x_BTD`` and one number a row.
    Numerics: statistics in fp32 (fp64 for fp64).
    Source: Zhang and Sennrich 2019.
    """
    return _RMSNorm.apply(x_BTD, weight_D, eps, compute_dtype(x_BTD), torch.is_grad_enabled())


def _swiglu_forward(gate, up):
    return torch.nn.functional.silu(gate).mul_(up)


def _swiglu_backward(dy, gate, up):
    dgate = dy * up
    if torch.compiler.is_compiling():
        dgate = torch.ops.aten.silu_backward(dgate, gate)
    else:
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    return dgate, torch.nn.functional.silu(gate).mul_(dy)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_BTF, up_BTF, trains):
        ctx.save_for_backward(gate_BTF, up_BTF)
        body = fused(_swiglu_forward, gate_BTF) if trains else _swiglu_forward
        return body(gate_BTF, up_BTF)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        return *fused(_swiglu_backward, dy_BTF)(dy_BTF, *ctx.saved_tensors), None


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """Return ``silu(gate) * up``, elementwise, same shape and dtype. Keeps its two inputs.

    Source: Shazeer 2020 (arXiv:2002.05202) as LLaMA uses it.
    Deviation: the CR-Net paper's eq. 2 prints one more factor; see docs/paper_map.md.
    """
    return _SwiGLU.apply(gate_BTF, up_BTF, torch.is_grad_enabled())


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTNH, cos_T1H, sin_T1H, trains):
        ctx.save_for_backward(cos_T1H, sin_T1H)
        body = fused(_rotate, x_BTNH) if trains else _rotate
        return body(x_BTNH, cos_T1H, sin_T1H, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTNH):
        cos_T1H, sin_T1H = ctx.saved_tensors
        return fused(_rotate, dy_BTNH)(dy_BTNH, cos_T1H, sin_T1H, -1), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y[..., :half] = first
    y[..., :half].mul_(cos).addcmul_(second, sin, value=-sign)
    y[..., half:] = second
    y[..., half:].mul_(cos).addcmul_(first, sin, value=sign)
    return y


def rotate(x_BTNH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Rotate the pairs (i, i + H/2) of every head by its position's angle.

    Args:
        x_BTNH: queries or keys, any strides.
        cos_T1H, sin_T1H: each angle once, shape (T, 1, H/2), dtype of ``x_BTNH``.
    Returns:
        (B, T, N, H), contiguous, dtype of ``x_BTNH``. The backward rotates back; nothing is kept.
    Source: RoFormer (arXiv:2104.09864), LLaMA's half-split layout.
    """
    return _Rotate.apply(x_BTNH, cos_T1H, sin_T1H, torch.is_grad_enabled())
