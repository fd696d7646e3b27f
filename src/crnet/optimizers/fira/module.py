"""Fira's step. Shapes: M, N sides of a matrix, R rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.optimizers._norms import norm_of
from crnet.optimizers._projection import TINY, is_right, limited
from crnet.optimizers._subspace.module import SubspaceAdam, add_back


class FiraAdam(SubspaceAdam):
    """State as of ``SubspaceAdam``, and of a dense matrix ``norm``, that of the last rest, fp32.

    Cost of a step beside GaLore's: a pass over the gradient for the norms of its rows or columns,
    and one that adds it to the weight. The rest is never made: ``phi (G - R P)`` and the step in
    the subspace go back in one product, and rows of P have length 1 and right angles, so that
    ``|G - c R P|^2 = |G|^2 - (2 c - c^2) |R|^2`` (``naive_rest_norms``).
    """

    def _step_matrix(
        self, name: str, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        g_MN, options = parameter.grad, self.options
        assert g_MN is not None
        p_RN, r = self._projected(name, g_MN, state)
        negative_u = self._direction(parameter, r, state)
        side = int(is_right(tuple(g_MN.shape)))
        share = 1.0 if options.residual == "paper" else options.scale
        norms_r = norm_of(r, side)
        phi = norm_of(negative_u, side) / (norms_r + TINY)
        if options.growth_limit:
            of_rest = rest_norms(g_MN, r, p_RN, norms_r, share)
            phi = limited(phi, phi * of_rest, state, options.growth_limit)
        kept = 1 - group["lr"] * group["weight_decay"]
        rate = self._rate(group["lr"], state["step"]) * kept
        phi = phi.to(g_MN.dtype)
        back = torch.addcmul(negative_u.mul_(options.scale), r, phi, value=share)
        add_back(parameter, back, p_RN, kept, rate)
        parameter.addcmul_(g_MN, phi, value=-rate)


def rest_norms(g_MN: Tensor, r: Tensor, p_RN: Tensor, norms_r: Tensor, share: float) -> Tensor:
    """Norms of the rows (or columns) of ``G - share R P``, P orthonormal.

    Where P is in bf16, its rows are no more orthonormal than bf16 is exact: there the rest is made.
    """
    if g_MN.dtype == torch.bfloat16:
        return naive_rest_norms(g_MN, r, p_RN, share)
    side = int(is_right(tuple(g_MN.shape)))
    squares = norm_of(g_MN, side).square_()
    return squares.addcmul_(norms_r, norms_r, value=share * (share - 2)).clamp_(min=0).sqrt_()


def naive_rest_norms(g_MN: Tensor, r: Tensor, p_RN: Tensor, share: float) -> Tensor:
    """As ``rest_norms``, from the rest itself."""
    rest_MN = g_MN.clone()
    add_back(rest_MN, r, p_RN, 1.0, -share)
    return norm_of(rest_MN, int(is_right(tuple(g_MN.shape))))
