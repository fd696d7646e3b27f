"""APOLLO: the gradient itself, scaled by how Adam would scale a random projection of it.

``R`` is the gradient G (m, n) of a dense matrix, projected to rank r along its smaller side; Adam's
moments are those of R. ``s = |u| / |R|`` with Adam's direction u, one number for each index of the
larger side (APOLLO) or one a matrix (APOLLO-Mini, rank 1); the step is ``s G sqrt(scale)``, and the
growth of its norm from step to step is limited. Factors, embedding, head and norms: AdamW.

Adam here is that of the GaLore family: ``u = M / (sqrt(S) + eps)``, the bias corrected by the rate,
``lr sqrt(1 - beta2^t) / (1 - beta1^t)``; weight decay after the step.

Source: Zhu et al. 2024 (arXiv:2412.05270) and the released code; its eps is 1e-6 and its rate 0.01.
Deviation: a projection is seeded by (run's seed, parameter's name, refresh), where the released
code counts parameters, so that another order of them is another run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from crnet.optimizers import OptimizerMethod
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class ApolloOptions:
    """APOLLO."""

    rank: int = 128
    """Rank of the projected gradient (a quarter of the width in the published runs)."""
    scale: float = 1.0
    """The step is multiplied with its square root."""
    refresh_every: int = 200
    """Steps between two projections."""
    growth_limit: float = 1.01
    """Most that the norm of a matrix's step may grow from one step to the next; 0: no limit."""
    scale_front: bool = False
    """Multiply with scale before the limit, not after it."""
    projection: Literal["drawn", "kept"] = "drawn"
    """drawn: anew at every step, which costs no memory; kept: until the next one, which costs no
    time. The numbers are the same."""


@dataclass(frozen=True, kw_only=True)
class ApolloMiniOptions(ApolloOptions):
    """APOLLO-Mini."""

    rank: int = 1
    """Rank of the projected gradient."""
    scale: float = 128.0
    """The step is multiplied with its square root."""


class Apollo(OptimizerMethod):
    name = "apollo"
    summary = "the gradient, each channel scaled as Adam scales a projection of it"
    Options: type | None = ApolloOptions
    examples: tuple[Any, ...] = (
        ApolloOptions(rank=4, projection="kept", refresh_every=2),
        ApolloOptions(rank=3, scale=4.0, scale_front=True),
        ApolloOptions(rank=4, growth_limit=0.0),
    )
    per_channel = True
    """One scale for each index of the larger side; else one a matrix."""

    def problems(self, options: ApolloOptions) -> list[str]:
        flag, found = f"--optimizer.{self.name}", []
        for name in ("rank", "refresh_every"):
            if getattr(options, name) < 1:
                word = name.replace("_", "-")
                found.append(f"{flag}.{word} is {getattr(options, name)}; take 1 or more")
        if not options.scale > 0:
            found.append(f"{flag}.scale is {options.scale}; it must be above zero")
        if options.growth_limit != 0 and not options.growth_limit >= 1:
            found.append(
                f"{flag}.growth-limit is {options.growth_limit}; take 1 or more, or 0 for none"
            )
        if options.scale_front and not options.growth_limit:
            found.append(f"{flag}.scale-front has no effect without {flag}.growth-limit")
        return found

    def state_bytes(self, spec: TensorSpec, options: ApolloOptions, item_bytes: int) -> int:
        if spec.role != "matrix":
            return 2 * spec.num_items * item_bytes
        items = 2 * options.rank * max(spec.shape)
        items += options.rank * min(spec.shape) if options.projection == "kept" else 0
        return items * item_bytes + (max(4, item_bytes) if options.growth_limit else 0)  # last norm

    def whole(self, spec: TensorSpec, options: ApolloOptions) -> bool:
        return spec.role == "matrix"

    def build(self, parameters, options: ApolloOptions, settings) -> Any:
        from crnet.optimizers.apollo.module import ProjectedAdam

        return ProjectedAdam(parameters, options, settings, self.per_channel)


class ApolloMini(Apollo):
    name = "apollo-mini"
    summary = "the gradient, each matrix scaled as Adam scales a projection of rank 1"
    Options = ApolloMiniOptions
    examples = (ApolloMiniOptions(projection="kept", refresh_every=2),)
    per_channel = False


METHODS = [Apollo(), ApolloMini()]
