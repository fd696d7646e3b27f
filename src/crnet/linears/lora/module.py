"""LoRA's maps: a matrix and a trained pair of factors (``linears._updated``); ReLoRA's events."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from crnet.linears._maps import wider_factors
from crnet.linears._updated import UpdatedMap
from crnet.specs import Forget


class LoRAMap(UpdatedMap):
    """``y = x W0^T + scale (x A) B``; ``weight`` W0 (F, D), frozen, A (D, R), B (R, F)."""


class SharedMap(LoRAMap):
    """``LoRAMap`` whose W0 is trained, and the same tensor in every block."""

    def matrix(self) -> Tensor:
        assert self.shared is not None, "a map that shares its matrix is made with its model"
        return self.shared.weight

    def with_update(self, a_DR, b_RF):
        return wider_factors(self.A, self.B, a_DR, b_RF / self.scale)


class ReLoRAMap(LoRAMap):
    """``LoRAMap`` with the events ``merge`` and ``reset``."""

    def __init__(self, tensors, scale: float, kept_frac: float, keeps_largest: bool):
        super().__init__(tensors, scale)
        self.kept_frac, self.keeps_largest = kept_frac, keeps_largest

    @torch.no_grad()
    def run_event(self, event: str, generator: Generator) -> tuple[Forget, ...]:
        """merge: W0 takes the update in, A is drawn anew, B zero: the function stays as it was.

        reset: nothing here; the optimizer forgets most of A's and B's state.
        Numerics: the sum in fp32 or better, then one rounding to the dtype of W0.
        """
        if event == "reset":
            kept = "largest" if self.keeps_largest else "random"
            return tuple(Forget(name, kept_frac=self.kept_frac, kept=kept) for name in ("A", "B"))
        assert event == "merge", event
        self.weight.copy_(self.merged())
        bound = self.A.shape[0] ** -0.5
        self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
        self.B.zero_()
        return ()
