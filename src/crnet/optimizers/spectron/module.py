"""Spectron's step of a pair, and AdamW's for the rest. Shapes: L a factor's long side, R rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crnet.optimizers import Settings
from crnet.optimizers._beside import Parameters
from crnet.optimizers._newton_schulz import through_gram
from crnet.optimizers._paired.module import Factor, PairsBesideAdamW, add_product
from crnet.optimizers._projection import seed_of

TINY = 1e-30


class SpectronAndAdamW(PairsBesideAdamW):
    """State of a factor: ``momentum_buffer`` in its dtype; ``vector``, near its largest singular
    one, R items, fp32 (fp64 for fp64), drawn at first from (seed, name)."""

    def __init__(self, parameters: Parameters, options: Any, settings: Settings):
        super().__init__(parameters, settings, options.adam_lr_factor)
        self.options, self.seed = options, settings.seed

    def update_pair(self, a: Factor, b: Factor) -> None:
        views = [self._columns(a), self._columns(b)]
        share = 1 / (views[0][1] + views[1][1] + 1)
        for each, (momentum_LR, _) in zip((a, b), views, strict=True):
            z_RR = through_gram(momentum_LR.T @ momentum_LR) * share
            target = each.tensor if each is a else each.tensor.T
            lr = each.group["lr"]
            add_product(target, momentum_LR, z_RR, 1 - lr * each.group["weight_decay"], -lr)

    def _columns(self, each: Factor) -> tuple[Tensor, Tensor]:
        """Momentum of a factor as (L, R), and the factor's largest singular value."""
        state, wide = each.state, torch.promote_types(each.tensor.dtype, torch.float32)
        is_in = each.name in self.pairs
        if not state:
            rank = each.tensor.shape[1 if is_in else 0]
            state["momentum_buffer"] = torch.zeros_like(each.tensor)
            generator = torch.Generator().manual_seed(seed_of(self.seed, each.name, 0))
            vector = torch.randn(rank, generator=generator, dtype=wide)
            state["vector"] = (vector / vector.norm()).to(each.tensor.device)
        momentum = state["momentum_buffer"].lerp_(each.gradient, 1 - self.options.momentum)
        matrix = (each.tensor if is_in else each.tensor.T).to(wide)
        image = matrix @ state["vector"]
        found = matrix.T @ (image / image.norm().clamp_(min=TINY))
        norm = found.norm()
        # Of a factor of zeros there is no direction to follow.
        state["vector"] = torch.where(norm > 0, found / norm.clamp(min=TINY), state["vector"])
        return (momentum if is_in else momentum.T).to(wide), norm
