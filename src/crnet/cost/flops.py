"""FLOPs of the blocks: products only, 2 a multiply-add, equal to torch's counter.

Attention in full, not causal, as torch's counter has it under the MATH backend.
"""

from __future__ import annotations

from crnet.cost.micro_batch import MicroBatch
from crnet.recompute.plan import Added, RecomputePlan, inverted_layers, segments


def block_flops(
    micro_batch: MicroBatch, plan: RecomputePlan, added: Added | None = None
) -> dict[str, int]:
    """FLOPs of the blocks in one micro-batch: ``forward``, ``backward``, ``recompute``.

    ``added``: as in ``kept.kept_bytes``. Source: eq. 39 is ``invert``'s recompute.
    """
    blocks, inside = micro_batch.blocks, micro_batch.inside
    works = [work for block in blocks for work in block.works.values()]
    streams = [work for block in blocks for work in block.streams]
    streams.append(micro_batch.stream_work(micro_batch.spec.num_sublayers))
    forward = sum(work.forward_flops for work in works) + len(blocks) * inside.forward_flops
    backward = sum(work.backward_flops for work in works) + len(blocks) * inside.backward_flops
    repeated = 0
    if plan.policy == "block":
        # torch's checkpointing stops where the last tensor was kept.
        last = micro_batch.spec.architecture.writes[-1]
        ends = [block for block in blocks if not block.streams[-1].repeats_output]
        repeated = forward - sum(block.works[last].unrepeated_flops for block in ends)
        repeated += sum(work.forward_flops for work in streams[:-1])
    elif plan.policy == "none":
        repeated = len(blocks) * inside.forward_flops if plan.is_packed else 0
    else:
        repeated = _rebuilt(micro_batch, plan, added) + sum(work.rerun_flops for work in works)
        beside = inside.routing_flops if plan.keep_attention else inside.forward_flops
        repeated += len(blocks) * beside
    return {
        "forward": forward + sum(work.forward_flops for work in streams),
        "backward": backward + sum(work.backward_flops for work in streams),
        "recompute": repeated,
    }


def _rebuilt(micro_batch: MicroBatch, plan: RecomputePlan, added: Added | None) -> int:
    """FLOPs of the products that rebuild outputs."""
    blocks = micro_batch.blocks
    if plan.policy == "invert":
        added = micro_batch.added_at_first(plan) if added is None else added
        kept = inverted_layers(plan, len(blocks), tuple(blocks[0].slots), added)
        wanted = {
            (block.idx, name)
            for block in blocks[1:]
            for name in block.slots
            if block.idx not in kept[name]
        }
    else:
        wanted = {(block.idx, name) for block in blocks for name in block.slots}
        for bottom, _ in segments(plan, len(blocks))[1:]:
            # What the segment above keeps as its carry needs no product.
            reads = blocks[bottom].reads.items()
            wanted -= {
                (bottom - 1, name)
                for name, read in reads
                if (read.source, read.of) == ("below", "output")
            }
    return sum(blocks[idx].works[name].rebuild_flops for idx, name in wanted)


def dense_block_flops(micro_batch: MicroBatch) -> int:
    """Forward FLOPs of all blocks, were every map dense."""
    spec = micro_batch.spec
    items = sum(
        slot.rows(micro_batch.rows) * slot.in_size * slot.out_size
        for slot in spec.slots[0]
        if not slot.is_operator
    )
    block = 2 * items + micro_batch.inside.forward_flops
    return spec.num_layers * block + _stream_flops(micro_batch)


def _stream_flops(micro_batch: MicroBatch) -> int:
    """Forward FLOPs of the stream, its last read among them."""
    sublayers = range(micro_batch.spec.num_sublayers + 1)
    return sum(micro_batch.stream_work(idx).forward_flops for idx in sublayers)
