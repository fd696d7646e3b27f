"""Adafactor's step. Shapes: M, N sides of a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.optimizers import Settings, param_groups
from crnet.optimizers._norms import root_mean_square, squares_over
from crnet.optimizers._torch import OneByOne
from crnet.specs import TensorSpec


class Factored(OneByOne):
    """State of a tensor: ``step``, a number; ``row`` (M, 1) and ``column`` (1, N), or
    ``exp_avg_sq`` of its shape, fp32 (fp64 for fp64); with a momentum ``exp_avg``, in its dtype."""

    def __init__(
        self,
        parameters: Mapping[str, tuple[TensorSpec, Tensor]],
        options: Any,
        settings: Settings,
    ):
        self.options = options
        super().__init__(param_groups(parameters, settings), {})

    def _step_one(
        self, name: str, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        options, gradient = self.options, parameter.grad
        assert gradient is not None
        count, rate = state["step"], group["lr"]
        update = self._over_root(gradient, state, count**-options.decay_power)
        divisor = root_mean_square(update).div_(options.clip).clamp_(min=1)
        if options.beta1:
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter)
            update.div_(divisor.to(update.dtype))
            update = state["exp_avg"].lerp_(update, 1 - options.beta1)
            divisor = torch.ones_like(divisor)
        if options.rate == "relative":
            rate = min(rate, 1 / math.sqrt(count))
            divisor /= root_mean_square(parameter).clamp_(min=options.eps2)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(update, divisor.to(parameter.dtype), value=-rate)

    def _over_root(self, gradient: Tensor, state: dict[str, Any], weight: float) -> Tensor:
        """The gradient over the root of its second moment, which takes in its squares by
        ``weight``."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        if gradient.dim() != 2:
            squares = gradient.to(wide).square().add_(self.options.eps1)
            second = _moved(state, "exp_avg_sq", squares, weight)
            return (gradient * second.rsqrt()).to(gradient.dtype)
        means = [
            squares_over(gradient, side).div_(gradient.shape[side]).add_(self.options.eps1)
            for side in (1, 0)
        ]
        row = _moved(state, "row", means[0], weight)
        column = _moved(state, "column", means[1], weight)
        roots = ((row / row.mean()).rsqrt(), column.rsqrt())
        row, column = (root.to(gradient.dtype) for root in roots)
        return (gradient * row).mul_(column)


def _moved(state: dict[str, Any], name: str, value: Tensor, weight: float) -> Tensor:
    """An average, moved by a share of the way to a value; the first value itself."""
    if name not in state:
        state[name] = torch.zeros_like(value)
    return state[name].lerp_(value, weight)
