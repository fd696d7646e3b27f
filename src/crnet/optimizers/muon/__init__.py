"""Muon: momentum whose singular values are brought near 1, for matrices; AdamW for the rest.

Source: Jordan et al. 2024, and Liu et al. 2025 (arXiv:2502.16982) for the share of the rate that
suits AdamW too; torch's own of both. Cost: ``ns_steps`` times three products of the matrix's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from crnet.optimizers import OptimizerMethod
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class MuonOptions:
    """Muon."""

    matrices: Literal["all", "dense"] = "all"
    """all: dense matrices and low-rank factors; dense: dense matrices alone, AdamW for factors."""
    momentum: float = 0.95
    """Decay of the momentum."""
    nesterov: bool = True
    """Nesterov's momentum."""
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Rate of a matrix of m rows and n columns. match_rms_adamw: the base rate times
    0.2 sqrt(max(m, n)), a step as large as AdamW's; original: times sqrt(max(1, m / n)), for a base
    rate near 0.02."""
    adam_lr_factor: float = 1.0
    """Rate of what AdamW trains over the base rate."""

    def takes(self, spec: TensorSpec) -> bool:
        """Whether Muon trains the tensor."""
        factors = ("factor_in", "factor_out") if self.matrices == "all" else ()
        return spec.role in ("matrix", *factors) and len(spec.shape) == 2


class Muon(OptimizerMethod):
    name = "muon"
    summary = "orthogonalised momentum for matrices, AdamW for the rest"
    Options = MuonOptions
    examples = (
        MuonOptions(matrices="dense"),
        MuonOptions(adam_lr_factor=0.5, adjust_lr_fn="original"),
    )

    def problems(self, options: MuonOptions) -> list[str]:
        found = []
        if not 0 <= options.momentum < 1:
            found.append(f"--optimizer.muon.momentum is {options.momentum}; it must lie in [0, 1)")
        if options.nesterov and options.momentum == 0:
            found.append("--optimizer.muon.nesterov has no effect without momentum; say false")
        if not 1 <= options.ns_steps < 100:
            found.append(f"--optimizer.muon.ns-steps is {options.ns_steps}; take 1 to 99")
        if not options.adam_lr_factor > 0:
            found.append(
                f"--optimizer.muon.adam-lr-factor is {options.adam_lr_factor}; "
                "it must be above zero"
            )
        return found

    def state_bytes(self, spec: TensorSpec, options: MuonOptions, item_bytes: int) -> int:
        if options.takes(spec):
            return spec.num_items * item_bytes
        return 2 * spec.num_items * item_bytes + 4  # AdamW's two moments and step counter

    def whole(self, spec: TensorSpec, options: MuonOptions) -> bool:
        return options.takes(spec)

    def build(self, parameters, options: MuonOptions, settings) -> Any:
        from crnet.optimizers.muon.module import MuonAndAdamW

        return MuonAndAdamW(parameters, options, settings)


METHODS = [Muon()]
