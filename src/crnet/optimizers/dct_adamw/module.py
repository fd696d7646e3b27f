"""DCT-AdamW's choice of columns. Shapes: M, N sides of a matrix, R rank, K the smaller side, L the
larger one."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.optimizers._norms import ROWS
from crnet.optimizers._projection import is_right, project
from crnet.optimizers._subspace.module import SubspaceAdam, add_back


class DctSubspaceAdam(SubspaceAdam):
    """State as of ``SubspaceAdam``, but for ``indices`` (R), int32, in the place of a projection.

    Cost of a refresh: a Fourier transform of every row of K items, and two passes over them, in
    the place of a product with R columns. The matrices Q, one a size, are made once and are no
    state.
    """

    corrects_inside = True

    def _projected(self, name: str, g_MN: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        size, side = min(g_MN.shape), int(is_right(tuple(g_MN.shape)))
        basis_KK = cosines(size, g_MN.device, g_MN.dtype)
        if not self._is_due(name, state["step"]):
            p_RK = basis_KK[state["indices"].long()]
            return p_RK, project(g_MN, p_RK)
        s_LK, places_K = transformed(g_MN if side else g_MN.T)
        norms_K = _magnitudes(s_LK)[places_K]
        chosen = norms_K.topk(min(self.options.rank, size)).indices.sort().values
        if self.options.rotate and "indices" in state:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = followed(state[key], state["indices"].long(), chosen, size, side)
        state["indices"] = chosen.int()
        r_LR = s_LK.index_select(1, places_K[chosen]).to(g_MN.dtype)
        return basis_KK[chosen], r_LR if side else r_LR.T.contiguous()

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


def transformed(x_LK: Tensor) -> tuple[Tensor, Tensor]:
    """``X Q`` with its columns in another order, and the place of each column there.

    Items k and K - k of a row are real and imaginary part of what, turned by ``pi k / 2 K``, is the
    Fourier transform of the row of ``X Q`` in this order (Makhoul 1980, the way back). Within
    rounding it is ``naive_transformed``.

    Returns: (L, K), fp32 (fp64 for fp64); (K), whole numbers.
    Cost: about ``5/2 K log2(K)`` FLOPs a row, where a product takes ``2 K^2``; allocates two
    matrices.
    """
    size = x_LK.shape[1]
    wide = _wide(x_LK.dtype)
    turns, places_K = _tables(size, x_LK.device, wide)
    half = len(turns)
    rows = x_LK.to(wide).contiguous()  # of a wide matrix: items of a column are far apart
    items = rows.new_empty(len(rows), half, 2)  # two copies: a gather by pairs takes three times it
    items[:, :, 0] = rows[:, :half]
    items[:, 0, 1] = 0  # not read, but multiplied
    items[:, 1:, 1] = rows[:, size - half + 1 :].flip(1)
    spectrum = torch.view_as_complex(items).mul_(turns)
    return torch.fft.irfft(spectrum, n=size, dim=1), places_K


def naive_transformed(x_LK: Tensor) -> Tensor:
    """``X Q``, by a product."""
    return x_LK @ cosines(x_LK.shape[1], x_LK.device, x_LK.dtype).T


@functools.lru_cache(maxsize=32)
def _tables(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of ``transformed``: turns of the pairs, places of the columns."""
    half = torch.arange(size // 2 + 1)
    lengths = torch.full((len(half),), math.sqrt(size / 2), dtype=torch.float64)
    lengths[0] *= math.sqrt(2)
    turns = torch.polar(lengths, half.double() * (-math.pi / 2 / size))
    order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2).flip(0)])
    places_K = -order.argsort() % size  # conjugates: the row backwards
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    return turns.to(device, complex_dtype), places_K.to(device)


def _magnitudes(s_LK: Tensor) -> Tensor:
    """Sums of magnitudes down the columns; each item is read once."""
    if s_LK.is_cuda:
        return s_LK.abs().sum(0)
    total = s_LK.new_zeros(min(ROWS, len(s_LK)), s_LK.shape[1])
    for rows in s_LK.split(ROWS):
        total[: len(rows)].add_(rows.abs())
    return total.sum(0)


def followed(m: Tensor, former: Tensor, chosen: Tensor, size: int, side: int) -> Tensor:
    """A moment whose columns (``side`` 1) or rows are those of ``chosen``: what they were where
    ``former`` has them too, else 0."""
    places = former.new_full((size,), -1)
    places[former] = torch.arange(len(former), device=former.device)
    places = places[chosen]
    is_new = (places < 0).view((1, -1) if side else (-1, 1))
    return m.index_select(side, places.clamp_(min=0)).masked_fill_(is_new, 0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
