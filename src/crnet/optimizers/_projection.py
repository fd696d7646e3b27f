"""Random projections of gradients that follow from a seed and a name. torch is imported when asked.

Source of the numbers: a CPU generator, so that they are the same on any device and number of ranks.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def seed_of(seed: int, name: str, refresh_idx: int) -> int:
    """A 64-bit seed: no number hangs on the order of the parameters."""
    text = "\0".join((str(seed), name, "projection", str(refresh_idx)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def is_right(shape: tuple[int, ...]) -> bool:
    """Whether a matrix (m, n) is projected from the right, G P^T: m >= n; else from the left."""
    return shape[0] >= shape[1]


def gaussian(
    shape: tuple[int, ...],
    rank: int,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """P (rank, min(m, n)) for a matrix of that shape: N(0, 1 / rank), drawn in fp32 on the CPU.

    Cost: rank x min(m, n) draws.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    p_RN = torch.randn(rank, min(shape), generator=generator).div_(rank**0.5)
    return p_RN.to(device, dtype)


def project(g_MN: Tensor, p: Tensor) -> Tensor:
    """R: G P^T (m, rank), or P G (rank, n)."""
    return g_MN @ p.T if is_right(tuple(g_MN.shape)) else p @ g_MN
