"""CR-Net: from the second block on, a map adds a low-rank increment to its output one block below.

``Y_l = gain Y_{l-1} + (X_l A) B``, ``gain = sign(beta) (|beta| + eps)`` (arXiv:2509.18993, eq. 6).
The first block is full rank (table 6 measures the cost of making it low rank too).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crnet.linears import Group, Slot


@dataclass(frozen=True, kw_only=True)
class CRNetOptions:
    """CR-Net."""

    first_rank: int | None = None
    """Rank of the first block's maps; none: full rank, as the paper has it (table 6)."""
    beta_init: float = 1.0
    """Initial beta: how much of the block below a map starts with."""
    learnable_beta: bool = True
    """Train beta; otherwise it stays at its initial value."""
    init: Literal["balanced", "zero-b", "spectral"] = "balanced"
    """Initial factors. balanced: equal Gaussians; zero-b: B at 0; spectral: truncated SVD."""
    carry_dtype: Literal["compute", "fp32"] = "compute"
    """Dtype of the outputs that travel from block to block; fp32 differs in bf16 runs."""
    lr_factor: float = 0.25
    """Learning rate of the factors over the base rate (appendix E.2.1)."""
    beta_lr_factor: float = 1.0
    """Learning rate of beta over the base rate."""


class CRNet:
    name = "crnet"
    summary = "output of the block below plus a low-rank increment (eq. 6)"
    carry = "below"
    first_ranked_layer_idx = 1
    published_ranks = {  # table 10; llama3-1b: appendix E.3; 70B: r = 0.25 h, appendix G
        "aligned-parameters": {
            (512, 8): "96x3,112x4",
            (768, 12): "192x3,224x8",
            (1024, 24): "224x15,256x8",
            (2048, 24): "448",
            (2048, 32): "448",
            (4096, 32): "896",
            (5120, 40): "1260",
            (8192, 80): "2048",
        },
        "aligned-memory": {
            (512, 8): "96x3,112x4",
            (768, 12): "192x3,256x8",
            (1024, 24): "384",
            (2048, 24): "768",
        },
    }

    def rank_below(self, options: CRNetOptions) -> int:
        return options.first_rank or 0

    def problems(self, options: CRNetOptions) -> list[str]:
        found = []
        if options.first_rank is not None and options.first_rank < 1:
            found.append(
                f"--model.crnet.first-rank is {options.first_rank}; take 1 or more, "
                "or leave it out for a full-rank first block"
            )
        for key in ("lr_factor", "beta_lr_factor"):
            if getattr(options, key) <= 0:
                flag = f"--model.crnet.{key.replace('_', '-')}"
                found.append(f"{flag} is {getattr(options, key)}; it must be above zero")
        if not options.learnable_beta and options.beta_init == 0:
            found.append(
                "--model.crnet.beta-init 0 with a fixed beta is plain low rank; "
                "say --model.linear lowrank, or take another beta"
            )
        return found

    def shapes(self, slot: Slot) -> dict[str, tuple[int, ...]]:
        if not slot.rank:
            return {"weight": (slot.out_size, slot.in_size)}
        factors = {"A": (slot.in_size, slot.rank), "B": (slot.rank, slot.out_size)}
        return factors | ({"beta": (1,)} if slot.layer_idx else {})

    def matrix_items(self, slot: Slot) -> int:
        if not slot.rank:
            return slot.in_size * slot.out_size
        return slot.rank * (slot.in_size + slot.out_size)

    def bottleneck(self, slot: Slot) -> int:
        return slot.rank

    def carry_bytes(self, options: CRNetOptions, compute_bytes: int) -> int:
        return 4 if options.carry_dtype == "fp32" else compute_bytes

    def initial_gain(self, options: CRNetOptions) -> float:
        return options.beta_init

    def groups(self, slot: Slot, options: CRNetOptions) -> dict[str, Group]:
        if not slot.rank:
            return {"weight": Group()}
        factors = {name: Group(lr_factor=options.lr_factor) for name in ("A", "B")}
        beta = {"beta": Group(lr_factor=options.beta_lr_factor, decays=False)}
        return factors | (beta if slot.layer_idx and options.learnable_beta else {})

    def make(self, slot: Slot, options: CRNetOptions, init_std: float):
        from crnet.linears.crnet.module import CRNetLinear
        from crnet.linears.full.module import FullLinear
        from crnet.linears.lowrank.module import LowRankLinear

        if not slot.rank:
            return FullLinear(slot, init_std)
        if slot.layer_idx == 0:
            return LowRankLinear(slot, options.init, init_std)
        return CRNetLinear(slot, options, init_std)


METHODS = [CRNet()]
