"""Fira: GaLore, and beside it what the projection leaves out, scaled as Adam scales the rest.

With GaLore's projection P, ``R = G P^T`` and Adam's direction u of R: every index of the larger
side has a scale ``phi = |u| / |R|``, and the step is ``scale u P + S`` with the rest of the
gradient, ``S = phi (G - R P)``. The norm of S may grow by ``growth_limit`` a step.

Source: Chen et al. 2024 (arXiv:2410.01623) and the released code: rate 0.01, scale 0.25 (1B and
more 0.0625), eps 1e-6.
Released: with ``--optimizer.fira.residual released`` the rest is ``phi (G - scale R P)``: the code
multiplies by scale inside the product that goes back, so a part of the rest lies in the subspace.
Deviation: the largest singular vectors as in GaLore; after a rest of zero the limit begins anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from crnet.optimizers._subspace import SubspaceMethod, SubspaceOptions
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class FiraOptions(SubspaceOptions):
    """Fira."""

    scale: float = 0.25
    """The step in the subspace is multiplied with it."""
    growth_limit: float = 1.01
    """Most that the norm of the rest may grow from one step to the next; 0: no limit."""
    residual: Literal["paper", "released"] = "paper"
    """What counts as the rest. paper: what the projection leaves out; released: that and
    (1 - scale) of what it does not."""


class Fira(SubspaceMethod):
    name = "fira"
    summary = "GaLore, and the rest of the gradient scaled as Adam scales its projection"
    Options = FiraOptions
    examples = (
        FiraOptions(rank=4, refresh_every=3),
        FiraOptions(rank=3, refresh_every=40, stagger=True, residual="released"),
        FiraOptions(rank=4, growth_limit=0.0),
    )

    def problems(self, options: FiraOptions) -> list[str]:
        found = super().problems(options)
        if options.growth_limit != 0 and not options.growth_limit >= 1:
            flag = f"--optimizer.{self.name}.growth-limit"
            found.append(f"{flag} is {options.growth_limit}; take 1 or more, or 0 for none")
        return found

    def state_bytes(self, spec: TensorSpec, options: FiraOptions, item_bytes: int) -> int:
        has_norm = spec.role == "matrix" and options.growth_limit  # of the last rest
        return super().state_bytes(spec, options, item_bytes) + (
            max(4, item_bytes) if has_norm else 0
        )

    def build(self, parameters, options: FiraOptions, settings) -> Any:
        from crnet.optimizers.fira.module import FiraAdam

        return FiraAdam(parameters, options, settings)


METHODS = [Fira()]
