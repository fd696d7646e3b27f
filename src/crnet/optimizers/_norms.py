"""Norms of matrices over one side or both; accumulated in fp32, in fp64 for fp64."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 64
"""Rows that are added up at a time down the columns: so many stay in a core's cache."""


def squares_over(x_MN: Tensor, side: int) -> Tensor:
    """Sums of squares over one side, which stays with size 1.

    Down the columns torch's norm takes fifteen times as long as a product and a sum, and these
    allocate a matrix; here each item is read once.
    """
    wide = torch.promote_types(x_MN.dtype, torch.float32)
    if side == 1:
        return torch.linalg.vector_norm(x_MN, dim=1, keepdim=True, dtype=wide).square_()
    if x_MN.is_cuda:
        return naive_squares_over(x_MN, 0)
    total = torch.zeros(min(ROWS, len(x_MN)), x_MN.shape[1], dtype=wide, device=x_MN.device)
    for rows in x_MN.split(ROWS):
        rows = rows.to(wide)
        total[: len(rows)].addcmul_(rows, rows)
    return total.sum(0, keepdim=True)


def naive_squares_over(x_MN: Tensor, side: int) -> Tensor:
    """As ``squares_over``, in so many words."""
    wide = torch.promote_types(x_MN.dtype, torch.float32)
    return x_MN.to(wide).square().sum(side, keepdim=True)


def norm_of(x_MN: Tensor, side: int | None) -> Tensor:
    """Frobenius norm over a side, which stays with size 1; None: over both, 0-d."""
    wide = torch.promote_types(x_MN.dtype, torch.float32)
    if side == 0:
        return squares_over(x_MN, 0).sqrt_()
    return torch.linalg.vector_norm(x_MN, dim=side, keepdim=side is not None, dtype=wide)


def root_mean_square(x: Tensor) -> Tensor:
    """0-d; of an empty tensor 0."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dtype=wide).div_(max(1, x.numel()) ** 0.5)
