"""Plain low rank: every map is a product of two factors, in every block, without a carry.

``y = (x A) B``. Every ``refactor_every`` steps, where that is asked for, the factors are balanced:
``A B = U S V^T``, ``A <- U S^(1/2)``, ``B <- S^(1/2) V^T``, and the optimizer begins anew on both.
The function stays; ``A^T A = B B^T``.

Source: the baseline of GaLore (arXiv:2403.03507), whose ranks these are, and of those after it;
refactorisation with a reset of the momentum: arXiv:2505.22922.

Deviation: the optimizer's count of steps on a factor begins anew too: with moments of zero and a
count of thousands, Adam's first step would be three times as long. The rate is ours: a quarter of
the base rate, as for CR-Net's factors.

Unverified: the baseline's initial values and rate (its published figure at 1B, 142.53, looks like a
run that diverged); how often to refactor, which the paper's own repository does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crnet.linears import Parameterization
from crnet.linears._declarations import TABLE_RANKS, above_zero, factors, factors_work
from crnet.specs import Split


@dataclass(frozen=True, kw_only=True)
class LowRankOptions:
    """Plain low rank."""

    init: Literal["balanced", "spectral"] = "balanced"
    """balanced: equal Gaussian factors; spectral: truncated SVD of a dense initial matrix. (B at 0
    is no choice here: with every map of a block at zero no gradient passes.)"""
    lr_factor: float = 0.25
    """Learning rate of the factors over the base rate."""
    refactor_every: int | None = None
    """Steps between two balancings of the factors; none: never."""


class LowRank(Parameterization):
    name = "lowrank"
    summary = "W = A B in every block"
    Options = LowRankOptions
    examples = (LowRankOptions(init="spectral"), LowRankOptions(refactor_every=3))
    pads = True
    published_ranks = TABLE_RANKS

    def problems(self, options, slots):
        clock = {} if options.refactor_every is None else {"refactor_every": options.refactor_every}
        return above_zero(self.name, lr_factor=options.lr_factor, **clock)

    def tensors(self, slot, options):
        return factors(slot, options.init, options.lr_factor)

    def work(self, slot, options, rows, item_bytes):
        return factors_work(slot, rows, item_bytes)

    def split(self, slot, options):
        if options.refactor_every:
            return "its refactorisations want whole factors"
        return Split("bottleneck")

    def events(self, step, options):
        every = options.refactor_every
        return ("refactor",) if every and step and step % every == 0 else ()

    def has_events(self, options):
        return options.refactor_every is not None

    def initial_value(self, name, slot, options, generator):
        from crnet.linears._maps import spectral_factor

        sizes = (slot.in_size, slot.rank, slot.out_size)
        return spectral_factor(name, *sizes, slot.init_std, generator("dense"))

    def make(self, slot, options):
        from crnet.linears._maps import LowRankMap

        return LowRankMap(self.tensors(slot, options))


METHODS = [LowRank()]
