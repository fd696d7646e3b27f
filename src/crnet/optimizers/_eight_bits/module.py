"""bitsandbytes' 8-bit update on one tensor.

Of bitsandbytes the kernel alone is used. Its own optimizer keeps the table of codes in every
tensor's state, takes overrides from a global of the process, and writes its state in dicts within
dicts that a checkpoint here could not count.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from crnet.errors import ConfigError
from crnet.optimizers._eight_bits import BLOCK


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


class EightBits:
    """The update, and the tables of its codes.

    Args:
        name: of the optimizer that asks, for the message.
    Raises:
        ConfigError: bitsandbytes is missing.
    """

    def __init__(self, name: str):
        functional = _functional(name)
        self.first = Codes(functional.create_dynamic_map(signed=True))
        self.second = Codes(functional.create_dynamic_map(signed=False))
        self.update = functional.optimizer_update_8bit_blockwise

    def adam_(
        self,
        target: Tensor,
        gradient: Tensor,
        state: dict[str, Any],
        *,
        rate: float,
        decay: float = 0.0,
        betas: tuple[float, float],
        eps: float,
        step: int,
    ) -> None:
        """AdamW on one tensor, the bias corrected; its decay is ``rate decay``, before the step.

        Args:
            state: gets ``exp_avg``, ``exp_avg_sq`` (codes, shape of the gradient) and their maxima
                (``exp_avg_max``, ``exp_avg_sq_max``, fp32), of 0 where they are missing.
        """
        if "exp_avg" not in state:
            state |= _empty(gradient)
        codes = (state["exp_avg"], self.first), (state["exp_avg_sq"], self.second)
        for stored, kind in codes:
            stored.add_(kind.of_zero)
        self.update(
            "adam",
            gradient.to(target.dtype).contiguous(),
            target,
            *(stored for stored, _ in codes),
            *(*betas, 0.0, 0.0, eps),
            step,
            rate,
            *(kind.to(target.device) for _, kind in codes),
            *(state["exp_avg_max"], state["exp_avg_sq_max"]),
            decay,
        )
        for stored, kind in codes:
            stored.sub_(kind.of_zero)


def _empty(gradient: Tensor) -> dict[str, Tensor]:
    """Moments of 0."""
    codes = {
        name: torch.zeros(gradient.shape, dtype=torch.uint8, device=gradient.device)
        for name in ("exp_avg", "exp_avg_sq")
    }
    blocks = -(-gradient.numel() // BLOCK)
    largest = {
        f"{name}_max": torch.zeros(blocks, dtype=torch.float32, device=gradient.device)
        for name in codes
    }
    return codes | largest


def _functional(name: str) -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ConfigError(
            f"--optimizer.name {name} needs the package bitsandbytes ({error}); "
            "pip install 'crnet[optim8bit]'"
        ) from error
