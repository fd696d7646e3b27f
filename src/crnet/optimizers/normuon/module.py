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
    squares_over,
)

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of x, x^3 and x^5 in one iteration: steep at 0, and between 0.7 and 1.2 in the end."""
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


def orthogonalised(x_MN: Tensor, num_steps: int) -> Tensor:
    """A matrix with singular values near 1 in the place of those of ``x_MN``, bf16.

    Cost: ``num_steps`` times 4 k^2 l + 2 k^3 FLOPs, k the smaller side and l the larger.
    """
    a, b, c = COEFFICIENTS
    is_tall = x_MN.shape[0] > x_MN.shape[1]
    x = (x_MN.T if is_tall else x_MN).bfloat16()
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
