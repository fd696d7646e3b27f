"""Fira's step. Shapes: M, N sides of a matrix, R rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from crnet.optimizers._projection import TINY, growth, is_right, norm_of
from crnet.optimizers._subspace.module import SubspaceAdam, add_back


class FiraAdam(SubspaceAdam):
    """State as of ``SubspaceAdam``, and of a dense matrix ``norm``, that of the last rest, fp32.

    Cost of a step beside GaLore's: a product for the rest, and two passes over it. The scales and
    the limit are multiplied into the weight together.
    """

    def _step_matrix(
        self, name: str, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        g_MN = parameter.grad
        assert g_MN is not None
        p_RN, r = self._projected(name, g_MN, state)
        negative_u = self._direction(parameter, r, state)
        scale, side = self.options.scale, int(is_right(tuple(g_MN.shape)))
        rest_MN = g_MN.clone()
        add_back(rest_MN, r, p_RN, 1.0, -1.0 if self.options.residual == "paper" else -scale)
        phi = norm_of(negative_u, side) / (norm_of(r, side) + TINY)
        phi = self._limited(phi, phi * norm_of(rest_MN, side), state)
        kept = 1 - group["lr"] * group["weight_decay"]
        rate = self._rate(group["lr"], state["step"]) * kept
        add_back(parameter, negative_u, p_RN, kept, rate * scale)
        parameter.addcmul_(rest_MN, phi.to(g_MN.dtype), value=-rate)

    def _limited(self, phi: Tensor, norms: Tensor, state: dict[str, Any]) -> Tensor:
        """The scales, less where the norm of the rest grew too much; the first is only noted.

        ``norms``: of the scaled rest, one for each index of the larger side.
        """
        if not self.options.growth_limit:
            return phi
        norm = norm_of(norms, (0, 1)).squeeze()
        excess = growth(norm, state.get("norm"), self.options.growth_limit)
        if excess is not None:
            phi, norm = phi / excess, norm / excess
        state["norm"] = norm
        return phi
