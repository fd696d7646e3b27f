"""Newton-Schulz iterations: a matrix with singular values near 1 in the place of its own.

Source: Jordan et al. 2024 (Muon), the polynomial and its coefficients. ``through_gram`` is the same
polynomial on the small side.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of x, x^3 and x^5 in one iteration: steep at 0, and between 0.7 and 1.2 in the end."""


GRAM_ITERATIONS = 5
"""As many as rounding stands on the small side."""


def orthogonalised(x_MN: Tensor, num_steps: int) -> Tensor:
    """A matrix with singular values near 1 in the place of those of ``x_MN``.

    On a GPU bf16, whose products are fast there; else fp32 (fp64 for fp64), through the Gram matrix
    where that takes fewer FLOPs. ``naive_orthogonalised`` is the iteration itself.

    Cost: ``num_steps`` times 4 k^2 l + 2 k^3 FLOPs, k the smaller side and l the larger; five steps
    of an l above 1.5 k: 4 k^2 l + 34 k^3.
    """
    if x_MN.is_cuda:
        return naive_orthogonalised(x_MN.bfloat16(), num_steps)
    wide = x_MN.to(torch.promote_types(x_MN.dtype, torch.float32))
    small, large = sorted(wide.shape)
    if num_steps != GRAM_ITERATIONS or 2 * large <= 3 * small:
        return naive_orthogonalised(wide, num_steps)
    if wide.shape[0] > wide.shape[1]:
        return wide @ through_gram(wide.T @ wide)
    return through_gram(wide @ wide.T) @ wide


def naive_orthogonalised(x_MN: Tensor, num_steps: int) -> Tensor:
    """As ``orthogonalised``, in the dtype of ``x_MN``."""
    a, b, c = COEFFICIENTS
    is_tall = x_MN.shape[0] > x_MN.shape[1]
    x = x_MN.T if is_tall else x_MN
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def through_gram(gram_KK: Tensor) -> Tensor:
    """``Z`` for which five iterations lead from ``X`` (L, K) to ``X Z``; ``gram_KK`` is ``X' X``.

    Every iteration is X times a polynomial of X' X, so that X itself is read twice, whatever the
    number of iterations. Of an X of zeros, X Z is 0.

    Args:
        gram_KK: fp32 or fp64; rounding below 0 is amplified 12 times an iteration, which five of
            them stand and ten would not. On a GPU the work is in fp64, as products there may round
            to TF32.
    Cost: 34 K^3 FLOPs.
    """
    a, b, c = COEFFICIENTS
    square = gram_KK.double() if gram_KK.is_cuda else gram_KK
    size = square.trace().clamp_(min=1e-30)  # |X|^2
    square = square / size
    z: Tensor | None = None
    for idx in range(GRAM_ITERATIONS):
        poly = torch.addmm(square, square, square, beta=b, alpha=c)
        poly.diagonal().add_(a)
        z = poly if z is None else z @ poly
        if idx < GRAM_ITERATIONS - 1:
            square = poly @ square @ poly
    assert z is not None
    return (z / size.sqrt()).to(gram_KK.dtype)
