"""Making a model, and filling its parameters one by one from (seed, full name)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.config.model_spec import ModelSpec
from crnet.linears._maps import dtype_of
from crnet.model.language_model import LanguageModel
from crnet.model.seeds import generator_of
from crnet.specs import TensorSpec


def lay_out(spec: ModelSpec) -> LanguageModel:
    """The model without memory for its parameters (on meta)."""
    with torch.device("meta"):
        return LanguageModel(spec)


def build(
    spec: ModelSpec,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """Build an initialised model.

    It is laid out without memory first, so that a parameter nobody initialises is an error and
    never whatever the memory held. Cost: one parameter in fp32 on the CPU at a time.
    """
    model = lay_out(spec)
    to_memory(model, device, dtype)
    fill(model, seed)
    return model


def to_memory(
    model: LanguageModel, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> None:
    """Give a laid out model memory, unfilled: every tensor in the dtype that it declares.

    Under FSDP2, after ``fully_shard``: each rank's share alone.
    """
    set_dtype(model, dtype)
    model.to_empty(device=device)
    model.tie_head()


def set_dtype(model: LanguageModel, dtype: torch.dtype) -> None:
    """Cast the parameters that follow the run's dtype; those that declare another keep it."""
    parameters = dict(model.named_parameters())
    for name, spec in model.spec.tensors.items():
        parameter = parameters[name]
        cast = parameter.detach().to(dtype_of(spec, dtype))
        if cast.dtype == parameter.dtype:
            continue
        if hasattr(parameter, "device_mesh"):  # a shard passes over what its data is set to
            torch.utils.swap_tensors(
                parameter, torch.nn.Parameter(cast, requires_grad=parameter.requires_grad)
            )
        else:
            parameter.data = cast


@torch.no_grad()
def fill(model: LanguageModel, seed: int) -> None:
    """Fill every parameter from the seed and its name; the same numbers on any device and any
    number of ranks, whatever else the model has. A shard is filled without the whole model."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == model.spec.tensors.keys(), (
        "a model has the parameters that its specification lists: "
        f"{sorted(parameters.keys() ^ model.spec.tensors.keys())}"
    )
    for name, value in initial_values(model.spec, seed):
        _copy(parameters[name], value)


def initial_values(spec: ModelSpec, seed: int):
    """(full name, value) of every tensor, on the CPU, fp32 (int32 where it is so declared)."""
    owners = {spec.map_name(slot): slot for block in spec.slots for slot in block}
    for name, tensor in spec.tensors.items():
        if tensor.init.kind != "own":
            yield name, _drawn(tensor, generator_of(seed, name))
            continue
        owner, _, own_name = name.rpartition(".")

        def generator(word: str, owner: str = owner) -> torch.Generator:
            return generator_of(seed, owner, word)

        value = spec.linear.initial_value(own_name, owners[owner], spec.linear_options, generator)
        assert tuple(value.shape) == tensor.shape, f"{name}: {tuple(value.shape)}"
        yield name, value


def _drawn(tensor: TensorSpec, generator: torch.Generator) -> Tensor:
    value, kind = tensor.init.value, tensor.init.kind
    fills: Mapping[str, Callable[[Tensor], Any]] = {
        "normal": lambda empty: empty.normal_(0, value, generator=generator),
        "uniform": lambda empty: empty.uniform_(-value, value, generator=generator),
        "constant": lambda empty: empty.fill_(value),
    }
    return fills[kind](torch.empty(tensor.shape))


def _copy(parameter: Tensor, value: Tensor) -> None:
    if hasattr(parameter, "device_mesh"):  # a shard: each rank keeps its own part
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    parameter.copy_(value)
