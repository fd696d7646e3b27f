"""One optimizer step: accumulate, check, clip, set the rate, step, events, forget."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from crnet import optimizers, schedules
from crnet.config.check import steps_of
from crnet.config.model_spec import ModelSpec, model_at
from crnet.config.sections import RunConfig, options_of, settings_of, share_of, update_of
from crnet.config.serialize import override
from crnet.cost.workload import num_micro_batches
from crnet.data.rows import IGNORED, Batches, Rows
from crnet.errors import TrainingError
from crnet.model.events import run_events
from crnet.model.language_model import LanguageModel
from crnet.optimizers import _low_precision as low_precision
from crnet.optimizers._composed import decay, tensors_of_pairs, without_own_decay
from crnet.optimizers._fused_backward.module import FusedBackward
from crnet.optimizers._torch import passes_over
from crnet.parallel import owners
from crnet.parallel.engine import Engine, TokensAndTargets
from crnet.storage.checkpoint import Progress

LOOKED_ROWS = 8
"""Most rows of the first batch that maps look at, whatever the micro-batch."""


def learning_rate(step: int, config: RunConfig) -> float:
    """The base rate of optimizer step ``step``, counted from 1."""
    schedule = schedules.get(config.optimizer.schedule)
    options = options_of(config.optimizer, schedule.name)
    return config.optimizer.lr * schedule.factor(step, options, steps_of(config))


def last_stable_step(config: RunConfig) -> int | None:
    """``Schedule.last_stable`` of a run."""
    schedule = schedules.get(config.optimizer.schedule)
    return schedule.last_stable(options_of(config.optimizer, schedule.name), steps_of(config))


@dataclass
class Stepped:
    """What a step was like. On a GPU its figures may still be on their way: reading one waits."""

    num_tokens: int
    lr: float
    _numbers: Tensor
    """Loss and norm of the gradient, fp64, on the CPU once ``_arrived``."""
    _arrived: Any
    """A CUDA event; None: they are there."""
    _complain: Callable[[float, float], str]

    @property
    def loss(self) -> float:
        """Mean over target tokens, nats, before the step."""
        return self._read()[0]

    @property
    def grad_norm(self) -> float:
        """Before clipping."""
        return self._read()[1]

    def check(self) -> None:
        """Raise ``TrainingError`` where the loss or the gradient was not finite."""
        loss, norm = self._read()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(self._complain(loss, norm))

    def _read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._numbers.tolist()


class Step:
    """The step of one run. Called with one batch, it changes weights and optimizer once.

    Where the optimizer itself can pass over a step (torch's fused ones: ``found_inf``) and the
    device is a GPU, the step is ``late``: nothing waits for the device. Weights and optimizer stay
    as they are where loss or gradient is not finite, and the error comes before the next update,
    or as soon as somebody reads a figure (``Stepped.check``). Elsewhere the host reads both figures
    at once, in one wait, and updates only then.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        late: bool | None = None,
    ):
        """``late``: None: on a GPU, where the optimizer allows it, nothing is sharded and no update
        is fused with the backward pass."""
        self.config, self.engine, self.optimizer, self.device = config, engine, optimizer, device
        self.model, self.world = engine.model, engine.world
        self._parameters = self._trained()
        composed = config.optimizer.decay == "composed"
        self._pairs = tensors_of_pairs(self.model.trained()) if composed else []
        self._fused = self._fuse()
        can = passes_over(optimizer) and not (engine.is_split or composed or self._fused)
        self.late = can and (device.type == "cuda" if late is None else late)
        self._unread: Stepped | None = None

    def __call__(
        self, micro_batches: Sequence[TokensAndTargets], at: Progress, good: Path | None
    ) -> Stepped:
        """Take one step.

        Args:
            micro_batches: this process's share of the batch, in parts, on the CPU.
            at: where the run stands before the step.
            good: the last checkpoint, to be named where the step fails.
        Raises:
            TrainingError: the loss or the gradient is not finite, of this step, or, where steps are
                late, of the one before; the weights are not changed by it, but for an update that
                is fused with the backward pass and had begun, which the message says.
        """
        step, clip = at.step + 1, self.config.optimizer.clip_norm
        counts = [(targets != IGNORED).sum() for _, targets in micro_batches]
        num_tokens = int(self.world.sum(torch.stack(counts).sum()))
        self.optimizer.zero_grad(set_to_none=not self.engine.keeps_gradients)
        lr = learning_rate(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        parts, fused = list(self._on_device(micro_batches)), self._fused
        loss_sum = self.engine.accumulate(parts, num_tokens, self._autocast, fused)
        self.world.sum(loss_sum)
        norm = (fused or self.engine).norm(self._parameters)
        numbers = torch.stack([loss_sum / num_tokens, norm.to(loss_sum.dtype)])
        done = Stepped(num_tokens, lr, *_to_host(numbers), self._complaint(at, good))
        self.check()
        if self.late:
            self._update_unless_non_finite(numbers, norm)
        elif fused:
            done.check()
            fused.finish()
        else:
            done.check()
            if clip:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, clip, norm)
            decay(self._pairs, self.optimizer, self.config.optimizer.weight_decay)
            self.optimizer.step()
        if self.late and self.model.has_events(step):
            done.check()
        self._unread = done if self.late else None
        self.run_events(step)
        return done

    def _update_unless_non_finite(self, numbers: Tensor, norm: Tensor) -> None:
        """The optimizer's step, clipped, or none: the device decides. Gradients are divided as they
        are read, so that clipping takes no pass of its own."""
        clip, optimizer = self.config.optimizer.clip_norm, cast("Any", self.optimizer)
        if clip:  # torch's own rule (clip_grads_with_norm_), turned over
            optimizer.grad_scale = ((norm.float() + 1e-6) / clip).clamp(min=1)
        optimizer.found_inf = (~torch.isfinite(numbers).all()).float()
        try:
            optimizer.step()
        finally:
            optimizer.found_inf = optimizer.grad_scale = None

    def check(self) -> None:
        """Raise ``TrainingError`` where the latest step was late and not finite."""
        if self._unread is not None:
            self._unread.check()

    def begin(self, rows: Rows | None) -> None:
        """What comes before the first step: where the parameterization wants it, maps look at the
        first training rows, all processes at the same; then what is due at step 0.

        ``rows``: of training; None: nobody looks.
        """
        train, spec = self.config.train, self.model.spec
        if rows is not None and spec.linear.looks and spec.adapter is None:
            batch = Batches(rows, train.seed, train.batch_size).next(LOOKED_ROWS)[:1]
            with self.model.looking(), self._autocast():
                for tokens, targets in self._on_device(batch):
                    self.engine.sums(tokens, targets)
        self.run_events(0)

    def run_events(self, step: int) -> None:
        """What the parameterization has due once ``step`` steps are done; the optimizer forgets.
        Then the model is the one of that step (``ModelSpec.at``)."""
        around = self.engine.around_events()
        run_events(self.model, self.optimizer, step, self.config.train.seed, around)
        config = model_at(self.config.model, step, self.config.train.steps)
        self._become(dataclasses.replace(self.model.spec, config=config))

    def _become(self, spec: ModelSpec) -> None:
        """Make the model another one. Where tensors leave it, the optimizer and what wraps the
        model are made anew, as a resumed run makes them; every state that is left stays."""
        if self.late and self.model.dropped_by(spec):
            self.check()
        if not self.model.become(spec):
            return
        former = self.optimizer
        former.zero_grad(set_to_none=True)
        self.engine.wrap()
        self.optimizer = make_optimizer(self.config, self.model)
        optimizers.take_over(self.optimizer, former)
        self._parameters = self._trained()
        if self._fused:
            self._fused.remove()
        self._fused = self._fuse()

    def _trained(self) -> list[Tensor]:
        return [parameter for _, parameter in self.model.trained().values()]

    def _fuse(self) -> FusedBackward | None:
        """What updates within the backward pass; None: nothing does."""
        section = self.config.optimizer
        if not section.fused_backward:
            return None
        decay = section.weight_decay if section.decay == "composed" else 0.0
        method = optimizers.get(section.name)
        return FusedBackward(method, self.optimizer, self.model.trained(), composed_decay=decay)

    def _on_device(self, micro_batches: Sequence[TokensAndTargets]) -> Iterable[TokensAndTargets]:
        """The micro-batches of a step; to a GPU in one copy of half the size, from pinned memory,
        so that the host does not wait."""
        if self.device.type != "cuda":
            return [(a.to(self.device), b.to(self.device)) for a, b in micro_batches]
        both = one_tensor(micro_batches).pin_memory().to(self.device, non_blocking=True)
        return in_parts(both, [len(tokens) for tokens, _ in micro_batches])

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16-mixed"
        )

    def _complaint(self, at: Progress, good: Path | None) -> Callable[[float, float], str]:
        """What to say of a loss and a norm that are not finite."""
        end = at.position + self.config.train.batch_size
        return lambda loss, norm: (
            f"step {at.step + 1}: loss {loss}, gradient norm {norm}; {self._changed()}. "
            f"The step read the sequences at positions {at.position} to {end - 1}. "
            f"Last good checkpoint: {good or 'none was saved yet'}. "
            "Try a smaller --optimizer.lr, a longer --optimizer.warmup-frac or --train.precision "
            "fp32"
        )

    def _changed(self) -> str:
        """Whether a step that failed has changed weights."""
        if self._fused is None or not self._fused.has_begun():
            return "the weights were not changed"
        return (
            "some weights are changed already (--optimizer.fused-backward) and no checkpoint is "
            "written of them, so go on from the last good one with --resume"
        )


def make_optimizer(config: RunConfig, model: LanguageModel) -> torch.optim.Optimizer:
    """The optimizer of a model's trained parameters."""
    section = config.optimizer
    settings = settings_of(section, config.train.seed, config.train.steps)
    method, options = optimizers.get(section.name), options_of(section, section.name)
    parameters, update = model.trained(), update_of(config.train)
    one = override(config, train={"batch_size": share_of(config)}).train
    low_precision.widen_gradients(parameters, update, num_micro_batches(one))
    if section.decay == "composed":
        parameters = without_own_decay(parameters)
    return owners.build(method, parameters, options, settings, update)


def one_tensor(micro_batches: Sequence[TokensAndTargets]) -> Tensor:
    """Tokens and targets of every micro-batch, int32, (2, rows, T)."""
    columns = (torch.cat(column) for column in zip(*micro_batches, strict=True))
    return torch.stack([column.int() for column in columns])


def in_parts(both: Tensor, sizes: Sequence[int]) -> list[TokensAndTargets]:
    """Inverse of ``one_tensor``, int64, on the tensor's device; ``sizes``: rows of each part."""
    tokens, targets = both.long()
    return list(zip(tokens.split(list(sizes)), targets.split(list(sizes)), strict=True))


def _to_host(numbers: Tensor) -> tuple[Tensor, Any]:
    """Numbers on the CPU, and the event after which they are there; nothing waits."""
    if numbers.device.type != "cuda":
        return numbers, None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived
