"""Optimizers that train some tensors their own way and leave the rest to torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.optimizers import Settings, param_groups
from crnet.optimizers._torch import AdamW, Optimizer, loss_of
from crnet.specs import TensorSpec

Parameters = Mapping[str, tuple[TensorSpec, Tensor]]
"""Trained ones, by full name."""


class BesideAdamW(Optimizer):
    """Groups and state of both in one place; a group's ``part`` says who trains it. AdamW holds
    nothing of its own: at every step it is lent groups and state.

    A subclass gives ``update``. Its tensors' specs are ``specs``, by parameter.
    """

    def __init__(self, own: Parameters, others: Parameters, settings: Settings):
        groups = param_groups(own, settings, part="own")
        self.specs = {tensor: spec for spec, tensor in own.values()}
        self.adam: AdamW | None = None
        if others:
            betas = (settings.beta1, settings.beta2)
            given = param_groups(others, settings, part="adam")
            self.adam = AdamW(given, betas=betas, eps=settings.eps, fused=True)
            groups += self.adam.param_groups
        super().__init__(groups, {})

    def update(self, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Step one tensor that has a gradient, in place, decay included."""
        raise NotImplementedError

    def step_own(self) -> None:
        """Step all of its own that have a gradient."""
        for group in self.param_groups:
            if group["part"] == "own":
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.update(parameter, self.state[parameter], group)
                        if not self.state[parameter]:  # nothing to save
                            del self.state[parameter]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both."""
        loss = loss_of(closure)
        self.step_own()
        if self.adam is not None:
            self.adam.state = self.state
            self.adam.param_groups = [it for it in self.param_groups if it["part"] == "adam"]
            self.adam.step()
        return loss


def split(
    parameters: Parameters, takes: Callable[[TensorSpec], bool]
) -> tuple[Parameters, Parameters]:
    """Those that a method takes, and the others."""
    own = {name: each for name, each in parameters.items() if takes(each[0])}
    return own, {name: each for name, each in parameters.items() if name not in own}


def decay(parameter: Tensor, group: Mapping[str, Any]) -> None:
    """Decoupled weight decay of one step."""
    if group["weight_decay"]:
        parameter.mul_(1 - group["lr"] * group["weight_decay"])


def output_dim(spec: TensorSpec) -> int:
    """The dimension of a map's matrix that counts its outputs: a dense matrix, and a head, are
    stored (out, in); a factor, and an embedding, (in, out)."""
    return 0 if spec.role in ("matrix", "head") else 1
