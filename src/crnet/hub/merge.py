"""An adapter merged into the maps beside which it trained: an ordinary model again.

A matrix takes the update in. A pair of factors takes it as more columns and rows,

    (x A) B + s (x L^T) M^T = (x [A, s L^T]) [B; M^T],

a map of the same kind, with the same carry, whose rank is larger by the adapter's. Refused: to
round the update to the old rank; what was measured would not be what is handed on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from crnet.config.check import spec_problems
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import RunConfig, TrainConfig
from crnet.errors import ConfigError
from crnet.inference.load import copy_weights, load_model
from crnet.model.build import lay_out, to_memory
from crnet.model.language_model import LanguageModel
from crnet.specs import Slot
from crnet.storage.checkpoint import Checkpoint

MEND = "take --to peft, which keeps the adapter apart"


@torch.no_grad()
def merged_adapter(saved: Checkpoint) -> tuple[RunConfig, LanguageModel]:
    """The model of an adapter's checkpoint as one without an adapter, fp32, and its configuration.

    Raises:
        ConfigError: no map of the same kind has the update in it, or its rank would be above the
            width; every reason.
    Cost: both models whole in memory.
    Numerics: outputs differ by the rounding of one sum more, or one less, a map.
    """
    adapted = load_model(saved, dtype=torch.float32)
    config = _config(saved.config, adapted.spec)
    spec = model_spec(config.model)
    if problems := spec_problems(spec):
        raise ConfigError([f"{problem}; {MEND}" for problem in problems])
    weights = {
        name: parameter.detach()
        for name, parameter in adapted.named_parameters()
        if name in spec.tensors
    }
    for block, slots in zip(adapted.model.blocks(), adapted.spec.slots, strict=True):
        for slot in slots:
            name, found = spec.map_name(slot), _merged_map(block.maps[slot.position], adapted, slot)
            weights |= {f"{name}.{own}": tensor for own, tensor in found.items()}
    model = lay_out(spec)
    to_memory(model, "cpu")
    copy_weights(model, weights)
    return config, model


def _merged_map(linear: Any, adapted: LanguageModel, slot: Slot) -> dict[str, Tensor]:
    adapter = adapted.spec.adapter
    assert adapter is not None
    owner, names = adapted.spec.map_name(slot), adapter.tensors(slot)
    down_SD, up_FS = (adapted.get_parameter(f"{owner}.{name}") for name in names)
    found = linear.base.with_update(down_SD.T * (adapter.alpha / adapter.rank), up_FS.T)
    if found is None:
        raise ConfigError(
            f"{adapted.spec.linear.name}: no map of its kind has an update in it; {MEND}"
        )
    return found if linear.base.bias is None else {**found, "bias": linear.base.bias}


def _config(config: RunConfig, spec: ModelSpec) -> RunConfig:
    """That of the merged model. Raises ``ConfigError`` where its ranks cannot be said."""
    assert spec.adapter is not None
    usual = TrainConfig()
    train = dataclasses.replace(
        config.train,
        precision="fp32",
        init_from=None,
        **{key: getattr(usual, key) for key in ("adapter", "adapter_rank", "adapter_alpha")},
    )
    method, options = spec.linear, spec.linear_options
    fixed = [method.fixed_rank(idx, options) for idx in range(spec.num_layers)]
    if any(fixed):
        raise ConfigError(
            f"{method.name}: a block has a rank of its own, which is an option; {MEND}"
        )
    open_blocks = [block for block, rank in zip(spec.slots, fixed, strict=True) if rank is None]
    rank = _rank_words(open_blocks, spec.adapter.rank) if open_blocks else config.model.rank
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, rank=rank), train=train
    )


def _rank_words(blocks: list[tuple[Slot, ...]], more: int) -> str:
    """``--model.rank`` of these blocks, every rank larger by so much."""
    schedules = {
        column[0].position: ",".join(str(slot.rank + more) for slot in column)
        for column in zip(*blocks, strict=True)
    }
    first, *others = schedules.items()
    apart = [f"{position}={words}" for position, words in others if words != first[1]]
    return "/".join([first[1], *apart])
