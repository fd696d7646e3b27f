"""Bytes that each process of a pipeline holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from crnet.config.sections import ParallelConfig, num_stages
from crnet.cost.kept import kept_outputs, stream_size
from crnet.cost.micro_batch import BlockBytes, MicroBatch
from crnet.cost.packed import PackedBlockBytes
from crnet.cost.shared import bytes_of_rank
from crnet.cost.stages import Stage, boundary_bytes, cut, held, in_flight
from crnet.cost.workload import Workload
from crnet.recompute.plan import RecomputePlan, segments


def process_bytes(work: Workload, parallel: ParallelConfig) -> list[dict[str, int]]:
    """What each process of a pipeline holds, in the order of the processes.

    Args:
        work: of one share of the batch (``train.run.work_of_one``).
    Returns: ``weights``, ``gradients``, ``optimizer state``: of the tensors of its stages, exact,
        between two steps; of split stages what the first process of each has.
        ``activations``: what its stages keep for the micro-batches in flight, under the plan, where
        most are. ``buffers``: what torch's engine receives into: a boundary's tensors from below
        and gradients from above, for every micro-batch of a step and not for those in flight alone.
        What a backward pass needs for a moment is not counted (``peak.gradients``).
    """
    stages = cut(work.spec, num_stages(parallel), work.micro_batch.length)
    found = []
    for process, of_batches in enumerate(activation_bytes(work, parallel, stages)):
        mine = stages[process :: parallel.pipeline]
        tensors = {name: work.spec.tensors[name] for name in sorted(held(work.spec, mine))}
        how = work.optimizer, parallel, 0, work.update, work.num_micro_batches
        found.append(bytes_of_rank(tensors, *how).held | of_batches)
    return found


def activation_bytes(
    work: Workload, parallel: ParallelConfig, stages: Sequence[Stage]
) -> list[dict[str, int]]:
    """``activations`` and ``buffers`` of each process, as ``process_bytes`` has them."""
    found, kept = [], kept_by_stages(work, stages)
    for process in range(parallel.pipeline):
        mine = stages[process :: parallel.pipeline]
        bounds = [idx for stage in mine for idx in (stage.bottom, stage.top)]
        received = sum(
            boundary_bytes(work.micro_batch, bottom)
            for bottom in bounds
            if 0 < bottom < work.spec.num_layers
        )
        activations = sum(
            in_flight(stage, parallel.pipeline, work.num_micro_batches) * kept[stage.idx]
            for stage in mine
        )
        buffers = work.num_micro_batches * received
        found.append({"activations": activations, "buffers": buffers})
    return found


def kept_by_stages(work: Workload, stages: Sequence[Stage]) -> list[int]:
    """Bytes that each stage keeps of one micro-batch between its forward and backward pass; what it
    received is in the buffers."""
    ends = {each.top for each in stages}
    plan = dataclasses.replace(work.plan, kept_layers=tuple({*work.plan.kept_layers, *ends}))
    outputs = kept_outputs(work.micro_batch, plan)
    return [_kept_by_stage(work.micro_batch, plan, outputs, stage) for stage in stages]


def _kept_by_stage(
    micro_batch: MicroBatch, plan: RecomputePlan, outputs: Sequence[int], stage: Stage
) -> int:
    """Bytes of one stage; ``outputs``: that each block keeps."""
    spec, size = micro_batch.spec, stream_size(micro_batch, plan)
    exact = micro_batch.stream_size
    blocks = micro_batch.blocks[stage.bottom : stage.top]
    total = sum(outputs[block.idx] + _inside(plan, block, size) for block in blocks)
    if plan.policy == "replay":
        bottoms = [low for low, _ in segments(plan, spec.num_layers)]
        total += size * sum(stage.bottom <= low < stage.top for low in bottoms)
    if plan.policy == "block":  # what leaves the last one is the next stage's
        total += size - blocks[-1].kept_of_states
    if not (stage.is_first or plan.is_packed):
        total -= size  # the stream that enters: received
    if stage.is_first:
        total += 8 * micro_batch.rows
        apart = plan.policy != "block" and blocks[0].streams[0].keeps_writes
        total += size if apart else 0
    if stage.is_last:
        shape, last = spec.shape, micro_batch.stream_work(spec.num_sublayers)
        total += exact + last.kept_bytes + spec.architecture.last_norm_bytes(micro_batch.batch)
        total += micro_batch.rows * shape.hidden_size * micro_batch.compute_bytes
        total += shape.vocab_size * shape.hidden_size * 4  # the head's gradient
    return total


def _inside(plan: RecomputePlan, block: BlockBytes, size: int) -> int:
    """Beside outputs: what a block keeps; ``size``: of a tensor of the stream."""
    packed = PackedBlockBytes(block)
    if plan.is_packed and plan.policy == "none":
        kept = packed.inside() + packed.maps() + block.kept_by_streams
        return len(block.streams) * size + kept
    if plan.is_packed:
        return packed.bottlenecks()
    if plan.policy == "none":
        kept = block.kept_inside + block.kept_by_streams + block.kept_by_maps
        return len(block.streams) * size + kept
    if plan.policy == "block":
        return block.kept_of_states + block.carried_bottlenecks
    attention = block.inside.attention_bytes if plan.keep_attention else 0
    return sum(block.bottlenecks.values()) + attention
