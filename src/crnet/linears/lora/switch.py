"""SwitchLoRA's map: LoRA's, whose vectors may be held, and the exchange with its pools.

Shapes: D input width, F output width, R rank, P pool, N vectors that are exchanged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

from crnet.kernels.precision import cast
from crnet.linears.lora.module import LoRAMap
from crnet.specs import Forget


class SwitchLoRAMap(LoRAMap):
    """``LoRAMap``; of its vectors those that ``held_A`` and ``held_B`` (R,) count have a gradient
    of zero. ``pool_A`` (D, P), ``pool_B`` (P, F)."""

    pool_A: nn.Parameter
    pool_B: nn.Parameter
    held_A: nn.Parameter
    held_B: nn.Parameter

    def __init__(self, tensors, scale: float, options: Any):
        super().__init__(tensors, scale)
        self.options = options

    def _cast(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        x, weight_FD, a_DR, b_RF = cast(x_BTD, self.weight, self.A, self.B)
        return x, weight_FD, _Held.apply(a_DR, self.held_A, 1), _Held.apply(b_RF, self.held_B, 0)

    @torch.no_grad()
    def run_event(self, event: str, generator: Generator) -> tuple[Forget, ...]:
        """switch STEP: vectors of A, then of B, are exchanged; the function stays.

        Returns: the counterparts, whose moments are forgotten.
        Cost: a pass over W0 for each factor that exchanges any.
        """
        step = int(event.removeprefix("switch "))
        mean = self.options.exchanges(step, self.A.shape[1])
        for held in (self.held_A, self.held_B):
            held.sub_(1).clamp_(min=0)
        found = (
            Forget("B", self._exchange("A", mean, generator)),
            Forget("A", self._exchange("B", mean, generator), dim=1),
        )
        return tuple(each for each in found if each.indices)

    def _exchange(self, name: str, mean: float, generator: Generator) -> tuple[int, ...]:
        """Exchange vectors of a factor with its pool; their counterparts are held.

        Returns: which ones. Numerics: W0 in fp32 or better, then one rounding.
        """
        of_a = name == "A"
        vectors, others, pool, held = (
            (self.A.T, self.B, self.pool_A.T, self.held_B)
            if of_a
            else (self.B, self.A.T, self.pool_B, self.held_A)
        )
        count = min(_rounded(mean, generator), len(vectors), len(pool))
        at = _neighbours(count, len(vectors), generator)
        place = _neighbours(count, len(pool), generator)
        if not count:
            return ()
        former, candidates = vectors[at].clone(), pool[place].clone()
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        lost, kept = former.to(dtype) - candidates.to(dtype), others[at].to(dtype)
        out_NF, in_ND = (kept, lost) if of_a else (lost, kept)
        weight_FD = self.weight.to(dtype)
        self.weight.copy_(torch.addmm(weight_FD, out_NF.T, in_ND, alpha=self.scale))
        vectors[at], pool[place] = candidates, former
        held[at] = self.options.held_steps
        return tuple(at)


def _rounded(mean: float, generator: Generator) -> int:
    """A whole number, ``mean`` in the mean."""
    return math.floor(mean + float(torch.rand((), generator=generator, dtype=torch.float64)))


def _neighbours(count: int, total: int, generator: Generator) -> list[int]:
    """So many successive indices from one that is drawn; behind the last comes the first."""
    start = int(torch.randint(total, (), generator=generator))
    return [(start + idx) % total for idx in range(count)]


class _Held(torch.autograd.Function):
    """A factor whose vectors, along ``dim``, have no gradient where they are held."""

    @staticmethod
    def forward(ctx, factor, held_R, dim):
        ctx.save_for_backward(held_R)
        ctx.dim = dim
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx, grad):
        (held_R,) = ctx.saved_tensors
        is_free = held_R == 0
        return grad * (is_free if ctx.dim else is_free[:, None]), None, None
