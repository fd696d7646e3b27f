"""Self-guided training's map: a fading matrix beside two factors; without it, the factors alone.

Shapes: D input width, F output width, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from crnet.linears._declarations import FactorInit, factors
from crnet.linears._maps import LowRankMap, spectral_factor
from crnet.linears._updated import UpdatedMap
from crnet.specs import Slot


class SelfGuidedMap(UpdatedMap, LowRankMap):
    """``y = rho x W^T + (1 - rho) (x A) B``; ``weight`` W (F, D), A (D, R), B (R, F), all trained.

    ``weight`` None: the guide is gone, and every method is ``LowRankMap``'s. rho is a number that
    follows from the step.
    """

    weight: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, tensors, rho: float):
        super().__init__(tensors, 1 - rho, rho)
        if "weight" not in tensors:
            self.register_parameter("weight", None)

    def take(self, options: Any) -> None:
        self.matrix_share, self.scale = options.rho, 1 - options.rho

    @property
    def _kind(self) -> Any:
        return LowRankMap if self.weight is None else UpdatedMap

    def run(self, x_BTD, carry, known):
        return self._kind.run(self, x_BTD, carry, known)

    def down_project(self, x_BTD, carry):
        return self._kind.down_project(self, x_BTD, carry)

    def up_project(self, bottleneck, carry):
        return self._kind.up_project(self, bottleneck, carry)

    def dense_weight(self) -> Tensor:
        return self._kind.dense_weight(self)

    def with_update(self, a_DR, b_RF):
        if self.weight is not None:
            return None  # the update would fade in as the guide fades out
        return super().with_update(a_DR, b_RF)


def first_value(
    name: str, slot: Slot, init: FactorInit, generator: Callable[[str], Generator]
) -> Tensor:
    """Of ``A``, ``B`` or the guide ``weight``, which begins as their product, transposed.

    Cost: the guide draws both factors once more.
    """

    def factor(own: str) -> Tensor:
        if init == "spectral":
            sizes = slot.in_size, slot.rank, slot.out_size
            return spectral_factor(own, *sizes, slot.init_std, generator("dense"))
        spec = factors(slot, init, 1.0)[own]
        return torch.empty(spec.shape).normal_(0, spec.init.value, generator=generator(own))

    return (factor("A") @ factor("B")).T.contiguous() if name == "weight" else factor(name)
