"""SST: sparse spectral training, a decomposed matrix of which few singular vectors train at once.

``y = x V diag(s) U``: V (in, k) and U (k, out) orthonormal, k the smaller width. All singular
values s train by their gradient and stay at or above zero; r pairs of vectors (v_i, u_i), drawn
with ``p_i = (1 / k + s_i / sum(s)) / 2``, train by ``dL/dv_i := G u_i`` and
``dL/du_i := G^T v_i``, G the gradient of the matrix: the true ones without the factor s_i. After
every step they are normalised. Every ``resample_every`` steps others are drawn; once k / r samples
are through, a round, a new decomposition of the same matrix is taken.

Source: Zhao et al. 2024 (arXiv:2405.15481), secondary texts. A re-implementation: no code of it
could be read.

Deviation: the trained vectors lie in A and B, tensors of their own, so that an optimizer's state
has r (in + out) + k items a moment; each step they are written back into V and U. The optimizer
begins anew on them with every sample, in the place of a warm-up, and on s too with every round.
The matrix is built for products of many tokens, which takes fewer FLOPs than its factors.

Unverified: all intervals, rates, what becomes of moments, ranks beside those of the tables.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

from crnet.linears import Parameterization
from crnet.linears._declarations import TABLE_RANKS, above_zero
from crnet.specs import OWN, Product, Slot, TensorSpec, Work, in_each_way


@dataclass(frozen=True, kw_only=True)
class SSTOptions:
    """SST."""

    resample_every: int = 200
    """Steps that a sample of vectors is trained for (unverified)."""


def builds(slot: Slot, rows: int) -> bool:
    """Whether the matrix is built for a product: where so many rows take more FLOPs from factor to
    factor. A few tokens of a generation do not."""
    dense, inner = slot.in_size * slot.out_size, min(slot.in_size, slot.out_size)
    return rows * inner * (slot.in_size + slot.out_size) > dense * (inner + rows)


class SST(Parameterization):
    name = "sst"
    summary = "a singular value decomposition: all values and a sample of the vectors train"
    Options = SSTOptions
    examples = (SSTOptions(resample_every=3),)
    takes_dense = True
    published_ranks = TABLE_RANKS

    def problems(self, options: SSTOptions, slots) -> list[str]:
        return above_zero(self.name, resample_every=options.resample_every)

    def tensors(self, slot: Slot, options: SSTOptions) -> dict[str, TensorSpec]:
        """``index``: which vectors A (columns) and B (rows) are. They have length 1, and no decay:
        that of s is the matrix's."""
        size_in, size_out, rank = slot.in_size, slot.out_size, slot.rank
        inner = min(size_in, size_out)
        vectors_in = TensorSpec((size_in, inner), "factor_in", OWN, trained=False)
        vectors_out = TensorSpec((inner, size_out), "factor_out", OWN, trained=False)
        sample = {"trained": True, "decays": False}
        return {
            "V": vectors_in,
            "s": TensorSpec((inner,), "values", OWN),
            "U": vectors_out,
            "A": dataclasses.replace(vectors_in, shape=(size_in, rank), **sample),
            "B": dataclasses.replace(vectors_out, shape=(rank, size_out), **sample, is_cast=False),
            "index": TensorSpec((rank,), "index", OWN, trained=False, dtype="int32"),
        }

    def work(self, slot: Slot, options: SSTOptions, rows: int, item_bytes: int) -> Work:
        """Forward: the matrix is built, then read, or its factors one by one; backward: likewise,
        its gradient G, G by U for s and A, A by G for B."""
        size_in, size_out, inner = slot.in_size, slot.out_size, min(slot.in_size, slot.out_size)
        dense = size_in * size_out
        if builds(slot, rows):
            forward = (Product(size_in, inner, size_out), Product(rows, size_in, size_out))
            of_x = (Product(size_out, inner, size_in), Product(rows, size_out, size_in))
            scaled = 2 * inner * size_in * item_bytes
        else:
            forward = (Product(rows, size_in, inner), Product(rows, inner, size_out))
            of_x = (Product(rows, size_out, inner), Product(rows, inner, size_in))
            scaled = 2 * rows * inner * item_bytes
        backward = (
            *of_x,
            Product(size_in, rows, size_out),
            Product(size_in, size_out, inner),
            Product(slot.rank, size_in, size_out),
        )
        return Work(
            forward_flops=sum(product.flops for product in forward),
            backward_flops=sum(product.flops for product in backward),
            weight_items=inner * (size_in + size_out + 1) + slot.rank * size_in,
            transient_bytes=(dense + inner * size_in) * item_bytes,
            products=forward,
            backward_products=backward,
            passes=in_each_way(scaled, 1),
            backward_passes=in_each_way(
                scaled + (4 * inner + 2 * slot.rank) * size_in * item_bytes, 4
            ),
        )

    def split(self, slot: Slot, options: SSTOptions) -> str:
        return "its vectors are normalised and drawn whole"

    def events(self, step: int, options: SSTOptions) -> tuple[str, ...]:
        if not step:
            return ()
        sample, over = divmod(step, options.resample_every)
        return ("normalise",) if over else ("normalise", f"sample {sample}")

    def initial_value(self, name, slot, options, generator) -> Any:
        """Of one decomposition of a dense Gaussian matrix. Cost: an SVD a map."""
        from crnet.linears._maps import drawn_triples
        from crnet.linears.sst.module import draw, picked

        sizes, seed = (slot.in_size, slot.out_size), generator("dense").initial_seed()
        _, left_DK, s_K, right_KF = drawn_triples(*sizes, slot.init_std, seed)
        parts = {"V": left_DK, "s": s_K, "U": right_KF}
        if name in parts:
            return parts[name]
        index = draw(parts["s"], slot.rank, generator("sample"))
        return index if name == "index" else picked(parts, index)[name]

    def from_dense(self, slot, options, weight_FD, values):
        from crnet.linears.sst.module import decomposed, picked

        parts = decomposed(weight_FD.T)
        return parts | picked(parts, values["index"]) | {"index": values["index"]}

    def make(self, slot: Slot, options: SSTOptions):
        from crnet.linears.sst.module import SSTMap

        samples = math.ceil(min(slot.in_size, slot.out_size) / slot.rank)
        return SSTMap(self.tensors(slot, options), functools.partial(builds, slot), samples)


METHODS = [SST()]
