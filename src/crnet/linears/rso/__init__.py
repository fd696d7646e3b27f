"""RSO: randomised subspace optimisation, full rank trained one random subspace at a time.

``y = x W^T + (x P) B``; W and P frozen, B zero at first and trained alone. P is Gaussian with
variance 1/r. Every ``restart_every`` steps ``W <- W + (P B)^T``, B is zero, P is drawn anew and the
optimizer begins anew on B: the function stays. The backward pass needs x P, r numbers a token, and
never x; no gradient of full size exists.

Source: Chen et al. 2025 (arXiv:2502.07222), its formulas. A re-implementation: no code of it could
be read.

Deviation: the proximal term ``||B||^2 / (2 eta)`` is taken as the optimizer's decoupled decay of B,
whose ``--optimizer.weight-decay`` is ``1 / eta`` (``proximal``); other tensors decay by it too.

Unverified: steps between restarts, eta, rates, ranks beside those of the tables, whether P is
orthonormal, which matrices take part (here all of every block).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from crnet.linears import Parameterization
from crnet.linears._declarations import (
    TABLE_RANKS,
    above_zero,
    dense,
    dense_backward,
    factor_backward,
    factor_products,
    pair,
)
from crnet.specs import Product, Slot, TensorSpec, Work, constant, normal


@dataclass(frozen=True, kw_only=True)
class RSOOptions:
    """RSO."""

    restart_every: int = 200
    """Steps in one subspace (unverified: some hundreds)."""
    proximal: bool = True
    """Whether the optimizer's weight decay acts on B: the proximal term, eta one over the decay."""


class RSO(Parameterization):
    name = "rso"
    summary = "a frozen matrix plus an update in a random subspace, drawn anew every so many steps"
    Options = RSOOptions
    examples = (RSOOptions(restart_every=3, proximal=False),)
    takes_dense = True
    published_ranks = TABLE_RANKS

    def problems(self, options: RSOOptions, slots) -> list[str]:
        return above_zero(self.name, restart_every=options.restart_every)

    def tensors(self, slot: Slot, options: RSOOptions) -> dict[str, TensorSpec]:
        """``P`` stands where other methods have A."""
        found = pair(slot, normal(slot.rank**-0.5), constant(0.0))
        frozen = {"weight": dense(slot)["weight"], "P": found["A"]}
        return {
            name: dataclasses.replace(spec, trained=False, partner=None)
            for name, spec in frozen.items()
        } | {"B": dataclasses.replace(found["B"], partner=None, decays=options.proximal)}

    def work(self, slot: Slot, options: RSOOptions, rows: int, item_bytes: int) -> Work:
        frozen = slot.in_size * slot.out_size
        factors = slot.rank * (slot.in_size + slot.out_size)
        shrink, grow = factor_products(slot, rows)
        of_bottleneck, of_b, _, of_x = factor_backward(slot, rows)
        frozen_x, _ = dense_backward(slot, rows)
        in_place = [dataclasses.replace(each, accumulates=True) for each in (grow, of_x)]
        return Work(
            forward_flops=2 * rows * (frozen + factors),
            backward_flops=2 * rows * (frozen + factors + slot.rank * slot.out_size),
            weight_items=frozen + factors,
            keeps_input=False,
            kept_bytes=rows * slot.rank * item_bytes,
            bottleneck_bytes=rows * (slot.out_size + slot.rank) * item_bytes,
            products=(Product(rows, slot.in_size, slot.out_size), shrink, in_place[0]),
            backward_products=(of_bottleneck, of_b, in_place[1], frozen_x),
        )

    def from_dense(self, slot, options, weight_FD, values):
        return {**values, "weight": weight_FD}  # the update is zero

    def split(self, slot: Slot, options: RSOOptions) -> str:
        return "its restarts want whole tensors"

    def events(self, step: int, options: RSOOptions) -> tuple[str, ...]:
        return ("restart",) if step and step % options.restart_every == 0 else ()

    def make(self, slot: Slot, options: RSOOptions):
        from crnet.linears.rso.module import RSOMap

        return RSOMap(self.tensors(slot, options))


METHODS = [RSO()]
