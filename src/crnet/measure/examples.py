"""Small runs in which a method is tried: a model, an optimizer, one batch."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crnet import optimizers, schedules
from crnet.architectures import Architecture
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import (
    ModelConfig,
    OptimizerConfig,
    field_name,
    options_of,
    settings_of,
)
from crnet.linears import Parameterization
from crnet.model.build import build
from crnet.model.events import run_events
from crnet.model.language_model import LanguageModel
from crnet.optimizers import OptimizerMethod, Settings, take_over
from crnet.optimizers import _low_precision as low_precision
from crnet.optimizers._fused_backward.module import FusedBackward
from crnet.optimizers._low_precision import Bf16Update
from crnet.schedules import Schedule, Steps
from crnet.streams import Stream

VOCAB_SIZE = 31
SCHEDULED_STEPS = 80
"""Of the schedule that small runs begin."""


@dataclass(frozen=True)
class Example:
    """A method with one set of its options, in a small run."""

    method: Any
    model: ModelConfig
    optimizer: OptimizerConfig
    is_default: bool = True
    """Whether the options are the default ones: further examples are held to less, for time."""

    @property
    def spec(self) -> ModelSpec:
        return model_spec(self.model)

    @property
    def settings(self) -> Settings:
        return settings_of(self.optimizer, seed=0, num_steps=SCHEDULED_STEPS)

    @property
    def optimizer_method(self) -> OptimizerMethod:
        return optimizers.get(self.optimizer.name)

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> LanguageModel:
        return build(self.spec, seed, dtype=dtype)

    def build_optimizer(
        self, model: LanguageModel, update: Bf16Update | None = None
    ) -> torch.optim.Optimizer:
        """``update``: of a bf16 model; None: the method's own work on it."""
        method = self.optimizer_method
        options = options_of(self.optimizer, method.name)
        return low_precision.build(method, model.trained(), options, self.settings, update)


def examples(method: Any) -> list[Example]:
    """A small run with the method's default options, and one with each of its ``examples``."""
    default = _example(method, method.Options and method.Options())
    more = [_example(method, options) for options in method.examples]
    return [default, *(dataclasses.replace(each, is_default=False) for each in more)]


def _example(method: Any, options: Any) -> Example:
    sections = {Parameterization: "linear", Stream: "stream", Architecture: "architecture"}
    chosen = {} if options is None else {field_name(method.name): options}
    model, optimizer = small_model(), OptimizerConfig(lr=2e-2, weight_decay=0.01)
    if isinstance(method, OptimizerMethod):
        chosen |= {"name": method.name, "lr": method.tried_lr}
        return Example(method, model, dataclasses.replace(optimizer, **chosen))
    if isinstance(method, Schedule):
        changed = dataclasses.replace(optimizer, schedule=method.name, **chosen)
        return Example(method, model, changed)
    for base, key in sections.items():
        if isinstance(method, base):
            model = dataclasses.replace(model, **{key: method.name}, **chosen)
            return Example(method, _with_heads(model), optimizer)
    raise TypeError(f"{method!r} derives from no seam's base class")


def small_model(**changes: Any) -> ModelConfig:
    """Three blocks, 16 wide, grouped key/value heads."""
    sizes = {
        "rank": "4",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": VOCAB_SIZE,
    }
    return ModelConfig(**(sizes | changes))


def _with_heads(model: ModelConfig) -> ModelConfig:
    """Without grouped heads where the architecture has none."""
    spec = model_spec(model)
    if spec.architecture.problems(spec.shape, spec.architecture_options):
        return dataclasses.replace(model, num_kv_heads=None)
    return model


def batch(length: int = 8) -> tuple[Tensor, Tensor]:
    """Four rows of random tokens, and what follows each."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB_SIZE, (4, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train(
    example: Example,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    steps: int,
    start: int = 0,
    *,
    is_fused: bool = False,
) -> list[float]:
    """Mean loss before each step, events and schedule as in training.

    ``is_fused``: updates are taken inside the backward pass; of a model that keeps its tensors.
    Where tensors leave the model, ``optimizer`` is the one of before, and not to be used again.
    """
    schedule = schedules.get(example.optimizer.schedule)
    options = options_of(example.optimizer, schedule.name)
    losses = []
    spec = example.spec
    model.become(spec.at(start, SCHEDULED_STEPS))
    fused = (
        FusedBackward(example.optimizer_method, optimizer, model.trained()) if is_fused else None
    )
    for step in range(start + 1, start + steps + 1):
        optimizer.zero_grad()
        factor = schedule.factor(step, options, Steps(SCHEDULED_STEPS, 0.1, 0.1))
        for group in optimizer.param_groups:
            group["lr"] = example.optimizer.lr * group["lr_factor"] * factor
        total, count = model(*batch())
        with fused.updating(total.detach()) if fused else contextlib.nullcontext():
            (total / count).backward()
        if fused:
            fused.finish()
        else:
            optimizer.step()
        run_events(model, optimizer, step, seed=0)
        if model.become(spec.at(step, SCHEDULED_STEPS)):
            former, optimizer = optimizer, example.build_optimizer(model)
            take_over(optimizer, former)
        losses.append(float(total.detach() / count))
    if fused:
        fused.remove()
    return losses
