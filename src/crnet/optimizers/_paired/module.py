"""Optimizers that step both factors of a map together and leave the rest to torch's AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crnet.optimizers import Settings
from crnet.optimizers._beside import BesideAdamW, Parameters
from crnet.optimizers._sharing import pairs


class Factor(NamedTuple):
    """One of a pair, with what a step of it needs."""

    name: str
    tensor: Tensor
    """(in, R) or (R, out)."""
    gradient: Tensor
    state: dict[str, Any]
    group: Mapping[str, Any]


class PairsBesideAdamW(BesideAdamW):
    """A subclass gives ``update_pair``. AdamW's rate is ``adam_lr_factor`` of the base rate."""

    def __init__(self, parameters: Parameters, settings: Settings, adam_lr_factor: float):
        self.pairs = pairs({name: spec for name, (spec, _) in parameters.items()})
        self.pair_of = {name: pair for pair in self.pairs.items() for name in pair}
        names = self.pair_of.keys()
        own = {name: each for name, each in parameters.items() if name in names}
        others = {name: each for name, each in parameters.items() if name not in names}
        super().__init__(own, others, settings)
        for group in self.param_groups:
            if group["part"] == "adam":
                group["lr_factor"] *= adam_lr_factor
                group["lr"] = settings.lr * group["lr_factor"]

    def update_pair(self, a: Factor, b: Factor) -> None:
        """Step a pair in place, decay included; ``a`` (in, R), ``b`` (R, out)."""
        raise NotImplementedError

    def step_own(self) -> None:
        found = {
            name: (parameter, group)
            for group in self.param_groups
            if group["part"] == "own"
            for name, parameter in zip(group["names"], group["params"], strict=True)
            if parameter.grad is not None
        }
        for pair in dict.fromkeys(self.pair_of[name] for name in found):
            check_gradients(pair, [name in found for name in pair])
            factors = [
                Factor(name, parameter, parameter.grad, self.state[parameter], group)
                for name in pair
                for parameter, group in [found[name]]
                if parameter.grad is not None
            ]
            self.update_pair(*factors)


def check_gradients(pair: tuple[str, str], given: Sequence[bool]) -> None:
    """Raise ``RuntimeError`` unless both of a pair, one of which has a gradient, have one
    (``given``)."""
    if not all(given):
        raise RuntimeError(
            f"of {' and '.join(pair)} only {pair[given.index(True)]} has a gradient; both are "
            "stepped together, so give both, or neither"
        )


def add_product(target_LR: Tensor, x_LR: Tensor, z_RR: Tensor, kept: float, rate: float) -> None:
    """``W <- kept W + rate X Z``, in place, one product where the dtypes are one."""
    if target_LR.dtype == x_LR.dtype:
        target_LR.addmm_(x_LR, z_RR, beta=kept, alpha=rate)
    else:
        target_LR.copy_(torch.addmm(target_LR.to(x_LR.dtype), x_LR, z_RR, beta=kept, alpha=rate))
