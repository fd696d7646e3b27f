"""AdamW (Loshchilov and Hutter 2019), torch's own, fused where the device has it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crnet.config.sections import OptimizerConfig
    from crnet.optimizers import Group


class AdamW:
    name = "adamw"
    summary = "Adam with decoupled weight decay"
    shards = True

    def build(self, groups: Iterable[Group], config: OptimizerConfig):
        import torch

        return torch.optim.AdamW(
            [
                {
                    "params": list(group.parameters),
                    "lr": config.lr * group.lr_factor,
                    "lr_factor": group.lr_factor,
                    "weight_decay": config.weight_decay if group.decays else 0.0,
                }
                for group in groups
            ],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def state_bytes(self, shape: tuple[int, ...], item_bytes: int) -> int:
        # Two moments in the parameter's dtype, and torch's step counter, an fp32 scalar.
        return 2 * math.prod(shape) * item_bytes + 4


METHODS = [AdamW()]
