"""Closed forms of what a step keeps between forward and backward, under each recompute policy.

No tensor is made and torch is not imported. The bytes equal ``measure.memory.saved_bytes`` exactly.
"""

from __future__ import annotations

from crnet.cost.micro_batch import MicroBatch
from crnet.cost.packed import PackedBlockBytes, packed_stream
from crnet.recompute.plan import Added, RecomputePlan, inverted_layers, segments


def kept_bytes(
    micro_batch: MicroBatch, plan: RecomputePlan, added: Added | None = None
) -> dict[str, int]:
    """Bytes kept between forward and backward, by term; parameters not counted.

    Args:
        micro_batch: model, sizes, precision.
        plan: the policy.
        added: layers that ``invert`` keeps beyond the plan, by position; None: those of the
            first step.
    Returns:
        Packed (``RecomputePlan.keep_as``), where the plan says so, is what blocks keep.
        ``tokens``; ``stream`` (what sublayers get; under a policy, what enters blocks);
        ``outputs`` (Y); ``bottlenecks`` (Z = X A, and what else maps keep); ``inside`` (norms,
        rotation, attention, activation); ``casts`` (bf16 copies of weights) and ``tables``
        (rotary), where autograd keeps everything; with ``tables`` also a window's mask, where
        attention is kept; ``last norm``; ``head input gradient`` and ``head weight gradient``,
        which the loss computes in the forward pass.
    Source: ``invert``'s stream, outputs and bottlenecks are eq. 38.
    """
    blocks, rows, shape = micro_batch.blocks, micro_batch.rows, micro_batch.spec.shape
    last = micro_batch.stream_work(micro_batch.spec.num_sublayers)
    terms = {
        "tokens": 8 * rows,
        "stream": _stream(micro_batch, plan),
        "outputs": sum(kept_outputs(micro_batch, plan, added)),
        "bottlenecks": sum(sum(block.bottlenecks.values()) for block in blocks),
        "inside": 0,
        "casts": 0,
        "tables": 0,
        "last norm": micro_batch.stream_size
        + last.kept_bytes
        + micro_batch.spec.architecture.last_norm_bytes(micro_batch.batch),
        "head input gradient": rows * shape.hidden_size * micro_batch.compute_bytes,
        "head weight gradient": shape.vocab_size * shape.hidden_size * 4,
    }
    if plan.policy == "none":
        options = micro_batch.spec.architecture_options
        terms["tables"] = micro_batch.spec.architecture.table_bytes(
            shape, options, micro_batch.batch
        )
        terms["bottlenecks"] = sum(block.kept_by_maps for block in blocks)
        terms["inside"] = sum(block.kept_inside + block.kept_by_streams for block in blocks)
        terms["casts"] = sum(block.casts for block in blocks) + micro_batch.shared_casts
    elif plan.policy == "block":
        terms["bottlenecks"] = sum(block.carried_bottlenecks for block in blocks)
    elif plan.keep_attention:
        terms["inside"] = sum(block.inside.attention_bytes for block in blocks)
    if plan.policy == "none" or plan.keep_attention:
        terms["tables"] += micro_batch.inside.mask_bytes
    return terms | (_packed_terms(micro_batch, plan) if plan.is_packed else {})


def _packed_terms(micro_batch: MicroBatch, plan: RecomputePlan) -> dict[str, int]:
    """The terms that differ where activations are packed; ``stream`` and ``outputs`` know."""
    blocks = [PackedBlockBytes(block) for block in micro_batch.blocks]
    if plan.policy == "none":
        return {
            "bottlenecks": sum(block.maps() for block in blocks),
            "inside": sum(block.inside() for block in blocks),
        }
    return {"bottlenecks": sum(block.bottlenecks() for block in blocks)}


def _stream(micro_batch: MicroBatch, plan: RecomputePlan) -> int:
    num_layers, size = micro_batch.spec.num_layers, stream_size(micro_batch, plan)
    num_sublayers = micro_batch.spec.num_sublayers
    keeps_writes = micro_batch.stream_work(num_sublayers).keeps_writes
    first = size if keeps_writes else 0  # the embedding, beside what the sublayers get of it
    if plan.policy == "none":
        return first + num_sublayers * size
    if plan.policy == "replay":
        return len(segments(plan, num_layers)) * size
    # Of what leaves the topmost block, beside what ``last norm`` counts.
    top = micro_batch.stream_work(num_sublayers).kept_state_bytes
    return size + top + sum(block.kept_of_states for block in micro_batch.blocks[:-1])


def stream_size(micro_batch: MicroBatch, plan: RecomputePlan) -> int:
    """Bytes of a kept tensor of the stream."""
    return packed_stream(micro_batch) if plan.is_packed else micro_batch.stream_size


def kept_outputs(
    micro_batch: MicroBatch, plan: RecomputePlan, added: Added | None = None
) -> list[int]:
    """Bytes of each block's outputs that stay."""
    blocks = micro_batch.blocks
    packed = [PackedBlockBytes(block) for block in blocks]
    if plan.policy == "none":
        of = packed if plan.is_packed else blocks
        return [block.autograd_outputs() for block in of]
    if plan.policy == "block":
        return [
            sum(size * _entering_later(block, name) for name, size in block.outputs.items())
            for block in blocks
        ]
    kept = (
        _inverted(micro_batch, plan, added)
        if plan.policy == "invert"
        else _replayed(micro_batch, plan)
    )

    def size(idx: int, name: str) -> int:
        return packed[idx].output(name) if plan.is_packed else blocks[idx].outputs[name]

    return [
        sum(size(block.idx, name) for name in block.outputs if (block.idx, name) in kept)
        for block in blocks
    ]


def _entering_later(block, name: str) -> int:
    """How many tensors of an output are inputs of later blocks, which are run again from them: the
    output as a carry, and in the state of the stream, where a sum with a bias is another tensor."""
    is_state = name in block.writes and block.streams[0].keeps_writes
    if is_state and block.is_read(name):
        return 2 if name in block.biased else 1
    return int(is_state or block.is_read(name))


def _inverted(micro_batch, plan, added) -> set[tuple[int, str]]:
    added = micro_batch.added_at_first(plan) if added is None else added
    layers = inverted_layers(
        plan, micro_batch.spec.num_layers, tuple(micro_batch.blocks[0].slots), added
    )
    return {(number - 1, name) for name, numbers in layers.items() for number in numbers}


def _replayed(micro_batch, plan) -> set[tuple[int, str]]:
    """Carries at the bottoms of segments, and outputs that follow from nothing narrower."""
    kept: set[tuple[int, str]] = set()
    for bottom, _ in segments(plan, micro_batch.spec.num_layers):
        kept |= entering(micro_batch, bottom)
    for block in micro_batch.blocks:
        kept |= {(block.idx, name) for name, size in block.bottlenecks.items() if not size}
    return kept


def entering(micro_batch: MicroBatch, bottom: int) -> set[tuple[int, str]]:
    """(layer, position) of the outputs that a segment beginning at ``bottom`` reads from below."""
    reads = micro_batch.blocks[bottom].reads if bottom else {}
    sources = {"below": bottom - 1, "first": 0}
    return {(sources[read.source], name) for name, read in reads.items() if read.of == "output"}
