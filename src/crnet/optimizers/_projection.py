"""Projections of gradients onto few directions. torch is imported when asked.

A projection P has one row a direction of the smaller side of its matrix: ``(rank, min(m, n))``.
Random ones follow from a seed and a name. Source of their numbers: a CPU generator, so that they
are the same on any device and number of ranks.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


TINY = 1e-8
"""Keeps ratios of norms finite."""


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


def project_back(r: Tensor, p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A matrix of that shape in the rows of P: R P (right), or P^T R (left)."""
    return r @ p if is_right(shape) else p.T @ r


def orthonormal(shape: tuple[int, ...], rank: int, seed: int) -> Tensor:
    """P with orthonormal rows, uniform on the Stiefel manifold; fp64, on the CPU.

    ``rank`` is at most min(m, n). Cost: a QR of (min(m, n), rank) in fp64.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(min(shape), rank, generator=generator, dtype=torch.float64)
    q_NR, r_RR = torch.linalg.qr(draw)
    return (q_NR * r_RR.diagonal().sign()).T  # without the signs of R it is not uniform


def leading(g_MN: Tensor, rank: int) -> Tensor:
    """P: the singular vectors of the largest singular values, on the smaller side; dtype of G.

    From the eigenvectors of the Gram matrix of the smaller side, in fp64. What squaring loses is
    then still below what an SVD in fp32 loses: nearer to the exact vectors than
    ``naive_leading``, in half the time. The largest item of each vector is positive, so that signs
    do not hang on the library.

    Cost: 2 m n min(m, n) FLOPs and an eigendecomposition of (min(m, n), min(m, n)), fp64;
    allocates a copy of G in fp64.
    """
    import torch

    wide = g_MN.double()
    gram = wide.T @ wide if is_right(tuple(g_MN.shape)) else wide @ wide.T
    _, vectors = torch.linalg.eigh(gram)  # in the order of rising values
    return _with_signs(vectors[:, -rank:].flip(1).T).to(g_MN.dtype)


def naive_leading(g_MN: Tensor, rank: int) -> Tensor:
    """As ``leading``, by an SVD in fp32, fp64 for fp64: the paper's words."""
    import torch

    wide = g_MN.to(torch.promote_types(g_MN.dtype, torch.float32))
    left, _, right = torch.linalg.svd(wide, full_matrices=False)
    vectors = right[:rank] if is_right(tuple(g_MN.shape)) else left[:, :rank].T
    return _with_signs(vectors).to(g_MN.dtype)


def _with_signs(p_RN: Tensor) -> Tensor:
    import torch

    largest = p_RN.gather(1, p_RN.abs().argmax(1, keepdim=True))
    return (p_RN * torch.where(largest < 0, -1.0, 1.0)).contiguous()


def growth(norm: Tensor, last: Tensor | None, limit: float) -> Tensor | None:
    """A step's norm over the largest that it may be; 1 where it may be, None at the first step.

    The limit is ``limit`` times the norm of the step before. Deviation: after a step of zero, which
    nothing could grow from, there is none.

    Args:
        norm, last: of this step and of the one before, as that one was taken; 0-d.
    """
    if last is None:
        return None
    excess = (norm / (last + TINY)).clamp_(min=limit).div_(limit)
    return excess.where(last > 0, 1.0)


def limited(scales: Tensor, norms: Tensor, state: dict[str, Any], limit: float) -> Tensor:
    """Scales of a step's rows or columns, less where the step's norm grew too much (``growth``).

    Args:
        norms: what the scales make of each row or column, their norms; of the whole, one number.
        state: its ``norm`` is that of the last step; the first is only noted.
        limit: 0: none, and no state.
    """
    if not limit:
        return scales
    import torch

    norm = torch.linalg.vector_norm(norms)
    excess = growth(norm, state.get("norm"), limit)
    if excess is not None:
        scales, norm = scales / excess, norm / excess
    state["norm"] = norm
    return scales
