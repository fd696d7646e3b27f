"""GradNormLoRP: GaLore on the direction of a weight-normalised matrix, and Adam on its lengths.

Every row of a dense matrix is written as ``W = g v / |v|`` with a length g of its own. With the
gradient G of W and ``e = v / |v|`` the gradient of the length is ``<G, e>``, and that of v is
``(g / |v|) (G - <G, e> e)``, which has no part along v. Adam trains the lengths, and GaLore, with
its projection, its scale and its Adam, trains v. At the start v is W.

Neither v nor g is kept: both follow from W and |v|, of which there is one number a row. Embedding,
head, factors and norms: Adam.

Source: Huang et al. 2024 (arXiv:2412.19616), from the formulas; rate 0.01, rank 128, scale 0.25,
250 steps between projections for LLaMA-60M.
Unverified: a re-implementation. The released code does something else (a magnitude that every step
overwrites, weights that are never written back), and no perplexity on C4 is published.
Deviation: the matrix itself is trained, where the paper also has an adapter beside a frozen one;
the gradient is projected on one side, as GaLore's code does, where the paper writes two;
weight decay shortens the rows; a length that would become negative turns its row, and counts from
there as positive.
Refused: a matrix with a row of zeros, which has no direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crnet.optimizers._subspace import SubspaceMethod, SubspaceOptions
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class GradNormLorpOptions(SubspaceOptions):
    """GradNormLoRP."""

    refresh_every: int = 250
    """Steps between two projections of a matrix."""
    scale: float = 0.25
    """The step of the directions is multiplied with it."""


class GradNormLorp(SubspaceMethod):
    name = "gradnorm-lorp"
    summary = "GaLore on the directions of a matrix's rows, Adam on their lengths"
    Options = GradNormLorpOptions
    examples = (
        GradNormLorpOptions(rank=4, refresh_every=3),
        GradNormLorpOptions(rank=3, refresh_every=40, stagger=True),
    )

    def state_bytes(self, spec: TensorSpec, options: Any, item_bytes: int) -> int:
        is_matrix = spec.role == "matrix"  # moments of the lengths, norms of v
        rows = 3 * spec.shape[0] * max(4, item_bytes) if is_matrix else 0
        return super().state_bytes(spec, options, item_bytes) + rows

    def build(self, parameters, options: GradNormLorpOptions, settings) -> Any:
        from crnet.optimizers.gradnorm_lorp.module import NormalisedAdam

        return NormalisedAdam(parameters, options, settings)


METHODS = [GradNormLorp()]
