"""Models on random tokens, their weights drawn where they live, and what a micro-batch costs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crnet import optimizers
from crnet.config import presets
from crnet.config.sections import DataConfig, ModelConfig, RunConfig, TrainConfig, choose
from crnet.cost.peak import peak_bytes
from crnet.cost.step import step_flops
from crnet.cost.workload import PLAIN, Workload, workload
from crnet.model.build import lay_out, to_memory
from crnet.model.language_model import LanguageModel
from crnet.model.padding import stored_on
from crnet.recompute.plan import RecomputePlan
from gpu.bench import Bench

LENGTH = 256
SEQUENCES = {"130m": 256, "350m": 128, "1b": 64, "7b": 16}
"""Of a micro-batch that fits 80 GB without recomputation."""
LINEARS = ("full", "crnet", "lowrank")
PEAK_FLOPS = 989e12
"""Dense bf16 products of an H100 or H200, the data sheet's."""


def sizes(bench: Bench) -> tuple[str, ...]:
    """By worth: a run that is cut has the first ones."""
    return ("tiny",) if bench.tiny else ("350m", "7b", "1b", "130m")


def config_of(bench: Bench, size: str, linear: str, **train: Any) -> RunConfig:
    """A run whose step is one micro-batch: a preset's model, or a tiny one of an odd width."""
    train = {**PLAIN, "micro_batch_size": None, "precision": bench.precision, **train}
    if bench.tiny:
        made = ModelConfig(hidden_size=32, intermediate_size=45, num_layers=3, num_heads=2)
        model = dataclasses.replace(choose(made, "linear", linear), vocab_size=64, rank="8")
        data, base = DataConfig(sequence_length=16), TrainConfig()
        return RunConfig(
            model=model, data=data, train=dataclasses.replace(base, batch_size=2, **train)
        )
    preset = presets.get(f"llama-{size}")
    model = dataclasses.replace(choose(preset.model, "linear", linear), vocab_size=32_000)
    train = {"batch_size": SEQUENCES[size], **train}
    return dataclasses.replace(
        preset,
        model=model,
        data=dataclasses.replace(preset.data, sequence_length=LENGTH),
        train=dataclasses.replace(preset.train, **train),
    )


def drawn(bench: Bench, work: Workload, dtype: torch.dtype | None = None) -> LanguageModel:
    """The model, its numbers drawn on the device: as large as the declared ones, not the same."""
    adamw = optimizers.get("adamw")
    model = lay_out(stored_on(work.spec, bench.device, adamw))
    to_memory(model, bench.device, dtype or bench.dtype)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in work.spec.tensors.items():
            kind, value = tensor.init.kind, tensor.init.value
            corner = parameters[name].zero_()[tuple(map(slice, tensor.shape))]
            if kind == "constant":
                corner.fill_(value)
            elif corner.is_floating_point():
                corner.normal_(0, value if kind == "normal" else 0.02)
    return model


class MicroBatches:
    """Calls that take one micro-batch each, of tokens that differ from call to call."""

    def __init__(self, bench: Bench, work: Workload, model: LanguageModel):
        self.model = model
        generator = torch.Generator().manual_seed(0)
        shape = (4, work.micro_batch.sequences, work.micro_batch.length + 1)
        rows = torch.randint(0, work.spec.shape.vocab_size, shape, generator=generator)
        self._rows = itertools.cycle(rows.to(bench.device).unbind())
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def tokens(self) -> tuple[Tensor, Tensor]:
        row = next(self._rows)
        return row[:, :-1].contiguous(), row[:, 1:].contiguous()

    def __call__(self) -> None:
        """Forward and backward; gradients add to those that are there."""
        loss, _ = self.model(*self.tokens())
        loss.backward()

    def forward(self) -> None:
        with torch.no_grad():
            self.model(*self.tokens())


def made(
    bench: Bench, size: str, linear: str, plan: RecomputePlan | None = None, **train: Any
) -> tuple[Workload, MicroBatches]:
    """A model and its micro-batches, under the plan of its run (or another)."""
    work = workload(config_of(bench, size, linear, **train))
    model = drawn(bench, work)
    model.recompute(plan or work.plan)
    return work, MicroBatches(bench, work, model)


def figures(work: Workload, timed: dict[str, Any], plan: RecomputePlan) -> dict[str, Any]:
    """Tokens a second, and MFU: products of the model itself (causal attention, nothing
    recomputed) over the data sheet's rate."""
    flops = step_flops(work, RecomputePlan())
    own = flops["total"] - flops["attention"] + flops["attention if causal"]
    found = {**timed, "tokens": work.micro_batch.rows, "model_flops": own}
    found["predicted_peak_bytes"] = peak_bytes(work.micro_batch, plan)
    if "ms" in timed:
        seconds = timed["ms"] / 1e3
        found["tokens_per_s"] = work.micro_batch.rows / seconds
        found["mfu"] = own / seconds / PEAK_FLOPS
    return found


def measured(
    bench: Bench, runs: dict[str, tuple[Workload, MicroBatches, RecomputePlan]]
) -> dict[str, Any]:
    """Times of several sides in turn, each with its memory and figures."""
    calls: dict[str, Callable[[], None]] = {name: run for name, (_, run, _) in runs.items()}
    timed = bench.sides(calls)
    found = {}
    for name, (work, run, plan) in runs.items():
        memory = {} if "error" in timed[name] else bench.memory(run)
        found[name] = figures(work, timed[name] | memory, plan)
    return found
