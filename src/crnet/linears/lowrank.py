"""Plain low rank: every map is W = A B, in every block, without a carry."""

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


class LowRank(Parameterization):
    name = "lowrank"
    summary = "W = A B in every block"
    Options = LowRankOptions
    examples = (LowRankOptions(init="spectral"),)
    pads = True
    published_ranks = TABLE_RANKS

    def problems(self, options, slots):
        return above_zero(self.name, lr_factor=options.lr_factor)

    def tensors(self, slot, options):
        return factors(slot, options.init, options.lr_factor)

    def work(self, slot, options, rows, item_bytes):
        return factors_work(slot, rows, item_bytes)

    def split(self, slot, options):
        return Split("bottleneck")

    def initial_value(self, name, slot, options, generator):
        from crnet.linears._maps import spectral_factor

        sizes = (slot.in_size, slot.rank, slot.out_size)
        return spectral_factor(name, *sizes, slot.init_std, generator("dense"))

    def make(self, slot, options):
        from crnet.linears._maps import LowRankMap

        return LowRankMap(self.tensors(slot, options))


METHODS = [LowRank()]
