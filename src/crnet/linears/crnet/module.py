"""CR-Net's linear map: an earlier block's output, scaled, plus a low-rank increment."""

from __future__ import annotations

import functools

import torch
from torch import Generator, Tensor, nn

from crnet.kernels.carried import (
    NOTHING,
    Inside,
    carried_lowrank,
    carried_output,
    carry_from,
    low_rank,
    rows,
    up_project,
)
from crnet.linears._maps import LinearMap, duplicated, refactored, wider_factors, x_times
from crnet.specs import Forget

EPS = 1e-6
"""Keeps the gain away from zero (eq. 6)."""
NORM_EPS = 1e-6
"""Of the norm at the bottleneck."""


class CRNetMap(LinearMap):
    """``y = gain * carry + h(x A) f(B)``; A (D, R), B (R, F), beta (1,), (heads,) or (F,).

    h is RMSNorm with the gains ``norm`` (R,) or without, or nothing; f adds a constant or nothing.
    Without ``beta`` there is no carry. ``done`` (1,): steps of the gain's warm-up so far.
    """

    comes_apart = True
    A: nn.Parameter
    B: nn.Parameter
    beta: nn.Parameter | None
    norm: nn.Parameter | None
    done: nn.Parameter | None

    def __init__(self, tensors, carry_dtype: str, inside: Inside, warm_up: tuple[int, float]):
        """``warm_up``: its steps, and the gain before it."""
        super().__init__(tensors)
        for name in {"beta", "norm", "done"} - tensors.keys():
            self.register_parameter(name, None)
        self.inside, self.warm_up = inside, warm_up
        wide = carry_dtype == "fp32" and self.beta is not None
        self.carry_dtype = torch.float32 if wide else None

    def run(self, x_BTD, carry, known):
        more = {
            "known": known,
            "sums": self.sums,
            "weight_R": self.norm,
            "inside": self.inside,
        }
        if self.beta is None:
            output = low_rank(x_BTD, self.A, self.B, **more)
        else:
            assert carry is not None, "CR-Net's map above the first block needs a carry"
            factors, dtype = (self.A, self.B), self.carry_dtype
            output = carried_lowrank(
                x_BTD, *factors, carry, self._gain(self.beta), carry_dtype=dtype, **more
            )
        return output, output

    def down_project(self, x_BTD, carry):
        return x_times(x_BTD, self.A, self.sums)

    def up_project(self, bottleneck, carry):
        latent, outer = self._halves(bottleneck)
        if self.beta is None:
            return up_project(latent, outer)
        return up_project(latent, outer, carry, self._gain(self.beta), self.carry_dtype)

    def carry_from(self, output_BTF, bottleneck):
        """Eq. 7: the output below, from this one and its bottleneck."""
        assert self.beta is not None
        return carry_from(output_BTF, *self._halves(bottleneck), self._gain(self.beta))

    def _halves(self, z_BTR: Tensor) -> tuple[Tensor, Tensor]:
        """``h(Z)`` and ``f(B)``, as the forward pass has them."""
        latent_MR = self.inside.latent(rows(z_BTR), self.norm)
        return latent_MR.view(z_BTR.shape), self.inside.factor(self.B.to(z_BTR.dtype))

    def _gain(self, beta: Tensor) -> Tensor:
        """(1,), or one a column of the output."""
        gain_N = gain(beta)
        if self.done is not None:
            steps, start = self.warm_up
            gain_N = start + self.done / steps * (gain_N - start)
        num, width = gain_N.shape[0], self.B.shape[1]
        return gain_N if num in (1, width) else gain_N.repeat_interleave(width // num)

    def gain(self) -> Tensor:
        """The smallest, in size: it multiplies rounding errors most."""
        assert self.beta is not None
        gains = self._gain(self.beta.detach())
        if gains.shape[0] == 1:
            return gains
        gains = gains.full_tensor() if hasattr(gains, "full_tensor") else gains  # pyright: ignore
        return gains.abs().amin(0, keepdim=True)

    @torch.no_grad()
    def run_event(self, event: str, generator: Generator) -> tuple[Forget, ...]:
        """warm-up: one step more is counted. refactor: balanced factors of the same product, whose
        moments are forgotten. Numerics: in fp64, rounded once to the dtype of the factors."""
        if event == "warm-up":
            if self.done is not None:
                self.done.add_(1)
            return ()
        assert event == "refactor", event
        outer_RF = self.inside.factor(self.B.detach().double())
        a_DR, b_RF = refactored(self.A, outer_RF)
        self.A.copy_(a_DR)
        self.B.copy_(b_RF - (outer_RF - self.B.double()))
        return Forget("A"), Forget("B")

    def dense_weight(self) -> Tensor:
        if self.inside.norm_eps is not None:
            raise NotImplementedError("a map with a norm at its bottleneck is not linear")
        return (self.A.detach().float() @ self.inside.factor(self.B.detach().float())).T

    def with_update(self, a_DR, b_RF):
        if self.inside != NOTHING:
            return None  # the norm, or the constant beside B, hangs on the rank
        factors = wider_factors(self.A, self.B, a_DR, b_RF)
        others = {"beta": self.beta, "done": self.done}
        return factors | {name: each.detach() for name, each in others.items() if each is not None}


def inside_of(has_norm: bool, alpha: float | None) -> Inside:
    """What stands between and beside the products; ``alpha`` of repeated bottlenecks."""
    outer = None if alpha is None else functools.partial(duplicated, alpha=alpha)
    return Inside(NORM_EPS if has_norm else None, outer)


class CarriedOutputMap(LinearMap):
    """``y = gain * carry + x``, x the output of an operator of several maps; beta (1,)."""

    beta: nn.Parameter

    def __init__(self, tensors, carry_dtype: str):
        super().__init__(tensors)
        self.carry_dtype = torch.float32 if carry_dtype == "fp32" else None

    def run(self, x_BTD, carry, known):
        assert carry is not None, "above the first block there is a carry"
        output = carried_output(x_BTD, carry, gain(self.beta), self.carry_dtype)
        return output, output


def gain(beta: Tensor) -> Tensor:
    """``sign(beta) (|beta| + eps)``, shape of ``beta``. Source: eq. 6.

    Written as ``beta + eps sign(beta)``, which is the same number and whose derivative is taken to
    be 1 everywhere: a beta of exactly 0 could otherwise never leave it.
    """
    return beta + EPS * torch.sign(beta.detach())


def orthogonal_factor(
    name: str, in_size: int, rank: int, out_size: int, std: float, generator: Generator
) -> Tensor:
    """Factor ``A`` (in, rank) with orthogonal columns, or ``B`` (rank, out) with orthogonal rows.

    Every singular value of A B is the same, and its items have standard deviation ``std``.
    Cost: one QR decomposition.
    """
    length = in_size if name == "A" else out_size
    columns, triangle = torch.linalg.qr(torch.randn(length, rank, generator=generator))
    columns *= torch.sign(triangle.diagonal())  # uniform over such matrices
    columns *= (std**2 * in_size * out_size / rank) ** 0.25
    return columns if name == "A" else columns.T.contiguous()
