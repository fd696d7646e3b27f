"""RMSNorm at a map's bottleneck, for maps whose backward is written by hand.

With Z the bottleneck, s = 1 / sqrt(mean(Z^2) + eps) of each row and w the norm's gains, H = Z s w.
Nothing is kept but Z: s is a reduction of rows as short as a rank and is made again.

Shapes: M rows, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normed(z_MR: Tensor, weight_R: Tensor | None, eps: float) -> Tensor:
    """Return ``Z / sqrt(mean(Z^2) + eps) * w`` by rows, (M, R), dtype of ``Z``; no w: without.

    Cost: a few passes over M R items.
    Numerics: in fp32 (fp64 for fp64), rounded once.
    """
    wide = _wide(z_MR)
    unit = wide * _inverse(wide, eps)
    if weight_R is not None:
        unit.mul_(weight_R.to(unit.dtype))
    return unit.to(z_MR.dtype)


def normed_backward(
    dh_MR: Tensor, z_MR: Tensor, weight_R: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of ``Z``, dtype of ``dh_MR``, and of ``w``, that of ``w``."""
    wide = _wide(z_MR)
    inverse = _inverse(wide, eps)
    unit, dunit = wide * inverse, _wide(dh_MR)
    dweight_R = None
    if weight_R is not None:
        dweight_R = (dunit * unit).sum(0).to(weight_R.dtype)
        dunit = dunit * weight_R.to(dunit.dtype)
    along = torch.linalg.vecdot(dunit, unit).unsqueeze(-1).div_(unit.shape[-1])
    dz_MR = torch.addcmul(dunit, unit, along, value=-1).mul_(inverse)
    return dz_MR.to(dh_MR.dtype), dweight_R


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _inverse(z_MR: Tensor, eps: float) -> Tensor:
    square = torch.linalg.vector_norm(z_MR, dim=-1, keepdim=True).square_()
    return square.div_(z_MR.shape[-1]).add_(eps).rsqrt_()
