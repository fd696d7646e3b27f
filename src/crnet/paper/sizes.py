"""What the paper's arithmetic takes from the rest of the package: shapes, ranks and counts.

The formulas, tables and errata ask here and nowhere else, so that a change of the package's seams
is a change of this file (and of ``table_10``, which is about the search for ranks itself).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from crnet import optimizers
from crnet.config import presets
from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig

VOCAB_SIZE = 32_000  # LLaMA-2's; the paper does not say
PRESETS = {
    **{size: f"llama-{size.lower()}" for size in "60M 130M 350M 1B 7B 13B 70B".split()},
    "LLaMA-3 1B": "llama3-1b",
}
"""The paper's name of a model (tables 9, 21; the last: 16) -> the preset's."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that the paper's formulas speak of: L, h, f and a."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int


def model_config(
    size: str, linear: str = "full", rank: str = "aligned-parameters", num_layers: int = 0
) -> ModelConfig:
    """The model of a size in a parameterization, with a schedule of ranks.

    Args:
        size: a key of ``PRESETS``.
        linear: the parameterization's name.
        rank: as ``--model.rank``; ``aligned-parameters`` and ``aligned-memory`` are table 10's.
        num_layers: instead of the preset's, unless 0.
    """
    model = presets.get(PRESETS[size]).model
    return replace(
        model,
        linear=linear,
        rank=rank,
        vocab_size=VOCAB_SIZE,
        num_layers=num_layers or model.num_layers,
    )


def sizes_of(size: str, num_layers: int = 0) -> Sizes:
    """L, h, f and a of a size; ``num_layers`` instead of the preset's, unless 0."""
    model = model_config(size, num_layers=num_layers)
    return Sizes(model.num_layers, model.hidden_size, model.intermediate_size, model.num_heads)


def num_parameters(size: str, linear: str = "full", rank: str = "aligned-parameters") -> int:
    """All parameters: eq. 8, the norms, embedding and untied head."""
    spec = model_spec(model_config(size, linear, rank))
    return sum(tensor.num_items for tensor in spec.tensors.values())


def state_bytes(
    size: str, linear: str, rank: str, optimizer: str, options: Mapping[str, int]
) -> int:
    """Bytes of an optimizer's state of a model in bf16.

    Args:
        linear, rank: the parameterization, as ``model_config``.
        options: of the optimizer, those that are not its default.
    """
    method = optimizers.get(optimizer)
    chosen = method.Options and method.Options(**options)
    tensors = model_spec(model_config(size, linear, rank)).tensors.values()
    return sum(method.state_bytes(each, chosen, 2) for each in tensors if each.trained)


def crnet_ranks(size: str, rank: str = "aligned-parameters", num_layers: int = 0) -> list[int]:
    """CR-Net's ranks of the layers above its first, bottom first; every map of a layer has one."""
    spec = model_spec(model_config(size, "crnet", rank, num_layers))
    return [block[0].rank for block in spec.slots[1:]]
