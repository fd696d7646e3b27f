"""The weights that a run begins with: initial values, or those of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crnet import linears, optimizers
from crnet.adapters import beside
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.resuming import changes
from crnet.config.sections import ModelConfig, RunConfig, field_name, options_of
from crnet.errors import ConfigError
from crnet.inference.load import (
    check_tokenizer,
    check_weights,
    copy_weights,
    load_model,
    weights_dtype,
)
from crnet.model.build import build, lay_out, map_values, to_memory
from crnet.model.language_model import LanguageModel
from crnet.model.padding import stored_on
from crnet.storage import checkpoint
from crnet.storage.checkpoint import WEIGHTS, Checkpoint
from crnet.train.folders import refuse_adapter

_ONLY_AT_FIRST = {"--model.init-std"}
"""Keys of a model that say nothing once it is trained."""


def initial_model(
    config: RunConfig,
    spec: ModelSpec,
    device: torch.device,
    lay: Callable[[ModelSpec], LanguageModel] = lay_out,
) -> LanguageModel:
    """The model as a run begins with it; ``lay``: ``model.build.build``.

    Raises:
        ConfigError: ``train.init_from`` is no checkpoint, or one of another model.
    """
    spec = stored_on(spec, device, optimizers.get(config.optimizer.name))
    dtype = weights_dtype(config.train.precision)
    if config.train.init_from is None:
        return build(spec, config.train.seed, device, dtype, lay)
    saved = checkpoint.resolve(config.train.init_from)
    check_same_model(saved, config)
    if saved.config.model.linear != spec.linear.name:
        model = lay(spec)
        to_memory(model, device, dtype)
        copy_weights(model, _from_dense(saved, spec, config.train.seed))
        return model
    plain, adapter = dataclasses.replace(spec, adapter=None), spec.adapter
    model = load_model(saved, device, plain, lay, dtype)
    if adapter is not None:
        beside.put_beside(model, adapter, config.train.seed)
    return model


def _from_dense(saved: Checkpoint, spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """The weights of a full-rank model as those of another parameterization, which multiplies with
    the same matrices; what else its maps have is at its initial values. Cost: both, on the CPU."""
    weights, trained_in = saved.weights(), weights_dtype(saved.config.train.precision)
    check_weights(model_spec(saved.config.model), weights, trained_in, saved.folder / WEIGHTS)
    found = {name: tensor for name, tensor in weights.items() if name in spec.tensors}
    for slot in (slot for block in spec.slots for slot in block):
        owner = spec.map_name(slot)
        values = {
            name: value
            for name, value in map_values(spec, seed, slot).items()
            if f"{owner}.{name}" not in weights
        }
        weight_FD = weights[f"{owner}.weight"].float()
        made = spec.linear.from_dense(slot, spec.linear_options, weight_FD, values)
        found |= {f"{owner}.{name}": value for name, value in made.items()}
    return found


def check_same_model(saved: Checkpoint, config: RunConfig) -> None:
    """Raise ``ConfigError`` with every key in which a run's model is not the checkpoint's, or where
    that is an adapter.

    Parameterization, rank and options may differ where full-rank weights begin a run of one that
    can begin as any matrix (``Parameterization.takes_dense``).
    """
    refuse_adapter(saved)
    was, model = saved.config.model, config.model
    if _is_dense(was) and config.train.adapter is None and linears.get(model.linear).takes_dense:
        was = _with_linear_of(model, was)
    problems = [
        f"{change.flag} is {change.now!r}, and {saved.folder} has {change.was!r}; take that (crnet "
        "finetune takes the whole model of a checkpoint)"
        for change in changes(was, model, "--model.")
        if change.flag not in _ONLY_AT_FIRST
    ]
    if _is_dense(was) and was.linear != model.linear and config.train.adapter is None:
        takes = ", ".join(name for name in linears.names() if linears.get(name).takes_dense)
        problems.append(f"full-rank weights also begin runs of these --model.linear: {takes}")
    if problems:
        raise ConfigError(problems)


def _is_dense(model: ModelConfig) -> bool:
    """Whether every map is a matrix and nothing else, which reads no earlier block."""
    linear, options = linears.get(model.linear), options_of(model, model.linear)
    slots = (slot for block in model_spec(model).slots for slot in block if not slot.is_operator)
    return all(
        linear.tensors(slot, options).keys() == {"weight"} and linear.reads(slot, options) is None
        for slot in slots
    )


def _with_linear_of(model: ModelConfig, other: ModelConfig) -> ModelConfig:
    """``other`` with the parameterization of ``model``, its rank and options."""
    keys = ["linear", "rank", *(field_name(name) for name in linears.names())]
    taken = {key: getattr(model, key) for key in keys if hasattr(model, key)}
    return dataclasses.replace(other, **taken)


def check_start(path: Path, config: RunConfig, tokenizer_hash: str) -> dict[str, Any]:
    """What ``run.json`` says of the checkpoint that a run begins with.

    Raises:
        ConfigError: there is none, or it has another model or another tokenizer.
    """
    saved = checkpoint.resolve(path)
    check_tokenizer(saved, tokenizer_hash)
    check_same_model(saved, config)
    at = saved.progress
    sums = checkpoint.fingerprint(saved.folder)
    return {"checkpoint": str(saved.folder), "step": at.step, "tokens": at.tokens, "sha256": sums}
