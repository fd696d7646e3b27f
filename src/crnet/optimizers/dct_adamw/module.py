"""DCT-AdamW's choice of columns. Shapes: M, N sides of a matrix, R rank, K the smaller side."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.optimizers._projection import is_right, project
from crnet.optimizers._subspace.module import SubspaceAdam, add_back


class DctSubspaceAdam(SubspaceAdam):
    """State as of ``SubspaceAdam``, but for ``indices`` (R), int32, in the place of a projection.

    Cost: a product with Q of the matrix's size at a refresh, in the place of one with R columns.
    The matrices Q, one a size, are made once and are no state.
    """

    corrects_inside = True

    def _projected(self, name: str, g_MN: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        size, side = min(g_MN.shape), int(is_right(tuple(g_MN.shape)))
        basis_KK = cosines(size, g_MN.device, g_MN.dtype)
        if not self._is_due(name, state["step"]):
            p_RK = basis_KK[state["indices"].long()]
            return p_RK, project(g_MN, p_RK)
        s = project(g_MN, basis_KK)
        norms = torch.linalg.vector_norm(s, ord=1, dim=1 - side, dtype=_wide(s.dtype))
        chosen = norms.topk(min(self.options.rank, size)).indices.sort().values
        if self.options.rotate and "indices" in state:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = followed(state[key], state["indices"].long(), chosen, size, side)
        state["indices"] = chosen.int()
        return basis_KK[chosen], s.index_select(side, chosen)

    def _step_matrix(
        self, name: str, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        g_MN = parameter.grad
        assert g_MN is not None
        p_RK, r = self._projected(name, g_MN, state)
        negative_u = self._direction(parameter, r, state)
        add_back(parameter, negative_u, p_RK, 1 - group["lr"] * group["weight_decay"], group["lr"])

    def _step_other(
        self, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        assert parameter.grad is not None
        lost = group["lr"] * group["weight_decay"]
        self._adam(parameter, parameter, parameter.grad, state, group["lr"], lost)


@functools.lru_cache(maxsize=32)
def cosines(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Q transposed: row j has the items ``sqrt(2 / K) cos(pi i (2 j + 1) / 2 K)``, the first of
    them over sqrt(2). Computed in fp64 on the CPU."""
    at = torch.arange(size, dtype=torch.float64)
    basis_KK = math.sqrt(2 / size) * torch.cos(torch.outer(2 * at + 1, at) * (math.pi / 2 / size))
    basis_KK[:, 0] *= math.sqrt(0.5)
    return basis_KK.to(device, dtype)


def followed(m: Tensor, former: Tensor, chosen: Tensor, size: int, side: int) -> Tensor:
    """A moment whose columns (``side`` 1) or rows are those of ``chosen``: what they were where
    ``former`` has them too, else 0."""
    shape = list(m.shape)
    shape[side] = size
    return m.new_zeros(shape).index_copy_(side, former, m).index_select(side, chosen)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
