"""GoLore: GaLore that projects onto random directions in the last part of a run.

Late in a run a gradient is mostly noise, and its largest singular vectors are those of the noise:
GaLore need not converge, random directions do. As GaLore for the first ``svd_frac`` of the steps;
then P is uniform among the orthonormal ones, drawn anew at every refresh. At each refresh the first
moment moves into the new subspace, ``M <- M P_old P_new^T``, and the second stays. The step is
``scale`` times Adam's direction of the projected gradient (Adam as in GaLore).

Source: He et al. 2024 (arXiv:2410.11289) and the released code: rate 0.001, rank 128, scale 1, 0.8
of 10,000 steps at 60M.
Released: with ``--optimizer.golore.moments released`` the moved first moment is used in the step of
the refresh and then lost, as there: the next step has the one from before.
Deviation: random projections are seeded by (run's seed, parameter's name, step); in a run of
another number of steps they begin elsewhere. The largest singular vectors as in GaLore.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from crnet.optimizers._subspace import SubspaceMethod, SubspaceOptions


@dataclass(frozen=True, kw_only=True)
class GoloreOptions(SubspaceOptions):
    """GoLore."""

    scale: float = 1.0
    """The step of a projected matrix is multiplied with it."""
    svd_frac: float = 0.8
    """Share of the run's steps whose projections are singular vectors; 0: all are random."""
    moments: Literal["paper", "released"] = "paper"
    """paper: the first moment moves into the new subspace; released: what moved is lost after one
    step."""


class Golore(SubspaceMethod):
    name = "golore"
    summary = "GaLore, with random projections in the last part of a run"
    Options = GoloreOptions
    examples = (
        GoloreOptions(rank=4, refresh_every=3, svd_frac=0.05),
        GoloreOptions(rank=3, refresh_every=2, svd_frac=0.0, moments="released"),
    )

    def problems(self, options: GoloreOptions) -> list[str]:
        found = super().problems(options)
        if not 0 <= options.svd_frac <= 1:
            flag = f"--optimizer.{self.name}.svd-frac"
            found.append(f"{flag} is {options.svd_frac}; it must lie in [0, 1]")
        return found

    def build(self, parameters, options: GoloreOptions, settings) -> Any:
        from crnet.optimizers.golore.module import GoloreAdam

        return GoloreAdam(parameters, options, settings)


METHODS = [Golore()]
