"""One process's part of a model that transformers spreads over several (``tp_plan="auto"``).

A plan of transformers names modules, and a style for each. Its own styles split an ``nn.Linear``. A
map here says itself which of its tensors are split and what is added up (``specs.Split``), so its
styles are ours, and the sums are those of ``crnet train --parallel.tensor``:

    crnet_columns   maps before the heads and before the feed-forward's activation
    crnet_rows      maps behind them

What a map hands on is split as its output is: no carry crosses. Embedding and head are split along
the vocabulary by transformers' styles; norms and the stream every process has whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import TensorParallelLayer

from crnet.config.check_tensor import parts_problems
from crnet.config.model_spec import ModelSpec
from crnet.errors import ConfigError
from crnet.kernels.partial import PartialSum, entered
from crnet.layers.block import Block
from crnet.linears._maps import LinearMap
from crnet.specs import Side, Slot

HEAD = {"lm_head": "colwise_gather_output"}
"""Of a language model whose backbone has a plan."""


def plan(spec: ModelSpec) -> dict[str, str] | None:
    """The style of each map, by the name that all blocks share; None: they cannot be split. What
    blocks share is no map, and a gain that acts on the heads of one process is none: no style of
    ours has them."""
    summed = spec.architecture.summed(spec.shape, spec.architecture_options)
    if summed or spec.shared or list(parts_problems(spec, 1)):
        return None
    return {f"layers.*.{each.module}": f"crnet_{each.split}" for each in spec.positions}


@dataclass(frozen=True)
class _Sharing:
    """How processes share a map."""

    side: Side
    dims: Mapping[str, int]
    """By tensor: the dimension along which it is split. The others every process has whole."""
    summed: frozenset[str]
    """Tensors that are whole while their gradients are summands."""
    enters: bool
    """Whether the sum is that of the input's gradient."""
    num_heads: tuple[int, int]
    """Of queries, and of keys and values."""


def prepare(blocks: Sequence[Block], spec: ModelSpec) -> None:
    """Tell every map how it would be shared: a style is told of the module alone."""
    if plan(spec) is None:
        return
    dims = spec.in_parts(0, 2).split_dims
    for block, slots in zip(blocks, spec.slots, strict=True):
        for slot in slots:
            block.maps[slot.position].sharing = _sharing(spec, slot, dims)


def _sharing(spec: ModelSpec, slot: Slot, dims: Mapping[str, int]) -> _Sharing:
    split, side = spec.split_of(slot), spec.position_of[slot.position].split
    assert side is not None, f"{slot.position} is not split: it has no plan"
    full = {name: f"{spec.map_name(slot)}.{name}" for name in spec.map_tensors(slot)}
    own = {name: dims[each] for name, each in full.items() if each in dims}
    are_summands = side == "columns" or split.at == "edge"
    return _Sharing(
        side,
        own,
        frozenset(split.summed) - own.keys() if are_summands else frozenset(),
        enters=side == "columns" and split.at == "edge",
        num_heads=(spec.shape.num_heads, spec.shape.num_kv_heads),
    )


def _of_parts(name: str) -> Callable[..., Any]:
    """A method of a map that reads of its tensors what this process has."""

    def call(self: Any, *args: Any) -> Any:
        self.reads_parts = True
        try:
            return getattr(super(_Part, self), name)(*args)
        finally:
            self.reads_parts = False

    return call


class _Part:
    """Beside a map's own class. Outside its methods a split tensor is the ``DTensor`` that
    transformers loads, saves and clips."""

    sharing: _Sharing
    group: Any
    reads_parts = False
    down_project, up_project = _of_parts("down_project"), _of_parts("up_project")
    carry_from, bias_to_add = _of_parts("carry_from"), _of_parts("bias_to_add")
    _run = _of_parts("run")

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)  # pyright: ignore[reportAttributeAccessIssue]
        if not self.reads_parts:
            return found
        if isinstance(found, DTensor):
            return found.to_local()
        return entered(found, self.group) if name in self.sharing.summed else found

    def run(self, x_BTD: Tensor, carry: Tensor | None, known: Any) -> tuple[Tensor, Tensor]:
        """As the map's; the gradient of its input is summed where that is its sum."""
        return self._run(entered(x_BTD, self.group) if self.sharing.enters else x_BTD, carry, known)


@functools.cache
def _part_of(kind: type[LinearMap]) -> type:
    return type(kind.__name__, (_Part, kind), {})


class _Style(TensorParallelLayer):
    """What transformers does with a map of the plan, before the weights are read."""

    def validate_param(
        self, module: Any, param: str, mesh: Any, parameter_name: str | None = None
    ) -> None:
        """Raise ``ConfigError`` where heads cannot be dealt out evenly."""
        count, heads = mesh.size(), module.sharing.num_heads
        if any(each % count for each in heads):
            raise ConfigError(
                f"tp_size is {count}, and the model has {heads[0]} heads, {heads[1]} of keys and "
                f"values; take a divisor of {math.gcd(*heads)}"
            )

    def shard_param(self, module: Any, param: str, mesh: Any) -> None:
        """Put a tensor's part in its place; what is whole stays."""
        whole = getattr(module, param)
        if param in module.sharing.dims and whole is not None:
            placements = [Shard(module.sharing.dims[param])]
            part = distribute_tensor(whole, mesh, placements, src_data_rank=None)
            module.register_parameter(param, nn.Parameter(part, whole.requires_grad))

    def install_forward(self, module: Any, mesh: Any) -> Any:
        """Make the map a part, which adds up with the others."""
        module.group = mesh.get_group()
        if not module.sharing.enters:
            module.sums = PartialSum(module.group, module.sharing.side)
        module.__class__ = _part_of(type(module))
        return module


_STYLE: Any = _Style()
for _side in ("columns", "rows"):
    ALL_PARALLEL_STYLES.register(f"crnet_{_side}", _STYLE)
