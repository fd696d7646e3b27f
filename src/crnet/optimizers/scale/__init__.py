"""SCALE: plain descent along gradients whose columns have one length; momentum in the head.

A map with d inputs, as a matrix (d, out): ``C(G)`` has the columns of the gradient G, one for each
output, divided by their norms. The step is ``lr C(G)``. Of the last layer, the head, G is replaced
by ``M <- beta M + (1 - beta) G``. All other maps, factors and the embedding have no state. Norms,
biases, gains and routers: AdamW, as in the released code.

Source: Glentis et al. 2025 (arXiv:2506.16659), algorithm 1. ``released``: the authors' code, whose
columns have norm ``sqrt(d)``: the root of their mean square is 1, a step as large as Adam's; the
code's rate of 1e-3 (1B: 2e-4) is a rate of that step.
Deviation: a column without gradient stays where it is; the paper divides by its norm of 0.
Cost: two passes over a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crnet.optimizers import OptimizerMethod
from crnet.specs import TensorSpec

NORMALISED = ("matrix", "factor_in", "factor_out", "embedding", "head")


@dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    """SCALE."""

    momentum: float = 0.9
    """Decay of the head's momentum."""
    released: bool = False
    """Columns whose items have a mean square of 1, as in the released code; else norm 1, as in the
    paper."""
    tied: bool = False
    """The embedding is the head too: it has the head's momentum, and a norm for each token."""

    def takes(self, spec: TensorSpec) -> bool:
        """Whether columns of the tensor are normalised."""
        return spec.role in NORMALISED and len(spec.shape) == 2

    def has_momentum(self, spec: TensorSpec) -> bool:
        """Whether the tensor is the last layer."""
        return spec.role == "head" or (self.tied and spec.role == "embedding")


class Scale(OptimizerMethod):
    name = "scale"
    summary = "gradients with columns of one length, momentum in the head alone"
    Options = ScaleOptions
    examples = (ScaleOptions(released=True, momentum=0.5), ScaleOptions(tied=True))

    def problems(self, options: ScaleOptions) -> list[str]:
        if not 0 < options.momentum < 1:
            return [f"--optimizer.scale.momentum is {options.momentum}; it must lie in (0, 1)"]
        return []

    def state_bytes(self, spec: TensorSpec, options: ScaleOptions, item_bytes: int) -> int:
        if options.takes(spec):
            return spec.num_items * item_bytes if options.has_momentum(spec) else 0
        return 2 * spec.num_items * item_bytes + 4  # AdamW's two moments and step counter

    def whole(self, spec: TensorSpec, options: ScaleOptions) -> bool:
        return options.takes(spec)

    def build(self, parameters, options: ScaleOptions, settings) -> Any:
        from crnet.optimizers.scale.module import ScaleAndAdamW

        return ScaleAndAdamW(parameters, options, settings)


METHODS = [Scale()]
