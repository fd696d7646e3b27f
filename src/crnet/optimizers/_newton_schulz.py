"""Newton-Schulz iterations: a matrix with singular values near 1 in the place of its own.

Source: Jordan et al. 2024 (Muon), the polynomial and its coefficients. ``through_gram`` is the same
polynomial on the small side.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of x, x^3 and x^5 in one iteration: steep at 0, and between 0.7 and 1.2 in the end."""


def orthogonalised(x_MN: Tensor, num_steps: int) -> Tensor:
    """A matrix with singular values near 1 in the place of those of ``x_MN``, bf16.

    Cost: ``num_steps`` times 4 k^2 l + 2 k^3 FLOPs, k the smaller side and l the larger.
    """
    a, b, c = COEFFICIENTS
    is_tall = x_MN.shape[0] > x_MN.shape[1]
    x = (x_MN.T if is_tall else x_MN).bfloat16()
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
    for idx in range(5):
        poly = torch.addmm(square, square, square, beta=b, alpha=c)
        poly.diagonal().add_(a)
        z = poly if z is None else z @ poly
        if idx < 4:
            square = poly @ square @ poly
    assert z is not None
    return (z / size.sqrt()).to(gram_KK.dtype)
