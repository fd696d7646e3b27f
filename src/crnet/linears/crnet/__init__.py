"""CR-Net: from the second block on, a map adds a low-rank increment to its output one block below.

``Y_l = gain Y_{l-1} + (X_l A) B``, ``gain = sign(beta) (|beta| + eps)`` (arXiv:2509.18993, eq. 6).
The first block is full rank (table 6 measures the cost of making it low rank too).

ResFormer, the rival in the paper's own ablation (figure 6), reads the output of the first block
instead of the block below.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from crnet.linears import Parameterization
from crnet.linears._declarations import (
    above_zero,
    dense,
    dense_work,
    factor_products,
    factors,
    factors_work,
    inner_passes,
)
from crnet.specs import Passes, Read, Slot, Split, TensorSpec, Traffic, Work, constant


@dataclass(frozen=True, kw_only=True)
class CRNetOptions:
    """CR-Net."""

    first_rank: int | None = None
    """Rank of the first block's maps; none: full rank, as the paper has it (table 6)."""
    restarts: str | None = None
    """Blocks, from 1, that read nothing of the one below and are as the first is: 9,17. The stage
    of a pipeline that begins there gets the stream alone; none: no block but the first."""
    beta_init: float = 1.0
    """Initial beta: how much of the earlier block a map starts with."""
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


@dataclass(frozen=True, kw_only=True)
class ResFormerOptions(CRNetOptions):
    """ResFormer."""


class CRNet(Parameterization):
    name = "crnet"
    summary = "output of the block below plus a low-rank increment (eq. 6)"
    Options: type | None = CRNetOptions
    pads = True
    source: Literal["below", "first"] = "below"
    examples: tuple = (
        CRNetOptions(first_rank=3, carry_dtype="fp32"),
        CRNetOptions(learnable_beta=False, beta_init=0.5, init="spectral"),
        CRNetOptions(init="zero-b", restarts="3"),
    )
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

    def fixed_rank(self, layer_idx: int, options: CRNetOptions) -> int | None:
        return options.first_rank or 0 if _begins(layer_idx, options) else None

    def problems(self, options: CRNetOptions, slots) -> list[str]:
        rates = {"lr_factor": options.lr_factor, "beta_lr_factor": options.beta_lr_factor}
        found = above_zero(self.name, **rates)
        if options.first_rank is not None and options.first_rank < 1:
            found.append(
                f"--model.{self.name}.first-rank is {options.first_rank}; take 1 or more, "
                "or leave it out for a full-rank first block"
            )
        if options.first_rank is not None and options.init == "zero-b":
            found.append(
                f"--model.{self.name}.init zero-b with a first rank leaves every map of a block at "
                "zero, where no gradient passes; take balanced or spectral, or a full-rank first "
                "block"
            )
        num_layers = slots[0].num_layers if slots else 0
        if outside := [str(idx + 1) for idx in _restarts(options) if not 0 < idx < num_layers]:
            found.append(
                f"--model.{self.name}.restarts {options.restarts}: block {', '.join(outside)} is "
                f"not one of 2 to {num_layers}; leave it out"
            )
        if not options.learnable_beta and options.beta_init == 0:
            found.append(
                f"--model.{self.name}.beta-init 0 with a fixed beta is plain low rank; "
                "take that parameterization, or another beta"
            )
        return found

    def tensors(self, slot: Slot, options: CRNetOptions) -> dict[str, TensorSpec]:
        if not slot.rank:
            return dense(slot)
        pair = factors(slot, options.init, options.lr_factor)
        if _begins(slot.layer_idx, options):
            return pair
        beta = TensorSpec(
            (1,),
            "gain",
            constant(options.beta_init),
            trained=options.learnable_beta,
            dtype="float32",
            lr_factor=options.beta_lr_factor,
            decays=False,
        )
        return pair | {"beta": beta}

    def work(self, slot: Slot, options: CRNetOptions, rows: int, item_bytes: int) -> Work:
        if not slot.rank:
            return dense_work(slot, rows)
        if _begins(slot.layer_idx, options):
            return factors_work(slot, rows, item_bytes)
        carried = self.output_bytes(slot, options, item_bytes)
        work = factors_work(slot, rows, item_bytes, gain_bytes=4)
        return dataclasses.replace(work, **_carry_passes(slot, rows, item_bytes, carried))

    def reads(self, slot: Slot, options: CRNetOptions) -> Read | None:
        if _begins(slot.layer_idx, options):
            return None
        return Read(
            self.source,
            slot.out_size,
            item_bytes=4 if options.carry_dtype == "fp32" else None,
            inverts=self.source == "below",
            initial_gain=options.beta_init,
        )

    def split(self, slot: Slot, options: CRNetOptions) -> Split:
        """The carry of a map is split as its output is: it never crosses."""
        if not slot.rank:
            return Split("edge")
        return Split("bottleneck", ("beta",) if slot.layer_idx else ())

    def output_bytes(self, slot: Slot, options: CRNetOptions, item_bytes: int) -> int:
        wide = options.carry_dtype == "fp32" and not _begins(slot.layer_idx, options)
        return 4 if wide else item_bytes

    def initial_value(self, name, slot, options, generator):
        from crnet.linears._maps import spectral_factor

        sizes = (slot.in_size, slot.rank, slot.out_size)
        return spectral_factor(name, *sizes, slot.init_std, generator("dense"))

    def make(self, slot: Slot, options: CRNetOptions):
        from crnet.linears._maps import DenseMap, LowRankMap
        from crnet.linears.crnet.module import CRNetMap

        tensors = self.tensors(slot, options)
        if not slot.rank:
            return DenseMap(tensors)
        if _begins(slot.layer_idx, options):
            return LowRankMap(tensors)
        return CRNetMap(tensors, options.carry_dtype)


def _restarts(options: CRNetOptions) -> list[int]:
    """Blocks, from 0. Raises ``ValueError`` where they cannot be read."""
    words = [] if options.restarts is None else options.restarts.split(",")
    if not all(word.isdecimal() and word.isascii() for word in words):
        raise ValueError(
            f"--model.crnet.restarts {options.restarts!r} cannot be read; write 9 or 9,17,25"
        )
    return sorted({int(word) - 1 for word in words})


def _begins(layer_idx: int, options: CRNetOptions) -> bool:
    """Whether a block reads nothing of an earlier one."""
    return not layer_idx or layer_idx in _restarts(options)


def _carry_passes(slot: Slot, rows: int, item_bytes: int, carried: int) -> dict[str, Any]:
    """What the carry adds to a low-rank map: ``carried`` are the bytes of its items.

    Fused, the product's accumulator starts from gain * carry, and the backward pass reads the
    gradient above and Y where the local gradient is made: no dcarry, no sum.
    """
    items = rows * slot.out_size
    size, narrow = items * carried, items * item_bytes
    shrink, product = factor_products(slot, rows)
    gain = Traffic(0, 3)  # three operations on one number
    if same := carried == item_bytes:
        product = dataclasses.replace(product, accumulates=True)
        forward = Traffic(2 * size, 1)
    else:  # the product in the compute dtype, then added
        forward = Traffic(2 * size, 1) + Traffic(narrow + 2 * size, 1)
    cast = Traffic(0 if same else size + narrow, 0 if same else 1)
    backward = Traffic(2 * size, 1) + inner_passes(items, carried) + cast
    return {
        "products": (shrink, product),
        # Inductor's addmm copies what it adds to first.
        "passes": Passes(
            gain + forward, Traffic((4 if same else 2) * size + narrow, 2), Traffic(0, 0)
        ),
        "backward_passes": Passes(
            backward, Traffic(3 * size + cast.moved_bytes, 2), Traffic(2 * size, 1)
        ),
    }


class ResFormer(CRNet):
    name = "resformer"
    summary = "output of the first block plus a low-rank increment (figure 6's rival)"
    Options = ResFormerOptions
    source = "first"
    examples = (ResFormerOptions(first_rank=3, carry_dtype="fp32", learnable_beta=False),)

    def problems(self, options: CRNetOptions, slots) -> list[str]:
        found = super().problems(options, slots)
        if options.restarts is not None:
            found.append(
                f"--model.{self.name}.restarts: every block reads the first, wherever it stands; "
                "leave it out"
            )
        return found


METHODS = [CRNet(), ResFormer()]
