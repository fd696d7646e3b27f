"""Full rank: every map is a dense matrix, ``y = x W^T``. The baseline of every comparison.

Source: Touvron et al. 2023 (arXiv:2302.13971); sizes and initial values are those of GaLore's code
at 2cc66f8, N(0, 0.02^2) in every matrix.
"""

from __future__ import annotations

from crnet.linears import Parameterization
from crnet.linears._declarations import dense, dense_work
from crnet.specs import Split


class Full(Parameterization):
    name = "full"
    summary = "dense matrices"
    has_ranks = False
    pads = True

    def fixed_rank(self, layer_idx, options):
        return 0

    def tensors(self, slot, options):
        return dense(slot)

    def work(self, slot, options, rows, item_bytes):
        return dense_work(slot, rows)

    def split(self, slot, options):
        return Split("edge")

    def make(self, slot, options):
        from crnet.linears._maps import DenseMap

        return DenseMap(self.tensors(slot, options))


METHODS = [Full()]
