"""bitsandbytes' 8-bit update and torch's AdamW behind one optimizer.

Of bitsandbytes the kernel alone is used. Its own optimizer keeps the table of codes in every
tensor's state, takes overrides from a global of the process, and writes its state in dicts within
dicts that a checkpoint here could not count.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.errors import ConfigError
from crnet.optimizers import Settings, param_groups
from crnet.optimizers._torch import AdamW, Optimizer, loss_of
from crnet.specs import TensorSpec


class Codes:
    """A map of 256 codes to values in [-1, 1], or [0, 1].

    A state holds codes less that of 0 (modulo 256): a byte of 0 is the value 0, so that an event
    that makes the optimizer forget is right for bytes too.
    """

    def __init__(self, table_256: Tensor):
        self.table = table_256
        (self.of_zero,) = (table_256 == 0).nonzero().flatten().tolist()

    def to(self, device: torch.device) -> Tensor:
        if self.table.device != device:
            self.table = self.table.to(device)
        return self.table


class Adam8bitAndAdamW(Optimizer):
    """Groups and state of both in one place. A group's ``part`` says who trains it."""

    def __init__(
        self,
        parameters: Mapping[str, tuple[TensorSpec, Tensor]],
        options: Any,
        settings: Settings,
        block: int,
    ):
        """``block``: items that share a maximum, the kernel's own number.

        Raises ``ConfigError`` where bitsandbytes is missing.
        """
        functional, self.block = _functional(), block
        self.first = Codes(functional.create_dynamic_map(signed=True))
        self.second = Codes(functional.create_dynamic_map(signed=False))
        self.update = functional.optimizer_update_8bit_blockwise
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
            state |= _empty(parameter, self.block)
        state["step"] += 1
        codes = (state["exp_avg"], self.first), (state["exp_avg_sq"], self.second)
        for stored, kind in codes:
            stored.add_(kind.of_zero)
        assert parameter.grad is not None
        gradient = parameter.grad.to(parameter.dtype).contiguous()
        beta1, beta2 = group["betas"]
        self.update(
            "adam",
            gradient,
            parameter,
            *(stored for stored, _ in codes),
            *(beta1, beta2, 0.0, 0.0, group["eps"]),
            int(state["step"]),
            group["lr"],
            *(kind.to(parameter.device) for _, kind in codes),
            *(state["exp_avg_max"], state["exp_avg_sq_max"]),
            group["weight_decay"],
        )
        for stored, kind in codes:
            stored.sub_(kind.of_zero)


def _empty(parameter: Tensor, block: int) -> dict[str, Tensor]:
    """Moments of 0."""
    codes = {
        name: torch.zeros(parameter.shape, dtype=torch.uint8, device=parameter.device)
        for name in ("exp_avg", "exp_avg_sq")
    }
    blocks = -(-parameter.numel() // block)
    largest = {
        f"{name}_max": torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
        for name in codes
    }
    return {"step": torch.zeros((), dtype=torch.float32), **codes, **largest}


def _functional() -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ConfigError(
            f"--optimizer.name adam8bit needs the package bitsandbytes ({error}); "
            "pip install 'crnet[optim8bit]'"
        ) from error
