"""Adafactor's step. Shapes: M, N sides of a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.optimizers import Settings, param_groups
from crnet.optimizers._torch import Optimizer, loss_of
from crnet.specs import TensorSpec


class Factored(Optimizer):
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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every tensor that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        options, state, gradient = self.options, self.state[parameter], parameter.grad
        assert gradient is not None
        state["step"] = state.get("step", 0) + 1
        count, rate = state["step"], group["lr"]
        update = self._over_root(gradient, state, count**-options.decay_power)
        divisor = _rms(update).div_(options.clip).clamp_(min=1)
        if options.beta1:
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter)
            update.div_(divisor.to(update.dtype))
            update = state["exp_avg"].lerp_(update, 1 - options.beta1)
            divisor = torch.ones_like(divisor)
        if options.rate == "relative":
            rate = min(rate, 1 / math.sqrt(count))
            divisor /= _rms(parameter).clamp_(min=options.eps2)
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
        squares = gradient.to(wide).square()
        row = _moved(state, "row", squares.mean(1, True).add_(self.options.eps1), weight)
        column = _moved(state, "column", squares.mean(0, True).add_(self.options.eps1), weight)
        roots = ((row / row.mean()).rsqrt(), column.rsqrt())
        row, column = (root.to(gradient.dtype) for root in roots)
        return (gradient * row).mul_(column)


def _moved(state: dict[str, Any], name: str, value: Tensor, weight: float) -> Tensor:
    """An average, moved by a share of the way to a value; the first value itself."""
    if name not in state:
        state[name] = torch.zeros_like(value)
    return state[name].lerp_(value, weight)


def _rms(x: Tensor) -> Tensor:
    """Root of the mean square; fp32, fp64 for fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dtype=wide).div_(max(1, x.numel()) ** 0.5)
