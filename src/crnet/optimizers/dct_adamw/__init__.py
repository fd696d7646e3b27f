"""DCT-AdamW: AdamW in the subspace of a few columns of a fixed cosine matrix.

Q is the orthogonal matrix of the discrete cosine transform (DCT-III), of the size of a dense
matrix's smaller side. At a refresh, of ``S = G Q`` (m >= n, else ``Q^T G``) the r columns (rows)
with the largest sum of magnitudes are chosen. They are the projected gradient R, the moments are
those of R, and Adam's direction goes back with the chosen columns of Q. Of a projection only the
indices are kept. Nothing is decomposed, so every step can be a refresh.

With ``rotate`` moments follow their columns at a refresh: those of a column that stays go on, those
of one that is new begin at 0. (The rotation is ``M Q_old^T Q_new``, for the second moment its
magnitude; Q is orthogonal, so it is a choice of columns.)

Adam is torch's: the bias is corrected before eps is added, weight decay before the step. Others:
AdamW.

Source: Modoranu et al. 2025 (arXiv:2505.17967) and the released code.
S comes from a Fourier transform of every row, within rounding the product with Q.
Deviation: each size has its own Q, where the released code takes the first matrix's for all;
chosen columns are in the order of Q, so that a choice that does not change moves nothing. Error
feedback is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crnet.optimizers._subspace import SubspaceMethod, SubspaceOptions
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class DctAdamwOptions(SubspaceOptions):
    """DCT-AdamW."""

    refresh_every: int = 1
    """Steps between two choices of columns."""
    rotate: bool = True
    """Moments follow their columns at a refresh; else they stay in place (the released default)."""


class DctAdamw(SubspaceMethod):
    name = "dct-adamw"
    summary = "AdamW in the subspace of the cosine columns nearest to the gradient"
    Options = DctAdamwOptions
    examples = (
        DctAdamwOptions(rank=4),
        DctAdamwOptions(rank=3, refresh_every=40, stagger=True, rotate=False),
    )

    def state_bytes(self, spec: TensorSpec, options: DctAdamwOptions, item_bytes: int) -> int:
        if spec.role != "matrix":
            return super().state_bytes(spec, options, item_bytes)
        rank = options.rank_of(spec)
        return 2 * rank * max(spec.shape) * item_bytes + 4 * rank  # moments, indices

    def build(self, parameters, options: DctAdamwOptions, settings) -> Any:
        from crnet.optimizers.dct_adamw.module import DctSubspaceAdam

        return DctSubspaceAdam(parameters, options, settings)


METHODS = [DctAdamw()]
