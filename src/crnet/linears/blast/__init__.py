"""BLAST: low rank whose coupling of both factors differs from block to block of the matrix.

``y_i = U_i sum_j s_ij * (V_j^T x_j)``: the matrix is cut into b x b blocks, and block (i, j) is
``U_i diag(s_ij) V_j^T``. Blocks of a row share U_i, blocks of a column V_j. One block with s = 1 is
plain low rank; b blocks reach the rank b R with b^2 R numbers more. Here the V_j, stacked, are A
and the U_i, stacked, B: shapes, roles and rates are those of plain low rank. Blocks need not be
equally large.

Source: arXiv:2410.21262 (the structure) and its official code at a342eb3 (the products).
Deviation: initial values and rates are ours, since the code that was read compresses trained
models: s is uniform in (0, 2), so that blocks differ from the start; the factors are equal
Gaussians so that an item of the matrix has the deviation of a dense map's; factors learn at the
rate of plain low rank's, s at the base rate, being near 1 as a gain is. The code's cast of each
column of the factors to length 1 is left out.
Unverified: what the paper's runs from scratch began with; what rates its structure wants
(arXiv:2406.06248 derives some for other structures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from crnet.linears import Parameterization
from crnet.linears._declarations import TABLE_RANKS, above_zero, pair
from crnet.specs import OWN, Product, Slot, TensorSpec, Work, constant, normal


@dataclass(frozen=True, kw_only=True)
class BLASTOptions:
    """BLAST."""

    blocks: int = 4
    """Blocks along each side of a matrix (the official code: 4)."""
    coupling: Literal["uniform", "ones"] = "uniform"
    """Initial s. uniform: between 0 and 2; ones: the map begins as plain low rank (unverified)."""
    lr_factor: float = 0.25
    """Learning rate of the factors over the base rate (unverified; plain low rank's)."""
    coupling_lr_factor: float = 1.0
    """Learning rate of s over the base rate (unverified)."""


class BLAST(Parameterization):
    name = "blast"
    summary = "low rank whose coupling differs from block to block of the matrix"
    Options = BLASTOptions
    examples = (BLASTOptions(blocks=3, coupling="ones"),)
    published_ranks = TABLE_RANKS

    def problems(self, options: BLASTOptions, slots: Sequence[Slot]) -> list[str]:
        rates = {"lr_factor": options.lr_factor, "coupling_lr_factor": options.coupling_lr_factor}
        found = above_zero(self.name, **rates)
        width = min((min(slot.in_size, slot.out_size) for slot in slots), default=options.blocks)
        if not 1 <= options.blocks <= width:
            found.append(
                f"--model.blast.blocks is {options.blocks}; take 1 to {width}, the smallest width "
                "of a map"
            )
        return found

    def tensors(self, slot: Slot, options: BLASTOptions) -> dict[str, TensorSpec]:
        """``s`` (R, b, b): row by row what block (i, j) multiplies the bottleneck with."""
        is_uniform = options.coupling == "uniform"
        square = 4 / 3 if is_uniform else 1.0  # the mean of s^2
        init = normal((slot.init_std / (slot.rank * square) ** 0.5) ** 0.5)
        return pair(slot, init, init, options.lr_factor) | {
            "s": TensorSpec(
                (slot.rank, options.blocks, options.blocks),
                "gain",
                OWN if is_uniform else constant(1.0),
                lr_factor=options.coupling_lr_factor,
                decays=False,
            )
        }

    def work(self, slot: Slot, options: BLASTOptions, rows: int, item_bytes: int) -> Work:
        num, rank = options.blocks, slot.rank
        down = [Product(rows, size, rank) for size in sizes(slot.in_size, num)]
        up = [Product(rows, rank, size) for size in sizes(slot.out_size, num)]
        mix = Product(num, num, rows * rank)  # one for each row of s
        shrinking = sum(each.flops for each in down)
        products = shrinking + mix.flops + sum(each.flops for each in up)
        latent = num * rows * rank * item_bytes
        return Work(
            forward_flops=products,
            backward_flops=2 * products + mix.flops + shrinking,
            weight_items=rank * (slot.in_size + slot.out_size + num * num),
            transient_bytes=3 * latent,
            products=(*down, mix, *up),
            # The forward pass but for the output; gradients of s, of both factors, of the input.
            backward_products=(
                *down,
                mix,
                *(Product(rank, rows, each.columns) for each in up),
                *(Product(rank, each.columns, rows) for each in up),
                Product(num, rows * rank, num),
                mix,
                *(Product(each.inner, rows, rank) for each in down),
                *(Product(rows, rank, each.inner) for each in down),
            ),
        )

    def split(self, slot: Slot, options: BLASTOptions) -> str:
        return "its blocks are cut along the whole of both sides"

    def initial_value(self, name, slot, options, generator):
        import torch

        shape = (slot.rank, options.blocks, options.blocks)
        return 2 * torch.rand(shape, generator=generator("coupling"))

    def make(self, slot: Slot, options: BLASTOptions):
        from crnet.linears.blast.module import BLASTMap

        return BLASTMap(self.tensors(slot, options))


def sizes(width: int, num: int) -> list[int]:
    """Of blocks as even as can be, the larger ones first."""
    size, rest = divmod(width, num)
    return [size + (idx < rest) for idx in range(num)]


METHODS = [BLAST()]
