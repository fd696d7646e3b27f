"""Bytes of one process of a run whose model is split, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from crnet import optimizers
from crnet.config.sections import OptimizerConfig, ParallelConfig, options_of
from crnet.cost.workload import state_bytes
from crnet.optimizers._low_precision import Bf16Update
from crnet.optimizers._sharing import owners, part_of, stepped_at_once
from crnet.specs import TensorSpec


@dataclass(frozen=True)
class RankBytes:
    """What one process has in memory of weights, gradients and states."""

    held: dict[str, int]
    """Bytes of ``weights``, ``gradients`` and ``optimizer state`` between two steps, as
    ``workload.state_bytes``. torch fills parts up to the size of the first one; that is not in it.
    """
    largest_owned: int
    """Bytes of the largest tensor, or pair that is stepped at once, that is whole here for a moment
    of every step. The step allocates three times as many, beside what the optimizer itself does.
    """
    owned: int = 0
    """Bytes of all tensors that are whole in a step on this process."""


def bytes_of_rank(
    tensors: Mapping[str, TensorSpec],
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    rank: int,
    update: Bf16Update | None = None,
    num_micro_batches: int = 1,
) -> RankBytes:
    """Bytes of one process of a run.

    Args:
        tensors: of the model, by full name.
        rank: of the process among all; copies of the model hold the same.
        update, num_micro_batches: as of ``workload.state_bytes``.
    Cost: no tensor is made.
    """
    method, num_ranks = optimizers.get(optimizer.name), parallel.shard
    rank %= num_ranks
    trained = {name: spec for name, spec in tensors.items() if spec.trained}
    owner_of = {}
    if num_ranks > 1:
        owner_of = owners(method, options_of(optimizer, method.name), trained, num_ranks)
    parts = {name: part_of(spec, rank, num_ranks) for name, spec in tensors.items()}
    in_parts = [part for name, part in parts.items() if name not in owner_of]
    owned = {name: tensors[name] for name, owner in owner_of.items() if owner == rank}

    def state(of: list[TensorSpec]) -> int:
        return state_bytes(of, optimizer, update, num_micro_batches)["optimizer state"]

    held = state_bytes(list(parts.values()), optimizer, update, num_micro_batches)
    item_bytes = 4 if update is None else 2
    sizes = [
        sum(owned[name].num_items * owned[name].item_bytes(item_bytes) for name in unit)
        for unit in stepped_at_once(method, owned)
    ]
    return RankBytes(
        held | {"optimizer state": state(in_parts) + state([*owned.values()])},
        max(sizes, default=0),
        sum(sizes),
    )
