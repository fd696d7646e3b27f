"""SCALE's step, and AdamW's for the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.optimizers import Settings
from crnet.optimizers._beside import (
    BesideAdamW,
    Parameters,
    decay,
    output_dim,
    split,
)
from crnet.optimizers._norms import squares_over

TINY = 1e-8
"""The least norm that a column is divided by; the released code's."""


class ScaleAndAdamW(BesideAdamW):
    """State of the last layer: ``momentum_buffer``, in its dtype; of other maps: none."""

    def __init__(self, parameters: Parameters, options: Any, settings: Settings):
        super().__init__(*split(parameters, options.takes), settings)
        self.options = options

    def update(self, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        spec, gradient = self.specs[parameter], parameter.grad
        assert gradient is not None
        if self.options.has_momentum(spec):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            gradient = state["momentum_buffer"].lerp_(gradient, 1 - self.options.momentum)
        output = 0 if self.options.has_momentum(spec) else output_dim(spec)
        norms = squares_over(gradient, 1 - output).sqrt_()
        size = math.sqrt(gradient.shape[1 - output]) if self.options.released else 1.0
        decay(parameter, group)
        scales = norms.clamp_(min=TINY * size).reciprocal_().mul_(size).to(gradient.dtype)
        parameter.addcmul_(gradient, scales, value=-group["lr"])
