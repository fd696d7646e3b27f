"""GaLore: Adam in the subspace of the gradient's largest singular vectors.

Every ``refresh_every`` steps the top r singular vectors of a dense matrix's gradient G (m, n) on
its smaller side become its projection P. Adam's moments are those of ``R = G P^T`` (m >= n, else
``P G``), they stay over a refresh, and the step is ``scale`` times Adam's direction u, brought
back: ``W <- W - rate scale u P``. Factors, embedding, head and norms: Adam, without the scale.

``galore`` has the Adam of the released code: ``u = M / (sqrt(S) + eps)``, the bias corrected by the
rate, ``lr sqrt(1 - beta2^t) / (1 - beta1^t)``, weight decay after the step. ``galore8bit`` keeps
the moments of R, and those of factors, in 8 bits (bitsandbytes), and corrects the bias before eps.

Source: Zhao et al. 2024 (arXiv:2403.03507) and the released code: rate 0.01, eps 1e-6 (8 bits:
1e-8), beta2 0.999, no decay, scale 0.25.
Deviation: the vectors come from an eigendecomposition of the Gram matrix in fp64, nearer to the
exact ones than an SVD in fp32 and faster; their signs are fixed. ``--optimizer.NAME.stagger`` is
ours: the paper refreshes all matrices at once. ``galore8bit``: embedding and head keep moments of
their own dtype, as bitsandbytes advises, where the released code takes 8 bits for them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crnet.optimizers._eight_bits import MIN_ITEMS, blocks_bytes
from crnet.optimizers._subspace import SubspaceMethod, SubspaceOptions
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class GaloreOptions(SubspaceOptions):
    """GaLore."""

    scale: float = 0.25
    """The step of a projected matrix is multiplied with it."""


@dataclass(frozen=True, kw_only=True)
class Galore8bitOptions(GaloreOptions):
    """8-bit GaLore."""

    min_items: int = MIN_ITEMS
    """What has fewer items keeps moments of its own dtype; of a matrix, its projected gradient."""

    def moments_of(self, spec: TensorSpec) -> int:
        """Items of a tensor's moments, where they take 8 bits; else 0."""
        if spec.role == "matrix":
            count = self.rank_of(spec) * max(spec.shape)
        elif spec.role in ("factor_in", "factor_out") and len(spec.shape) == 2:
            count = spec.num_items
        else:
            return 0
        return count if count >= self.min_items else 0


class Galore(SubspaceMethod):
    name = "galore"
    summary = "Adam in the subspace of the gradient's largest singular vectors"
    Options: type | None = GaloreOptions
    examples: tuple[Any, ...] = (
        GaloreOptions(rank=4, refresh_every=3),
        GaloreOptions(rank=3, refresh_every=40, stagger=True, scale=1.0),
    )

    def build(self, parameters, options, settings) -> Any:
        from crnet.optimizers._subspace.module import SubspaceAdam

        return SubspaceAdam(parameters, options, settings)


class Galore8bit(Galore):
    name = "galore8bit"
    summary = "GaLore with moments of 8 bits (bitsandbytes)"
    Options = Galore8bitOptions
    examples = (Galore8bitOptions(rank=4, refresh_every=3, min_items=1),)
    has_codes = True

    def problems(self, options: Galore8bitOptions) -> list[str]:
        found = super().problems(options)
        if options.min_items < 1:
            found.append(
                f"--optimizer.{self.name}.min-items is {options.min_items}; take 1 or more"
            )
        return found

    def state_bytes(self, spec: TensorSpec, options: Galore8bitOptions, item_bytes: int) -> int:
        if not (count := options.moments_of(spec)):
            return super().state_bytes(spec, options, item_bytes)
        projection = options.rank_of(spec) * min(spec.shape) if spec.role == "matrix" else 0
        return blocks_bytes(count) + projection * item_bytes

    def whole(self, spec: TensorSpec, options: Galore8bitOptions) -> bool:
        return spec.role == "matrix" or options.moments_of(spec) > 0

    def build(self, parameters, options: Galore8bitOptions, settings) -> Any:
        from crnet.optimizers.galore.module import Galore8bitAdam

        return Galore8bitAdam(parameters, options, settings, self.name)


METHODS = [Galore(), Galore8bit()]
