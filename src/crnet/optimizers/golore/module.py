"""GoLore's projections, and the first moment that follows them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from crnet.optimizers._projection import is_right, leading, orthonormal, seed_of
from crnet.optimizers._subspace.module import SubspaceAdam


class GoloreAdam(SubspaceAdam):
    """State as of ``SubspaceAdam``. Of a run whose number of steps is not known, no projection is
    random, unless all are."""

    def _refreshed(self, name: str, g_MN: Tensor, state: dict[str, Any]) -> Tensor:
        rank, shape = min(self.options.rank, *g_MN.shape), tuple(g_MN.shape)
        if state["step"] > self._num_svd_steps():
            seed = seed_of(self.settings.seed, name, state["step"])
            return orthonormal(shape, rank, seed).to(g_MN.device, g_MN.dtype)
        return leading(g_MN, rank)

    def _num_svd_steps(self) -> float:
        share, num_steps = self.options.svd_frac, self.settings.num_steps
        if num_steps is None:
            return math.inf if share else 0
        return share * num_steps

    def _projected(self, name: str, g_MN: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        former = state.get("projection")
        p_RN, r = super()._projected(name, g_MN, state)
        if former is not None and p_RN is not former:
            moved = moved_moment(state["exp_avg"], former, p_RN, tuple(g_MN.shape))
            if self.options.moments == "released":
                state["kept_moment"] = state["exp_avg"]
            state["exp_avg"] = moved
        return p_RN, r

    def _direction(self, parameter: Tensor, r: Tensor, state: dict[str, Any]) -> Tensor:
        negative_u = super()._direction(parameter, r, state)
        if (kept := state.pop("kept_moment", None)) is not None:
            state["exp_avg"] = kept
        return negative_u


def moved_moment(m: Tensor, former: Tensor, p_RN: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A first moment of R in the subspace of another projection: ``M P_old P_new^T`` (right)."""
    turn_RR = former @ p_RN.T
    return (m @ turn_RR if is_right(shape) else turn_RR.T @ m).contiguous()
