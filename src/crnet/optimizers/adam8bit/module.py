"""bitsandbytes' 8-bit update and torch's AdamW behind one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.optimizers import Settings, param_groups
from crnet.optimizers._eight_bits.module import EightBits
from crnet.optimizers._torch import AdamW, Optimizer, loss_of
from crnet.specs import TensorSpec


class Adam8bitAndAdamW(Optimizer):
    """Groups and state of both in one place. A group's ``part`` says who trains it."""

    def __init__(
        self,
        parameters: Mapping[str, tuple[TensorSpec, Tensor]],
        options: Any,
        settings: Settings,
        name: str,
    ):
        """Raises ``ConfigError``, which calls the optimizer by ``name``, where bitsandbytes is
        missing."""
        self.eight_bits = EightBits(name)
        narrow = {name: each for name, each in parameters.items() if options.takes(each[0])}
        others = {name: each for name, each in parameters.items() if name not in narrow}
        defaults: dict[str, Any] = {"betas": (settings.beta1, settings.beta2), "eps": settings.eps}
        groups = param_groups(narrow, settings, part="8 bits", **defaults)
        self.adam: AdamW | None = None
        if others:
            self.adam = AdamW(param_groups(others, settings, part="adam"), fused=True, **defaults)
            groups += self.adam.param_groups
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both."""
        loss = loss_of(closure)
        for group in self.param_groups:
            if group["part"] == "8 bits":
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step(parameter, group)
        if self.adam is not None:
            self.adam.state = self.state
            self.adam.param_groups = [it for it in self.param_groups if it["part"] == "adam"]
            self.adam.step()
        return loss

    def _step(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        state["step"] += 1
        assert parameter.grad is not None
        self.eight_bits.adam_(
            parameter,
            parameter.grad,
            state,
            rate=group["lr"],
            decay=group["weight_decay"],
            betas=group["betas"],
            eps=group["eps"],
            step=int(state["step"]),
        )
