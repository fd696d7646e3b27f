"""One process's part of a model whose blocks several processes compute together (tensor parallel).

The maps before the heads and before the feed-forward's activation are split by columns, those
behind them by rows (``specs.Position.split``): each process has some of the heads and some of the
feed-forward's columns, with whatever a map hands on of them. The rest of the model every process
has whole, and computes alike: embedding, norms, stream and head. Which dimension of a tensor is
split follows from its two shapes (``ModelSpec.split_dims``).

Not split: the rows of embedding and head by vocabulary. They are computed by every process, and
their gradients need no sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from crnet.config.model_spec import ModelSpec
from crnet.kernels.partial import PartialSum, entered
from crnet.layers.block import Block
from crnet.model.language_model import LanguageModel
from crnet.model.padding import pad, reshaped_state
from crnet.specs import Slot


def stored(value: Tensor, name: str, spec: ModelSpec) -> Tensor:
    """What this process stores of a whole tensor, which has its declared shape."""
    return part(pad(value, spec.wide_shapes[name]), name, spec)


def part(wide: Tensor, name: str, spec: ModelSpec) -> Tensor:
    """This process's part of a whole tensor as it is stored; itself where it is not split."""
    dim = spec.split_dims.get(name)
    return wide if dim is None else wide.chunk(spec.num_parts, dim)[spec.part_idx]


def part_state(state: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """An optimizer's state dict: what has the shape of its parameter is split as that is."""
    if spec.num_parts == 1:
        return dict(state)

    def own(value: Tensor, name: str) -> Tensor:
        found = part(value, name, spec)
        return value if found is value else found.clone()  # a view would hold on to the whole

    return reshaped_state(state, spec.wide_shapes, own)


def join(model: LanguageModel, group: Any) -> None:
    """Make the parts of a model, one a process of the group, compute the whole model together."""
    spec = model.spec
    for block, slots in zip(model.model.blocks(), spec.slots, strict=True):
        edges = {_join_map(block, slot, spec, group) for slot in slots} - {None}
        for source in edges:
            module = block.get_submodule(spec.architecture.input_modules[str(source)])
            module.register_forward_hook(_entering(group))


def _join_map(block: Block, slot: Slot, spec: ModelSpec, group: Any) -> str | None:
    """Give a map its sum; returns the input whose gradient is summed instead."""
    split, position = spec.split_of(slot), spec.position_of[slot.position]
    assert position.split is not None, f"{position.name} is not split: check() refuses it"
    if split.at == "edge" and position.split == "columns":
        for each in spec.slots[slot.layer_idx]:
            is_beside = spec.position_of[each.position].input == position.input
            assert not is_beside or spec.split_of(each).at == "edge", "one sum for one input"
        return position.input
    block.maps[slot.position].sums = PartialSum(group, position.split)
    return None


def _entering(group: Any):
    # Between a block and its maps: a recomputation calls it too.
    def enter(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return entered(output, group)

    return enter
