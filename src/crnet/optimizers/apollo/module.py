"""APOLLO's step. Shapes: M, N sides of a matrix, R rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.optimizers import Settings, param_groups
from crnet.optimizers._projection import (
    TINY,
    gaussian,
    growth,
    is_right,
    norm_of,
    project,
    seed_of,
)
from crnet.optimizers._torch import Optimizer, loss_of
from crnet.specs import TensorSpec


class ProjectedAdam(Optimizer):
    """APOLLO for dense matrices, Adam with decoupled decay for the rest.

    State of a tensor: ``step``, a whole number; ``exp_avg`` and ``exp_avg_sq`` in its dtype, of the
    projected gradient where there is one; ``norm`` of the last step, fp32; ``projection`` where it
    is kept. Everything else follows from the options and the parameter's name. To restore it, take
    ``optimizers.load_state``, which leaves ``norm`` in fp32.
    """

    def __init__(
        self,
        parameters: Mapping[str, tuple[TensorSpec, Tensor]],
        options: Any,
        settings: Settings,
        per_channel: bool,
    ):
        dense = {name: each for name, each in parameters.items() if each[0].role == "matrix"}
        others = {name: each for name, each in parameters.items() if name not in dense}
        groups = param_groups(dense, settings, projects=True)
        groups += param_groups(others, settings, projects=False)
        self.options, self.settings, self.per_channel = options, settings, per_channel
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every tensor that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    self._step_one(name, parameter, group)
        return loss

    def _step_one(self, name: str, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        state["step"] = state.get("step", 0) + 1
        if group["projects"]:
            update = self._scaled_gradient(name, gradient, state)
        else:
            update = self._direction(gradient, state)
        beta1, beta2, step = self.settings.beta1, self.settings.beta2, state["step"]
        rate = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        parameter.add_(update, alpha=-rate)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def _direction(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        """Adam's direction of a gradient, without the correction of the bias."""
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(self.settings.eps)

    def _scaled_gradient(self, name: str, g_MN: Tensor, state: dict[str, Any]) -> Tensor:
        projected = project(g_MN, self._projection(name, g_MN, state))
        direction = self._direction(projected, state)
        side = int(is_right(tuple(g_MN.shape))) if self.per_channel else (0, 1)
        scales = norm_of(direction, side) / (norm_of(projected, side) + TINY)
        update = g_MN * scales.to(g_MN.dtype)
        root = math.sqrt(self.options.scale)
        if self.options.scale_front:
            update.mul_(root)
        if self.options.growth_limit:
            self._limit(update, state)
        return update if self.options.scale_front else update.mul_(root)

    def _projection(self, name: str, g_MN: Tensor, state: dict[str, Any]) -> Tensor:
        refresh_idx, since = divmod(state["step"] - 1, self.options.refresh_every)
        if since and "projection" in state:
            return state["projection"]
        seed = seed_of(self.settings.seed, name, refresh_idx)
        shape = tuple(g_MN.shape)
        p = gaussian(shape, self.options.rank, seed, g_MN.device, g_MN.dtype)
        if self.options.projection == "kept":
            state["projection"] = p
        return p

    def _limit(self, update: Tensor, state: dict[str, Any]) -> None:
        """Shrink a step whose norm grew too much; the first one is only noted."""
        norm = norm_of(update, (0, 1)).squeeze()
        excess = growth(norm, state.get("norm"), self.options.growth_limit)
        if excess is not None:
            update.div_(excess)
            norm = norm / excess
        state["norm"] = norm
