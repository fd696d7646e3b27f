"""NorMuon's step, and AdamW's for the rest. Shapes: M, N sides of a matrix."""

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
from crnet.optimizers._newton_schulz import orthogonalised
from crnet.optimizers._norms import squares_over

TINY = 1e-8


class NorMuonAndAdamW(BesideAdamW):
    """State of a matrix: ``momentum_buffer``, and ``second_moment``, a number for each output; both
    in its dtype."""

    def __init__(self, parameters: Parameters, options: Any, settings: Settings):
        super().__init__(*split(parameters, options.takes), settings)
        self.options = options

    def update(self, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        gradient, options = parameter.grad, self.options
        assert gradient is not None
        side = 1 - output_dim(self.specs[parameter])
        if not state:
            outputs = parameter.shape[1 - side]
            shape = (outputs, 1) if side == 1 else (1, outputs)
            state["momentum_buffer"] = torch.zeros_like(parameter)
            state["second_moment"] = parameter.new_zeros(shape)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - options.momentum)
        if options.released:
            momentum = torch.lerp(gradient, momentum, options.momentum)
        o_MN = orthogonalised(momentum, options.ns_steps)
        squares = squares_over(o_MN, side)
        second = state["second_moment"]
        second.lerp_((squares / o_MN.shape[side]).to(second.dtype), 1 - options.beta2)
        scales = second.to(squares.dtype).sqrt().add_(TINY).reciprocal_()
        # |N|: each output's items have one scale.
        size = squares.mul(scales.square()).sum().sqrt_().add_(TINY)
        if options.released:
            rows, columns = parameter.shape if side == 1 else reversed(parameter.shape)
            wanted = squares.sum().sqrt_() * math.sqrt(max(1, rows / columns))
        else:
            wanted = 0.2 * math.sqrt(parameter.numel())
        decay(parameter, group)
        scales = (scales * (wanted / size)).to(parameter.dtype)
        parameter.addcmul_(o_MN.to(parameter.dtype), scales, value=-group["lr"])
