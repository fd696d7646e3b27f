"""The specification of every fused operation: plain formulas, differentiated by autograd.

Slow and memory-hungry on purpose: nothing here saves, fuses or reorders anything. The tests compare
each fast path with these, gradients included.

Shapes: B batch, T tokens, M rows, D input width, F output width, R rank, N heads, H head size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gain(beta: Tensor, eps: float = 1e-6) -> Tensor:
    """``sign(beta) (|beta| + eps)``, shape of ``beta``; zero only where beta is. Source: eq. 6."""
    return torch.sign(beta) * (torch.abs(beta) + eps)


def carried_lowrank(x_BTD: Tensor, a_DR: Tensor, b_RF: Tensor, carry_BTF: Tensor, gain_1: Tensor):
    """``gain * carry + (x A) B``, shape (B, T, F). Source: arXiv:2509.18993, eq. 6."""
    return gain_1 * carry_BTF + (x_BTD @ a_DR) @ b_RF


def rebuild_up(
    carry_BTF: Tensor, z_BTR: Sequence[Tensor], b_RF: Sequence[Tensor], gains: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs of successive blocks from the output below them: eq. 6 repeated. Source: eq. 6."""
    outputs = []
    for z, b, gain_1 in zip(z_BTR, b_RF, gains, strict=True):
        carry_BTF = gain_1 * carry_BTF + z @ b
        outputs.append(carry_BTF)
    return outputs


def rebuild_down(
    y_BTF: Tensor, z_BTR: Sequence[Tensor], b_RF: Sequence[Tensor], gains: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs below that of the top block, nearest first: eq. 7 repeated, Z, B and gain of the
    blocks from the top one down. Source: eq. 7, algorithm 1."""
    outputs = []
    for z, b, gain_1 in zip(z_BTR, b_RF, gains, strict=True):
        y_BTF = (y_BTF - z @ b) / gain_1
        outputs.append(y_BTF)
    return outputs


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, statistics in fp32."""
    x = x_BTD if x_BTD.dtype == torch.float64 else x_BTD.float()
    normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x_BTD.dtype)


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """``gate * sigmoid(gate) * up``. Source: Shazeer 2020, as LLaMA uses it."""
    return gate_BTF * torch.sigmoid(gate_BTF) * up_BTF


def rotate(x_BTNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotary embedding, half-split layout: dimension i is paired with i + H/2. Source: RoFormer.

    ``cos_TH`` and ``sin_TH`` hold each angle once, in their first H/2 columns.
    """
    half = x_BTNH.shape[-1] // 2
    first, second = x_BTNH[..., :half], x_BTNH[..., half:]
    cos, sin = cos_TH[:, None, :], sin_TH[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def linear_cross_entropy(x_MD: Tensor, weight_VD: Tensor, target_M: Tensor) -> Tensor:
    """Sum over rows of ``-log softmax(x W^T)[target]``, without targets of -100; 0-d, fp32."""
    logits_MV = x_MD @ weight_VD.T
    logits_MV = logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float()
    return torch.nn.functional.cross_entropy(logits_MV, target_M, reduction="sum")
