"""NorMuon: Muon whose step has one size in every output of a map; AdamW for the rest.

For matrices, M the momentum: ``O`` is M with singular values brought near 1 by Newton-Schulz
iterations; ``v``, one number for each output (a neuron), is the average of the mean squares of that
output's items of O; ``N = O / (sqrt(v) + eps)``. The step is ``N`` times
``0.2 lr sqrt(m n) / |N|``, as large as AdamW's.

Source: Li et al. 2025 (arXiv:2510.05491), algorithm 1. ``released``: as the authors' code has it,
with Nesterov's momentum, and ``N`` brought back to the norm of O times ``sqrt(max(1, m / n))``, for
a base rate near 0.02. The iteration's coefficients are Jordan's (2024).
Deviation: on a CPU the iterations are in fp32, not bf16, and five of them on a matrix that is not
near a square go through its Gram matrix: the same polynomial in fewer FLOPs.
Cost: Muon's, or 4 k^2 l + 34 k^3 FLOPs through the Gram matrix (k the smaller side, l the larger),
and three passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from crnet.optimizers import OptimizerMethod
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class NorMuonOptions:
    """NorMuon."""

    matrices: Literal["all", "dense"] = "all"
    """all: dense matrices and low-rank factors; dense: dense matrices alone, AdamW for factors."""
    momentum: float = 0.95
    """Decay of the momentum."""
    beta2: float = 0.95
    """Decay of the mean squares of the outputs."""
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    released: bool = False
    """Nesterov's momentum and the rate of the released code, not the paper's."""

    def takes(self, spec: TensorSpec) -> bool:
        """Whether NorMuon trains the tensor."""
        factors = ("factor_in", "factor_out") if self.matrices == "all" else ()
        return spec.role in ("matrix", *factors) and len(spec.shape) == 2


class NorMuon(OptimizerMethod):
    name = "normuon"
    summary = "orthogonalised momentum, each output's step of one size, AdamW for the rest"
    Options = NorMuonOptions
    examples = (NorMuonOptions(matrices="dense"), NorMuonOptions(released=True, beta2=0.9))

    def problems(self, options: NorMuonOptions) -> list[str]:
        found = [
            f"--optimizer.normuon.{name} is {getattr(options, name)}; it must lie in [0, 1)"
            for name in ("momentum", "beta2")
            if not 0 <= getattr(options, name) < 1
        ]
        if not 1 <= options.ns_steps < 100:
            found.append(f"--optimizer.normuon.ns-steps is {options.ns_steps}; take 1 to 99")
        return found

    def state_bytes(self, spec: TensorSpec, options: NorMuonOptions, item_bytes: int) -> int:
        if options.takes(spec):  # the momentum, and a number for each output
            outputs = spec.shape[0 if spec.role == "matrix" else 1]
            return (spec.num_items + outputs) * item_bytes
        return 2 * spec.num_items * item_bytes + 4  # AdamW's two moments and step counter

    def whole(self, spec: TensorSpec, options: NorMuonOptions) -> bool:
        return options.takes(spec)

    def build(self, parameters, options: NorMuonOptions, settings) -> Any:
        from crnet.optimizers.normuon.module import NorMuonAndAdamW

        return NorMuonAndAdamW(parameters, options, settings)


METHODS = [NorMuon()]
