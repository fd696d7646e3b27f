"""One optimizer step: accumulate, check, clip, set the rate, step, events, forget."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crnet import schedules
from crnet.config.check import steps_of
from crnet.config.sections import RunConfig, options_of
from crnet.data.rows import IGNORED
from crnet.errors import TrainingError
from crnet.model.events import run_events
from crnet.model.language_model import LanguageModel
from crnet.storage.checkpoint import Progress

TokensAndTargets = tuple[Tensor, Tensor]
"""Tokens and targets, (B, T)."""


def learning_rate(step: int, config: RunConfig) -> float:
    """The base rate of optimizer step ``step``, counted from 1."""
    schedule = schedules.get(config.optimizer.schedule)
    options = options_of(config.optimizer, schedule.name)
    return config.optimizer.lr * schedule.factor(step, options, steps_of(config))


@dataclass(frozen=True)
class Stepped:
    """What a step was like."""

    loss: float
    """Mean over target tokens, nats, before the step."""
    grad_norm: float
    """Before clipping."""
    num_tokens: int
    lr: float


class Step:
    """The step of one run. Called with one batch, it changes weights and optimizer once."""

    def __init__(
        self,
        config: RunConfig,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ):
        self.config, self.model, self.optimizer, self.device = config, model, optimizer, device
        self._parameters = [parameter for _, parameter in model.trained().values()]

    def __call__(
        self, micro_batches: Sequence[TokensAndTargets], at: Progress, good: Path | None
    ) -> Stepped:
        """Take one step.

        Args:
            micro_batches: the batch, in parts.
            at: where the run stands before the step.
            good: the last checkpoint, to be named where the step fails.
        Raises:
            TrainingError: the loss or the gradient is not finite; the weights are not changed.
        """
        step, clip = at.step + 1, self.config.optimizer.clip_norm
        num_tokens = sum(int((targets != IGNORED).sum()) for _, targets in micro_batches)
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = self._accumulate(micro_batches, num_tokens)
        norm = torch.nn.utils.get_total_norm(
            [each.grad for each in self._parameters if each.grad is not None]
        )
        loss, grad_norm = (loss_sum / num_tokens).item(), _number(norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingError(self._non_finite(loss, grad_norm, at, good))
        if clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, clip, norm)
        lr = learning_rate(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.optimizer.step()
        self.run_events(step)
        return Stepped(loss, grad_norm, num_tokens, lr)

    def run_events(self, step: int) -> None:
        """What the parameterization has due once ``step`` steps are done; the optimizer forgets."""
        run_events(self.model, self.optimizer, step, self.config.train.seed)

    def _accumulate(self, micro_batches: Sequence[TokensAndTargets], num_tokens: int) -> Tensor:
        """Gradients of the mean over the whole batch; returns the summed loss, fp64."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for tokens, targets in micro_batches:
            tokens = tokens.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            with self._autocast():
                micro_loss, _ = self.model(tokens, targets)
            # Divided by the whole step's tokens: micro-batches add up to the batch, padded or not.
            (micro_loss / num_tokens).backward()
            loss_sum += micro_loss.detach()
        return loss_sum

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16-mixed"
        )

    def _non_finite(self, loss: float, norm: float, at: Progress, good: Path | None) -> str:
        end = at.position + self.config.train.batch_size
        return (
            f"step {at.step + 1}: loss {loss}, gradient norm {norm}; the weights were not changed. "
            f"The step read the sequences at positions {at.position} to {end - 1}. "
            f"Last good checkpoint: {good or 'none was saved yet'}. "
            "Try a smaller --optimizer.lr, a longer --optimizer.warmup-frac or --train.precision "
            "fp32"
        )


def _number(norm: Any) -> float:
    # Of sharded gradients it is a sum that is still spread over the ranks.
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
