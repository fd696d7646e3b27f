"""Making a model, and filling its parameters one by one from (seed, full name)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from crnet.config.model_spec import ModelSpec
from crnet.linears._maps import dtype_of
from crnet.model.language_model import LanguageModel
from crnet.model.seeds import generator_of
from crnet.model.tensor_parallel import stored
from crnet.specs import Slot, TensorSpec

MOST_THREADS = 16
"""That draw initial values, each into memory of its own."""


class _Unfilled(TorchFunctionMode):
    """Leaves out what torch's layers fill their weights with: there is no memory yet, and drawing
    normal numbers on meta imports torch's compiler, a second of every start."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def lay_out(spec: ModelSpec) -> LanguageModel:
    """The model without memory for its parameters (on meta)."""
    with torch.device("meta"), _Unfilled():
        return LanguageModel(spec)


def build(
    spec: ModelSpec,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    lay: Callable[[ModelSpec], LanguageModel] = lay_out,
) -> LanguageModel:
    """Build an initialised model.

    ``lay``: lays it out without memory, perhaps split over processes.
    It is laid out without memory first, so that a parameter nobody initialises is an error and
    never whatever the memory held. Cost: that of ``initial_values``.
    """
    model = lay(spec)
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

    def empty(tensor: Tensor) -> Tensor:
        if hasattr(tensor, "device_mesh"):  # a shard
            return torch.empty_like(tensor, device=device)
        # empty_like on meta, which Module.to_empty takes, imports sympy: half a second.
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    model._apply(empty)
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
        copy_into(parameters[name], stored(value, name, model.spec))


def initial_values(spec: ModelSpec, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(full name, value) of every tensor, on the CPU, fp32 (int32 where it is so declared).

    Every tensor has its own generator, so that several are drawn at once, a thread each, and the
    numbers hang on no order. Cost: 0.1 billion numbers a second and core; as many tensors as
    threads and one more are held.
    """
    workers = min(torch.get_num_threads(), MOST_THREADS)
    if workers == 1:
        yield from ((name, initial_value(spec, seed, name)) for name in spec.tensors)
        return
    ahead: deque[tuple[str, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for name in spec.tensors:
                ahead.append((name, pool.submit(initial_value, spec, seed, name)))
                if len(ahead) > workers:
                    yield _first(ahead)
            while ahead:
                yield _first(ahead)
        finally:
            pool.shutdown(cancel_futures=True)


def map_values(spec: ModelSpec, seed: int, slot: Slot) -> dict[str, Tensor]:
    """The values of ``initial_values`` of one map, by their names in it."""
    owner = spec.map_name(slot)
    return {name: initial_value(spec, seed, f"{owner}.{name}") for name in spec.map_tensors(slot)}


def _first(ahead: deque[tuple[str, Future[Tensor]]]) -> tuple[str, Tensor]:
    name, value = ahead.popleft()
    return name, value.result()


def initial_value(spec: ModelSpec, seed: int, name: str) -> Tensor:
    """Of one tensor, by its full name, as ``initial_values`` has it."""
    tensor = spec.tensors[name]
    if tensor.init.kind != "own":
        return _drawn(tensor, generator_of(seed, name))
    owner, _, own_name = name.rpartition(".")

    def generator(word: str) -> torch.Generator:
        return generator_of(seed, owner, word)

    slot = spec.slot_of[owner]
    value = spec.linear.initial_value(own_name, slot, spec.linear_options, generator)
    assert tuple(value.shape) == tensor.shape, f"{name}: {tuple(value.shape)}"
    return value


def _drawn(tensor: TensorSpec, generator: torch.Generator) -> Tensor:
    value, kind = tensor.init.value, tensor.init.kind
    fills: Mapping[str, Callable[[Tensor], Any]] = {
        "normal": lambda empty: empty.normal_(0, value, generator=generator),
        "uniform": lambda empty: empty.uniform_(-value, value, generator=generator),
        "constant": lambda empty: empty.fill_(value),
    }
    return fills[kind](torch.empty(tensor.shape))


def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value, which every process has, into a parameter or this process's part."""
    if hasattr(parameter, "device_mesh"):  # a shard: each rank keeps its own part
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    parameter.copy_(value)
