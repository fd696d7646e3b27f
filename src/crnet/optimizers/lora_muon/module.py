"""LoRA-Muon's step of a pair, and AdamW's for the rest. Shapes: L a factor's long side, R rank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from crnet.optimizers import Settings
from crnet.optimizers._beside import Parameters
from crnet.optimizers._newton_schulz import through_gram
from crnet.optimizers._paired.module import Factor, PairsBesideAdamW, add_product


class LoraMuonAndAdamW(PairsBesideAdamW):
    """State of a factor: ``momentum_buffer`` in its dtype."""

    def __init__(self, parameters: Parameters, options: Any, settings: Settings):
        super().__init__(parameters, settings, options.adam_lr_factor)
        self.options = options

    def update_pair(self, a: Factor, b: Factor) -> None:
        targets = (a.tensor, b.tensor.T)
        roots = [_inverse_root(each) for each in targets]
        for each, target, root_RR in zip((a, b), targets, reversed(roots), strict=True):
            if not each.state:
                each.state["momentum_buffer"] = torch.zeros_like(each.tensor)
            momentum = each.state["momentum_buffer"].lerp_(each.gradient, 1 - self.options.momentum)
            momentum_LR = (momentum if each is a else momentum.T).to(root_RR.dtype)
            x_LR = momentum_LR @ root_RR.T
            z_RR = through_gram(x_LR.T @ x_LR) @ root_RR
            lr = each.group["lr"]
            kept = math.sqrt(1 - lr * each.group["weight_decay"])
            add_product(target, x_LR, z_RR, kept, -lr / (2 * kept))


def _inverse_root(factor_LR: Tensor) -> Tensor:
    """``K^-1`` for the Cholesky factor K of ``X' X``, whose inverse is ``K^-T K^-1``."""
    wide = torch.promote_types(factor_LR.dtype, torch.float32)
    gram_RR = factor_LR.T.to(wide) @ factor_LR.to(wide)
    diagonal = gram_RR.diagonal()
    diagonal.add_(4 * torch.finfo(wide).eps * diagonal.sum() + 1e-30)
    lower = torch.linalg.cholesky(gram_RR)
    identity = torch.eye(len(lower), dtype=wide, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False)
