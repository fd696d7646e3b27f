"""Stable-SPAM's treatment of gradients before torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.optimizers import Settings, param_groups
from crnet.optimizers._torch import AdamW, adam_, loss_of
from crnet.specs import TensorSpec


class SpikeAwareAdamW(AdamW):
    """State of a tensor: AdamW's; ``norm``, ``norm_sq`` and ``largest``, averages, scalars of fp32
    (fp64 for fp64); ``since``, steps that the averages count, and ``total``, numbers."""

    def __init__(
        self,
        parameters: Mapping[str, tuple[TensorSpec, Tensor]],
        options: Any,
        settings: Settings,
    ):
        betas = (settings.beta1, settings.beta2)
        super().__init__(
            param_groups(parameters, settings), betas=betas, eps=settings.eps, fused=True
        )
        self._step_supports_amp_scaling = False  # the averages would count a step passed over
        self.options = options

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every tensor that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)
        return loss

    def _step_one(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        """Its gradient without spikes is there for this moment alone."""
        is_due, state = self._begin(parameter), self.state[parameter]
        changed = self._without_spikes(gradient, state)
        if is_due and self.options.released:
            state["step"].zero_()  # the count restarts, the moments do not yet
        elif is_due:
            self._restart(state, 0)
        state["step"] += 1
        adam_(
            parameter,
            changed,
            state["exp_avg"],
            state["exp_avg_sq"],
            rate=group["lr"],
            lost=group["lr"] * group["weight_decay"],
            betas=group["betas"],
            eps=group["eps"],
            step=state["step"],
        )
        if is_due and self.options.released:
            self._restart(state, 1)

    def _begin(self, parameter: Tensor) -> bool:
        """Count one more step of a tensor; whether its moments are due to restart."""
        state, every = self.state[parameter], self.options.reset_every
        if not state:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            for name in ("norm", "norm_sq", "largest"):
                state[name] = torch.zeros((), dtype=wide, device=parameter.device)
            state["since"] = state["total"] = 0
        state["since"] += 1
        state["total"] += 1
        return bool(every) and state["total"] % every == 0

    def _without_spikes(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        options, since = self.options, state["since"]
        low, high = torch.aminmax(gradient)
        largest = torch.maximum(high, -low)
        limit = _average(state["largest"], largest, options.theta, since).to(gradient.dtype)
        # On a GPU nothing waits for the answer; elsewhere most gradients have no spike.
        if gradient.is_cuda or largest > limit:
            is_spike = gradient.abs() > limit
            gradient = torch.where(is_spike, gradient * (limit / largest), gradient)
        norm = torch.linalg.vector_norm(gradient, dtype=state["norm"].dtype)
        mean = _average(state["norm"], norm, options.gamma1, since)
        mean_sq = _average(state["norm_sq"], norm.square(), options.gamma2, since)
        wanted = mean / (mean_sq.sqrt() + self.defaults["eps"])
        factor = torch.where(norm > 0, wanted / norm, 1.0)
        return gradient * factor.to(gradient.dtype)

    def _restart(self, state: dict[str, Any], count: int) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].zero_()
        state["step"].fill_(count)
        if self.options.released:
            state["since"] = count


def _average(state: Tensor, value: Tensor, decay: float, count: int) -> Tensor:
    """Move an average by one value; return it with its bias corrected."""
    state.lerp_(value.to(state.dtype), 1 - decay)
    return state / (1 - decay**count)
