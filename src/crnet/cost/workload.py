"""What a run asks of a machine, worked out once from its configuration.

Below this file nobody takes a ``RunConfig``.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

from crnet import architectures, optimizers
from crnet.config.check import check
from crnet.config.model_spec import ModelSpec, model_spec, shape_of
from crnet.config.sections import (
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    adapter_of,
    choose,
    model_of,
    options_of,
    precision_of,
    update_of,
)
from crnet.cost.micro_batch import MicroBatch
from crnet.cost.plan_choice import plan_of
from crnet.errors import ConfigError
from crnet.optimizers import _fused_backward as fused_backward
from crnet.optimizers import _low_precision as low_precision
from crnet.optimizers._low_precision import Bf16Update
from crnet.recompute.plan import RecomputePlan
from crnet.specs import TensorSpec


@dataclass(frozen=True)
class Workload:
    """A run's model, micro-batch, optimizer and recomputation."""

    name: str
    """Of the preset."""
    spec: ModelSpec
    micro_batch: MicroBatch
    num_micro_batches: int
    """In one optimizer step."""
    optimizer: OptimizerConfig
    plan: RecomputePlan
    update: Bf16Update | None
    """How bf16 weights take their updates; None in another precision."""
    num_steps: int
    """Of the run."""

    def num_parameters(self) -> int:
        """Items of every tensor."""
        return sum(tensor.num_items for tensor in self.spec.tensors.values())

    def num_steps_whole(self) -> int:
        """Steps of the run until tensors leave the model (``ModelSpec.at``); all, where none do."""
        if self.spec.is_fixed:
            return self.num_steps
        names = self.spec.tensors.keys()
        steps = range(1, self.num_steps)
        gone = bisect.bisect_left(
            steps, True, key=lambda step: self.spec.at(step, self.num_steps).tensors.keys() != names
        )
        return gone + 1

    def at_end(self) -> Workload | None:
        """The same with the model that is left after the last step; None: it is this one."""
        spec = self.spec.at(self.num_steps, self.num_steps)
        if self.spec.is_fixed or spec.tensors.keys() == self.spec.tensors.keys():
            return None
        return dataclasses.replace(
            self, spec=spec, micro_batch=dataclasses.replace(self.micro_batch, spec=spec)
        )

    @cached_property
    def state_bytes(self) -> dict[str, int]:
        """Bytes of ``weights``, ``gradients`` and ``optimizer state`` beside a backward pass.

        Where the update is fused with it, ``gradients`` are those that wait for its end; the others
        live for a moment and are in its peak.
        """
        return state_bytes(
            self.spec.tensors.values(), self.optimizer, self.update, self.num_micro_batches
        )

    @cached_property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients."""
        return self.bytes_of_gradients(self.spec.tensors.values())

    def bytes_of_gradients(self, tensors: Iterable[TensorSpec]) -> int:
        """Bytes of the gradients of those that are trained."""
        return gradient_bytes(tensors, self.update, self.num_micro_batches)

    @cached_property
    def gradients_at_once(self) -> int:
        """Most bytes of gradients that are there at once where the update is fused with the
        backward pass: those that wait for its end, and the largest that is, or are, updated at
        once. All, where micro-batches add up."""
        trained = {name: each for name, each in self.spec.tensors.items() if each.trained}
        if self.num_micro_batches > 1:
            return self.gradient_bytes
        method, composed = optimizers.get(self.optimizer.name), self.optimizer.decay == "composed"

        def size(of: Iterable[str]) -> int:
            return self.bytes_of_gradients([trained[name] for name in of])

        waiting = size(name for name, each in trained.items() if fused_backward.waits(each))
        units = fused_backward.updated_at_once(method, trained, composed)
        return waiting + max(map(size, units), default=0)

    def with_fused(self, is_fused: bool) -> Workload:
        """The same run whose update is fused with the backward pass, or is not."""
        optimizer = dataclasses.replace(self.optimizer, fused_backward=is_fused)
        return dataclasses.replace(self, optimizer=optimizer)


def state_bytes(
    tensors: Collection[TensorSpec],
    optimizer: OptimizerConfig,
    update: Bf16Update | None,
    num_micro_batches: int,
) -> dict[str, int]:
    """Bytes of ``weights``, ``gradients`` and ``optimizer state`` of these tensors, as of
    ``Workload.state_bytes``.

    ``optimizer state`` holds the fp32 masters of bf16 weights. ``update`` is None where the weights
    are fp32.
    """
    method = optimizers.get(optimizer.name)
    options = options_of(optimizer, method.name)
    weight_bytes = 4 if update is None else 2
    sizes = [(tensor, tensor.item_bytes(weight_bytes)) for tensor in tensors]
    trained = [(tensor, size) for tensor, size in sizes if tensor.trained]
    stay = tensors
    if optimizer.fused_backward and num_micro_batches == 1:
        stay = [tensor for tensor in tensors if fused_backward.waits(tensor)]
    return {
        "weights": sum(tensor.num_items * size for tensor, size in sizes),
        "gradients": gradient_bytes(stay, update, num_micro_batches),
        "optimizer state": sum(
            low_precision.state_bytes(method, tensor, options, size, update)
            for tensor, size in trained
        ),
    }


def gradient_bytes(
    tensors: Iterable[TensorSpec], update: Bf16Update | None, num_micro_batches: int
) -> int:
    """Bytes of the gradients of those that are trained. Arguments: as of ``state_bytes``."""
    weight_bytes, of_item = 4 if update is None else 2, low_precision.gradient_item_bytes
    return sum(
        each.num_items * of_item(each.item_bytes(weight_bytes), update, num_micro_batches)
        for each in tensors
        if each.trained
    )


def resolved(config: RunConfig) -> RunConfig:
    """The configuration with a vocabulary size: the model's, or the one its tokenizer will have."""
    return dataclasses.replace(config, model=model_of(config))


def workload(config: RunConfig) -> Workload:
    """Work out a run; an unknown vocabulary size is taken to be the tokenizer's to be.

    Raises:
        ConfigError: unreadable ranks, or no policy fits ``train.activation_budget_gib``.
    """
    config = resolved(config)
    try:
        spec = dataclasses.replace(model_spec(config.model), adapter=adapter_of(config.train))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    micro_batch = micro_batch_of(config, spec)
    return Workload(
        config.preset,
        spec,
        micro_batch,
        num_micro_batches(config.train),
        config.optimizer,
        plan_of(micro_batch, config.train),
        update_of(config.train),
        config.train.steps,
    )


def micro_batch_of(config: RunConfig, spec: ModelSpec) -> MicroBatch:
    """The micro-batch of a run on a model: never more than its batch."""
    train = config.train
    kind = "cuda" if train.device.startswith("cuda") else "cpu"
    length, precision = config.data.sequence_length, precision_of(train)
    return MicroBatch(spec, sequences_of(train), length, precision, kind)


def sequences_of(train: TrainConfig) -> int:
    """Of a micro-batch."""
    return min(train.micro_batch_size or train.batch_size, train.batch_size)


def num_micro_batches(train: TrainConfig) -> int:
    """In one optimizer step."""
    return train.batch_size // sequences_of(train)


PLAIN = {
    "recompute": "none",
    "recompute_attention": "rerun",
    "keep_as": "computed",
} | dict.fromkeys(("recompute_layers", "activation_budget_gib"))
"""Keys of ``train``: no recomputation."""


def with_linear(config: RunConfig, linear: str, *ranks: str) -> RunConfig:
    """The run with another parameterization, at the first of these ranks that it can have.

    After them come those of a published table and a quarter of the width. Recomputation that the
    parameterization does not allow is left out. Raises ``ConfigError`` where nothing goes.
    """
    model = choose(config.model, "linear", linear)
    shape = shape_of(resolved(config).model)
    architecture = architectures.get(model.architecture)
    positions = architecture.positions(shape, options_of(model, architecture.name))
    widths = (width for each in positions for width in (each.in_size, each.out_size))
    quarter = max(1, min(shape.hidden_size // 4, *widths))
    problems: list[str] = []
    for rank in (*ranks, "aligned-parameters", str(quarter)):
        for train in ({}, PLAIN):
            changed = dataclasses.replace(
                config,
                model=dataclasses.replace(model, rank=rank),
                train=dataclasses.replace(config.train, **train),
            )
            if not (problems := problems_of(changed)):
                return changed
    raise ConfigError(problems)


def problems_of(config: RunConfig) -> list[str]:
    """Everything that is wrong with a run, its activation budget included."""
    try:
        check(config)
        workload(config)
    except ConfigError as error:
        return error.problems
    return []
