"""torch's Muon and AdamW behind one optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.optimizers import Settings, param_groups
from crnet.optimizers._torch import AdamW, Optimizer, body, loss_of
from crnet.specs import TensorSpec


class Muon(Optimizer, torch.optim.Muon):
    """torch's."""

    step = torch.no_grad()(body(torch.optim.Muon, "step"))


class MuonAndAdamW(Optimizer):
    """Groups and state of both in one place, so that schedules and checkpoints see one optimizer.

    A group's ``part`` says who trains it. The two inner optimizers hold nothing of their own: at
    every step they are lent groups and state.
    """

    def __init__(
        self,
        parameters: Mapping[str, tuple[TensorSpec, Tensor]],
        options: Any,
        settings: Settings,
    ):
        of_muon = {name: each for name, each in parameters.items() if options.takes(each[0])}
        others = {name: each for name, each in parameters.items() if name not in of_muon}
        adam_settings = dataclasses.replace(settings, lr=settings.lr * options.adam_lr_factor)
        groups = {
            "muon": param_groups(of_muon, settings, part="muon"),
            "adam": param_groups(others, adam_settings, part="adam"),
        }
        for group in groups["adam"]:
            group["lr_factor"] *= options.adam_lr_factor
            group["lr"] = settings.lr * group["lr_factor"]
        self.parts: dict[str, Optimizer] = {}
        if of_muon:
            self.parts["muon"] = Muon(
                groups["muon"],
                momentum=options.momentum,
                nesterov=options.nesterov,
                ns_steps=options.ns_steps,
                adjust_lr_fn=options.adjust_lr_fn,
            )
        if others:
            betas = (settings.beta1, settings.beta2)
            self.parts["adam"] = AdamW(groups["adam"], betas=betas, eps=settings.eps, fused=True)
        super().__init__([each for part in self.parts.values() for each in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both."""
        loss = loss_of(closure)
        for name, part in self.parts.items():
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["part"] == name]
            part.step()
        return loss
