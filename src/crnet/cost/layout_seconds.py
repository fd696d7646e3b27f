"""Seconds of an optimizer step of a layout: computation, what crosses, and waiting.

Two figures. Overlapped: what the engines send beside computation hides behind it: gradients of
copies behind the last micro-batch's backward pass; of a split model weights gathered behind every
pass, gradients scattered behind every backward pass. Apart: it is added. Sums between the parts of
a block and a pipeline's transfers are waited for in both.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from crnet.config.sections import ParallelConfig
from crnet.cost.clock import clock_of
from crnet.cost.fleet import Fleet
from crnet.cost.hardware import gathered_bytes, summed_widths
from crnet.cost.layout_memory import Held, Tensors
from crnet.cost.stage_clock import Seconds, optimizer_seconds
from crnet.cost.stages import Stage, boundary_bytes, by_stage
from crnet.cost.timeline import simulate
from crnet.cost.workload import Workload

BUCKET_BYTES = 25 * 2**20
"""Of gradients that copies add up in one collective: torch's default."""


@dataclass(frozen=True)
class StepSeconds:
    """Of one optimizer step."""

    overlapped: float
    apart: float
    bubble_frac: float
    """Idle time of all processes of the pipeline in its part of the step, as a share."""


@dataclass(frozen=True)
class Crossing:
    """Seconds of what one process sends and waits for, in one micro-batch or one step."""

    gather: Seconds
    """Of weights, before the passes of a micro-batch; with the backward pass what is scattered of
    their gradients, but for a pipeline, where that is once a step."""
    reduce_s: float
    """Of gradients, once a step."""


def strides(parallel: ParallelConfig) -> dict[str, int]:
    """How far neighbours of each kind are apart in the order of the ranks."""
    shard = parallel.tensor
    data = shard * parallel.shard
    return {"tensor": 1, "shard": shard, "data": data, "pipeline": data * parallel.data}


def step_seconds(
    work: Workload,
    parallel: ParallelConfig,
    fleet: Fleet,
    stages: Sequence[Stage],
    computed: Sequence[Seconds],
    of_processes: Sequence[Held],
    tensors: Tensors,
    is_simulated: bool = False,
) -> StepSeconds:
    """Seconds of a step.

    Args:
        work: of one share of the batch.
        stages, computed: of each stage (``stage_clock.stage_seconds``).
        of_processes: ``layout_memory.held_by``.
        tensors: as a process stores them.
        is_simulated: lay a pipeline's passes out one by one (``timeline.simulate``), instead of the
            closed form of ``pipeline_seconds``.
    """
    number = work.num_micro_batches
    summing = _tensor_s(work, parallel, fleet) / 2 / work.spec.num_layers
    waits = [summing * (stage.top - stage.bottom) for stage in stages]
    computed = [
        Seconds(each.forward_s + wait, each.backward_s + wait)
        for each, wait in zip(computed, waits, strict=True)
    ]
    crossing = [
        _crossing(work, parallel, fleet, of_processes[idx % len(of_processes)], mine)
        for idx, mine in enumerate(by_stage(stages, tensors))
    ]
    pairs = list(zip(computed, crossing, strict=True))
    hidden = [_with(own, sent.gather, max) for own, sent in pairs]
    apart = [_with(own, sent.gather, operator.add) for own, sent in pairs]
    # With the last backward pass: it hides gradients as far as it is not full of weights.
    tails = [
        max(0.0, sent.gather.backward_s + sent.reduce_s - step.backward_s)
        for step, sent in zip(hidden, crossing, strict=True)
    ]
    transfer = _transfer_s(work, parallel, fleet, stages)
    after = _optimizer_s(work, parallel, fleet, of_processes)
    lay_out = simulated_seconds if is_simulated else pipeline_seconds
    passes, bubble = lay_out(parallel, hidden, number, transfer)
    passes_apart, _ = lay_out(parallel, apart, number, transfer)
    reducing = max(each.reduce_s for each in crossing)
    return StepSeconds(passes + max(tails) + after, passes_apart + reducing + after, bubble)


def _with(own: Seconds, sent: Seconds, how: Callable[[float, float], float]) -> Seconds:
    """Computing and gathering, pass by pass."""
    forward = how(own.forward_s, sent.forward_s)
    return Seconds(forward, how(own.backward_s, sent.backward_s))


def pipeline_seconds(
    parallel: ParallelConfig, stages: Sequence[Seconds], number: int, transfer_s: float
) -> tuple[float, float]:
    """Seconds in which all micro-batches pass all stages, and the share in which processes wait.

    One micro-batch goes through all stages; the process with the most work does the others one
    after the other. With two stages a process, it waits for half of that passage alone.
    """
    processes = parallel.pipeline
    busy = [sum(each.both_s for each in stages[idx::processes]) for idx in range(processes)]
    passage = sum(each.both_s for each in stages) - max(busy)
    passage += 2 * transfer_s * (len(stages) - 1)
    seconds = number * max(busy) + passage / (len(stages) // processes)
    return seconds, 1 - number * sum(busy) / (processes * seconds)


def simulated_seconds(
    parallel: ParallelConfig, stages: Sequence[Seconds], number: int, transfer_s: float
) -> tuple[float, float]:
    """As ``pipeline_seconds``, pass by pass."""
    if parallel.pipeline == 1:
        return pipeline_seconds(parallel, stages, number, transfer_s)
    forward = [each.forward_s for each in stages]
    backward = [each.backward_s for each in stages]
    line = simulate(parallel.schedule, forward, backward, number, parallel.pipeline, transfer_s)
    return line.seconds, line.bubble


def _transfer_s(
    work: Workload, parallel: ParallelConfig, fleet: Fleet, stages: Sequence[Stage]
) -> float:
    """Across the widest boundary, one micro-batch, one pass."""
    if len(stages) == 1:
        return 0.0
    widest = max(boundary_bytes(work.micro_batch, stage.bottom) for stage in stages[1:])
    return fleet.send_s(widest, parallel.pipeline, strides(parallel)["pipeline"])


def _tensor_s(work: Workload, parallel: ParallelConfig, fleet: Fleet) -> float:
    """Of the sums between the parts of all blocks, one micro-batch, both ways."""
    if parallel.tensor == 1:
        return 0.0
    widths = summed_widths(work.spec, work.plan)
    crossing = sum(widths) * work.micro_batch.rows * work.micro_batch.compute_bytes
    return fleet.sum_s(crossing, parallel.tensor, 1, len(widths))


def _crossing(
    work: Workload,
    parallel: ParallelConfig,
    fleet: Fleet,
    of_process: Held,
    tensors: Tensors,
) -> Crossing:
    """Of one stage, which has these tensors: weights gathered, gradients scattered among those that
    split a copy, and added up among copies."""
    stride = strides(parallel)
    gradients = of_process.state.held["gradients"]
    starts = 1 + int(gradients // BUCKET_BYTES)
    reduce_s = fleet.sum_s(gradients, parallel.data, stride["data"], starts)
    if parallel.shard == 1:
        return Crossing(Seconds(0.0, 0.0), reduce_s)
    gathered, among = gathered_bytes(tensors, work.update), (parallel.shard, stride["shard"])
    count = len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
    gather = Seconds(
        fleet.gather_s(gathered["forward"], *among, count + 1),
        fleet.gather_s(gathered["backward"], *among, count),
    )
    scatter_s = fleet.gather_s(gradients * parallel.shard, *among, count + 1)
    if parallel.pipeline > 1:
        return Crossing(gather, scatter_s + reduce_s)
    return Crossing(Seconds(gather.forward_s, gather.backward_s + scatter_s), reduce_s)


def _optimizer_s(
    work: Workload, parallel: ParallelConfig, fleet: Fleet, of_processes: Sequence[Held]
) -> float:
    """Of the slowest process; an owned matrix crosses three times."""
    clock = clock_of(work.micro_batch, fleet.device)
    is_fused = work.optimizer.fused_backward  # then one process has all
    held = [each.state.held for each in of_processes]
    gradients = [work.gradient_bytes if is_fused else each["gradients"] for each in held]
    found = max(map(optimizer_seconds, held, gradients, itertools.repeat(clock)))
    owned = max(each.state.owned for each in of_processes)
    return found + fleet.gather_s(3 * owned, parallel.shard, strides(parallel)["shard"])
