"""FOSL: a pair of factors with SiLU between them, plus a few dense outputs that the other outputs
copy.

``y = alpha s silu(x A) B + beta [u ; u[M]]``, ``u = (x W_b) c``, ``beta = 1 - alpha``, ``s`` LoRA's
scale over the rank. W_b gives the first outputs; the others, a share ``fold_frac`` of all, are
copies of these, M being random permutations of them behind each other. An output that is used n
times in all is scaled by ``c = n^(-1/2)``, wherever it stands.

Source: the code of Foldable Sparse-and-Low-Rank Pretraining at 0193aa3 and its README (no paper was
read). Re-implemented from its formulas.
Deviation: alpha and s are fixed, as the README's equation has them; the scripts train both (alpha
as a sigmoid, s as the tanh of a number that starts at 1). The code's LOST-like initial values are
left out: without a trained matrix to begin with it does not use them.
Unverified: weight decay; rates are those of the scripts (0.01 at 60M, 0.005 at 130M), for its
trained mix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from crnet.linears import Parameterization
from crnet.linears._declarations import (
    TABLE_RANKS,
    above_zero,
    activated_work,
    factor_backward,
    factor_products,
    pair,
    share,
)
from crnet.specs import OWN, Product, Slot, TensorSpec, Work, constant, in_each_way, uniform


@dataclass(frozen=True, kw_only=True)
class FOSLOptions:
    """FOSL."""

    alpha: float = 0.7
    """Share of the factors in the output; the copied outputs have the rest."""
    lora_alpha: float = 32.0
    """The factors' product is scaled by this over the rank (scripts: 32, 16 for 60M, 130M)."""
    fold_frac: float = 0.9
    """Share of the outputs that are copies."""


class FOSL(Parameterization):
    name = "fosl"
    summary = "factors with SiLU plus a few dense outputs that the others copy"
    Options = FOSLOptions
    examples = (FOSLOptions(alpha=0.4, fold_frac=0.3),)
    published_ranks = TABLE_RANKS

    def problems(self, options: FOSLOptions, slots: Sequence[Slot]) -> list[str]:
        found = above_zero(self.name, lora_alpha=options.lora_alpha)
        for name, value in (("alpha", options.alpha), ("fold-frac", options.fold_frac)):
            if not 0 < value < 1:
                found.append(
                    f"--model.fosl.{name} is {value}; it is a share and must lie in (0, 1)"
                )
        return found

    def tensors(self, slot: Slot, options: FOSLOptions) -> dict[str, TensorSpec]:
        """``base``: W_b, as a dense matrix is stored; ``index``: which of its outputs each output
        is; ``scale``: c. A and W_b are Kaiming-uniform with slope sqrt(5), B zero."""
        bound, width = uniform(slot.in_size**-0.5), base_width(slot, options)
        uses, rest = divmod(slot.out_size, width)
        return pair(slot, bound, constant(0.0)) | {
            "base": TensorSpec((width, slot.in_size), "matrix", bound),
            "scale": TensorSpec(
                (width,),
                "gain",
                OWN if rest else constant(uses**-0.5),
                trained=False,
                dtype="float32",
                decays=False,
            ),
            "index": TensorSpec((slot.out_size,), "index", OWN, trained=False, dtype="int32"),
        }

    def work(self, slot: Slot, options: FOSLOptions, rows: int, item_bytes: int) -> Work:
        work, width = activated_work(slot, rows, item_bytes), base_width(slot, options)
        items, narrow = width * slot.in_size, rows * width * item_bytes
        wide = rows * slot.out_size * item_bytes
        down, up = factor_products(slot, rows)
        scaling = in_each_way(2 * narrow + 4 * width, 1)
        copying = in_each_way(2 * wide + 4 * slot.out_size, 1)
        # The first outputs are copied, the others added to them, one permutation after the other.
        num_others = -(-slot.out_size // width) - 1
        others = slot.out_size - width
        adding = in_each_way(
            2 * narrow + 3 * rows * others * item_bytes + (4 + 8 + 8) * others, 2 + num_others
        )
        return dataclasses.replace(
            work,
            forward_flops=work.forward_flops + 2 * rows * items,
            backward_flops=work.backward_flops + 4 * rows * items,
            weight_items=work.weight_items + items,
            bottleneck_bytes=work.bottleneck_bytes + narrow,
            transient_bytes=work.transient_bytes + narrow,
            products=(
                down,
                Product(rows, slot.in_size, width),
                dataclasses.replace(up, accumulates=True),
            ),
            backward_products=(
                *factor_backward(slot, rows),
                Product(width, rows, slot.in_size),
                Product(rows, width, slot.in_size, accumulates=True),
            ),
            passes=work.passes + scaling + copying,
            backward_passes=work.backward_passes + scaling + adding,
        )

    def split(self, slot: Slot, options: FOSLOptions) -> str:
        return "its outputs copy each other across the whole width"

    def initial_value(self, name, slot, options, generator):
        import torch

        width, draw = base_width(slot, options), generator("copies")
        first = torch.arange(width, dtype=torch.int32)
        num_others = -(-slot.out_size // width) - 1
        orders = [
            torch.randperm(width, dtype=torch.int32, generator=draw) for _ in range(num_others)
        ]
        index = torch.cat([first, *orders])[: slot.out_size]
        return index if name == "index" else index.bincount(minlength=width).float().rsqrt()

    def make(self, slot: Slot, options: FOSLOptions):
        from crnet.linears.fosl.module import FOSLMap

        scale = options.alpha * options.lora_alpha / slot.rank
        return FOSLMap(self.tensors(slot, options), scale, 1 - options.alpha)


def base_width(slot: Slot, options: FOSLOptions) -> int:
    """Outputs that are computed."""
    return slot.out_size - share(options.fold_frac, slot.out_size)


METHODS = [FOSL()]
