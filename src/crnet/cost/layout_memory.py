"""Bytes that the fullest process of a layout takes at the peak of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from crnet import optimizers
from crnet.config.sections import ParallelConfig, options_of
from crnet.cost.kept import kept_bytes
from crnet.cost.peak import peak_bytes
from crnet.cost.shared import RankBytes, bytes_of_rank
from crnet.cost.stage_memory import activation_bytes
from crnet.cost.stages import Stage, by_stage
from crnet.cost.workload import Workload
from crnet.recompute.plan import segments
from crnet.specs import TensorSpec

Tensors = Mapping[str, TensorSpec]


@dataclasses.dataclass(frozen=True)
class Held:
    """What one process of a pipeline (or the only one) has beside activations."""

    state: RankBytes
    gathered: int
    """Whole for a moment where the model is split (``gathered_at_once``), and for the optimizer."""

    @property
    def total(self) -> int:
        return sum(self.state.held.values()) + self.gathered


def held_by(
    work: Workload, parallel: ParallelConfig, stages: Sequence[Stage], tensors: Tensors
) -> list[Held]:
    """What each process of a pipeline has, the fullest of those that split its part.

    Args:
        work: of one share of the batch.
        stages: of the pipeline; else all blocks as one.
        tensors: as a process stores them (``parts.stored_tensors``).
    """
    of_stages, found = by_stage(stages, tensors), []
    for process in range(parallel.pipeline):
        parts = of_stages[process :: parallel.pipeline]
        mine = {name: tensor for part in parts for name, tensor in part.items()}
        state = _fullest(work, parallel, mine)
        gathered = 3 * state.largest_owned
        if parallel.shard > 1:
            gathered += gathered_at_once(work, parallel, mine)
        found.append(Held(state, gathered))
    return found


def _fullest(work: Workload, parallel: ParallelConfig, tensors: Tensors) -> RankBytes:
    """Of the processes that split these tensors. The first one's parts are the largest; who owns
    whole matrices is another question, asked of each."""
    method = optimizers.get(work.optimizer.name)
    options = options_of(work.optimizer, method.name)
    owns = any(method.whole(each, options) for each in tensors.values() if each.trained)
    ranks = [
        bytes_of_rank(tensors, work.optimizer, parallel, rank, work.update, work.num_micro_batches)
        for rank in range(parallel.shard if owns else 1)
    ]
    return max(ranks, key=lambda each: sum(each.held.values()) + 3 * each.largest_owned)


def gathered_at_once(work: Workload, parallel: ParallelConfig, tensors: Tensors) -> int:
    """Bytes of weights and gradients that are whole in a process under ``--parallel.shard``, beside
    its own part.

    Weights: all outside the blocks, and of the blocks the one at work, the next one and a copy
    while it arrives; ``replay`` has the blocks of a segment. Gradients: the fullest block's; in a
    pipeline with several micro-batches all of them, for torch's schedules scatter them with the
    last one only. Once more a block's (or what is outside), while it is scattered.
    """
    item = 4 if work.update is None else 2
    weights = [0] * (work.spec.num_layers + 1)  # the last: outside the blocks
    gradients = list(weights)
    for name, tensor in tensors.items():
        words = name.split(".")
        at = int(words[2]) if words[1] == "layers" else -1
        weights[at] += tensor.num_items * tensor.item_bytes(item)
        gradients[at] += tensor.num_items * tensor.item_bytes(item) * tensor.trained
    largest = max(weights[:-1])
    at_work = largest
    if work.plan.policy == "replay":
        parts = segments(work.plan, work.spec.num_layers)
        at_work = max(sum(weights[bottom:top]) for bottom, top in parts)
    waits = parallel.pipeline > 1 and work.num_micro_batches > 1
    whole = sum(gradients) if waits else max(gradients)
    return weights[-1] + at_work + 2 * largest + whole + max(gradients)


def at_the_peak(work: Workload, parallel: ParallelConfig, stages: Sequence[Stage]) -> list[int]:
    """Activations of each process of a pipeline at their fullest, and what it receives into.

    A stage's own peak is not known: it takes what its micro-batches in flight keep, and what the
    whole model's backward pass needs beyond what it keeps, which is no less.
    """
    peak = peak_bytes(work.micro_batch, work.plan)
    if parallel.pipeline == 1:
        return [peak]
    moment = max(0, peak - sum(kept_bytes(work.micro_batch, work.plan).values()))
    return [sum(each.values()) + moment for each in activation_bytes(work, parallel, stages)]
