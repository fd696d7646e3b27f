"""A model of the backward pass: the most bytes of activations and gradients alive at once.

A few percent off what is measured (tests/test_cost.py states how far).
"""

from __future__ import annotations

from collections.abc import Sequence

from crnet.cost.kept import kept_bytes, kept_outputs, stream_size
from crnet.cost.micro_batch import BlockBytes, MicroBatch
from crnet.cost.packed import PackedBlockBytes
from crnet.kernels.loss_chunks import PART_ITEMS, chunk_rows
from crnet.recompute.plan import Added, RecomputePlan, segments


def peak_bytes(
    micro_batch: MicroBatch,
    plan: RecomputePlan,
    added: Added | None = None,
    coming: Sequence[int] = (),
) -> int:
    """Most bytes of activations and their gradients alive at once in a micro-batch.

    The head's weight gradient is counted, those of other parameters are not, but for ``coming``:
    bytes of those that have come, and stay, when each block goes backward. Two moments can be the
    fullest. In the loss everything kept is there, and a chunk's logits. And in the backward pass of
    a block: see ``gradients``.

    ``added``: as in ``kept.kept_bytes``.
    """
    kept = kept_outputs(micro_batch, plan, added)
    total = sum(kept_bytes(micro_batch, plan, added).values())
    coming = coming or [0] * len(micro_batch.blocks)
    # A tied head's gradient waits for the embedding's.
    shape = micro_batch.spec.shape
    tied = 4 * shape.vocab_size * shape.hidden_size if shape.tie_embeddings else 0
    backward = (
        8 * micro_batch.rows
        + tied
        + max(
            _alive(micro_batch, plan, kept, idx) + gradients(micro_batch, plan, block) + coming[idx]
            for idx, block in enumerate(micro_batch.blocks)
        )
    )
    return max(total + loss_bytes(micro_batch), backward)


def loss_bytes(micro_batch: MicroBatch) -> int:
    """What the loss needs for a moment, beyond the two gradients that it keeps."""
    shape, e = micro_batch.spec.shape, micro_batch.compute_bytes
    head = shape.vocab_size * shape.hidden_size
    rows = min(micro_batch.rows, chunk_rows(shape.vocab_size, micro_batch.device_type))
    chunk = rows * shape.vocab_size
    forward = 8 * chunk  # a chunk's logits and their logarithms, fp32
    if e < 4:  # on a CPU parts of them; or its slope, and a product to be added, or parts of that
        part = PART_ITEMS if micro_batch.device_type == "cpu" else max(chunk, head)
        forward = forward if chunk <= part else e * chunk + 8 * part
        forward = max(forward, e * chunk + e * min(head, part))
    forward += 2 * head if micro_batch.is_mixed else 0  # the head's cast
    backward = 2 * head if micro_batch.precision == "bf16" else 0  # the gradient in its own dtype
    return max(forward, backward)


def gradients(micro_batch: MicroBatch, plan: RecomputePlan, block: BlockBytes) -> int:
    """While a block goes backward, beyond what is kept and rebuilt: the fullest moment."""
    last = block.writes[-1]
    handed = {
        name: block.handed_bytes(name, readers[0])
        for name, readers in block.readers.items()
        if readers and readers[0].source == "below"
    }
    arriving = sum(size for name, size in handed.items() if name != last)
    leaving = block.outputs[last] if block.reads_output else 0
    inside, freed = block.inside, 0
    activated = inside.input_bytes[block.inputs[last]]
    if block.works[last].keeps_input:
        freed += activated
    freed += block.bottlenecks[last]
    # The backward of the activation; that of the last map has freed its input and bottleneck.
    moments = [arriving + leaving + inside.activation_bytes - freed]
    for name, work in block.works.items():
        wide = inside.input_bytes[block.inputs[name]]
        weights = block.weight_gradients[name]
        cast = block.outputs[name] if micro_batch.is_mixed and name in block.writes else 0
        moments.append(arriving + wide + cast + max(work.transient_bytes, weights))
    if plan.policy != "none":
        # The end of the second run, where all outputs are still there; under block, those read.
        names = block.outputs
        there = [name for name in names if plan.policy != "block" or block.is_read(name)]
        ending = arriving + handed.get(last, 0) + sum(block.outputs[name] for name in there)
        ending += block.outputs[last] if last in block.biased else 0
        shared = sum(
            block.outputs[name]
            for name in inside.kept_outputs
            if name in there and block.items[name] == block.compute_bytes
        )
        moments.append(ending - shared)
    # Of the first block's hand-on, gradients wait from the block under the topmost on.
    is_between = 0 < block.idx < micro_batch.spec.num_layers - 1
    waiting = micro_batch.first_gradients if is_between else 0
    waiting += max(work.gradient_bytes for work in block.streams)
    if block.idx < micro_batch.spec.num_layers - 1:
        waiting += micro_batch.shared_gradients
    return micro_batch.stream_size + waiting + max(moments)


def _alive(micro_batch: MicroBatch, plan: RecomputePlan, kept: Sequence[int], idx: int) -> int:
    """Bytes kept and rebuilt while block ``idx`` goes backward."""
    blocks, block, size = micro_batch.blocks, micro_batch.blocks[idx], micro_batch.stream_size
    sublayers = len(block.streams)
    embedding = size if block.streams[0].keeps_writes else 0
    if plan.is_packed:
        return _alive_beside_packed(micro_batch, plan, kept, idx)
    if plan.policy == "none":
        return (
            embedding
            + micro_batch.shared_casts
            + sum(
                kept[at]
                + sublayers * size
                + each.casts
                + each.kept_inside
                + each.kept_by_streams
                + each.kept_by_maps
                for at, each in enumerate(blocks[: idx + 1])
            )
        )
    if plan.policy == "block":
        # Of the block itself: its inside, run again, and the stream between its sublayers.
        alive = block.kept_inside + block.kept_by_streams + block.kept_by_maps
        alive += (sublayers - 1) * size + block.consumed + block.casts + micro_batch.shared_casts
        streams = size + (size if block.streams[0].reads_apart else 0)
        carried = sum(each.carried_bottlenecks for each in blocks[:idx])
        states = sum(each.kept_of_states for each in blocks[:idx])
        return alive + streams + states + carried + sum(kept[:idx])
    if plan.policy == "invert":
        below = sum(blocks[idx - 1].outputs.values()) if idx else 0
        return (
            alive_above(micro_batch, plan, idx, idx)
            + idx * size
            + below
            + sum(kept[: max(idx - 1, 0)])
        )
    parts = segments(plan, len(blocks))
    bottom = next(bottom for bottom, top in parts if bottom <= idx < top)
    below = sum(size for first, _ in parts if first < bottom) + sum(kept[:bottom])
    return alive_above(micro_batch, plan, bottom, idx) + below


def _alive_beside_packed(
    micro_batch: MicroBatch, plan: RecomputePlan, kept: Sequence[int], idx: int
) -> int:
    """``_alive`` where activations are packed: those of the block, or of its segment, are read
    back, those below wait."""
    size, blocks = stream_size(micro_batch, plan), micro_batch.blocks
    packed = [PackedBlockBytes(block) for block in blocks]
    if plan.policy == "none":
        own = blocks[idx]
        # The carries are read back here and, where the block below keeps them too, there once more.
        alive = own.consumed + own.carries + own.kept_inside + own.kept_by_maps
        alive += own.casts + own.kept_by_streams + len(own.streams) * micro_batch.stream_size
        for at, each in enumerate(blocks[:idx]):
            alive += kept[at] + packed[at].inside() + packed[at].maps()
            alive += each.casts + each.kept_by_streams + len(each.streams) * size
        return alive
    parts = segments(plan, len(blocks))
    bottom = next(bottom for bottom, top in parts if bottom <= idx < top)
    alive = alive_above(micro_batch, plan, bottom, idx) - micro_batch.below["bottlenecks"][bottom]
    alive += sum(each.bottlenecks() for each in packed[:bottom]) + sum(kept[:bottom])
    return alive + sum(size for first, _ in parts if first < bottom)


def alive_above(micro_batch: MicroBatch, plan: RecomputePlan, bottom: int, idx: int) -> int:
    """Of a segment rebuilt from ``bottom`` up, all bottlenecks below included, while block ``idx``
    goes backward; without the streams and outputs kept below it."""
    block, below, size = micro_batch.blocks[idx], micro_batch.below, micro_batch.stream_size
    alive = block.kept_inside + block.consumed + (len(block.streams) - 1) * size
    alive += block.casts + micro_batch.shared_casts + below["bottlenecks"][idx + 1]
    if plan.keep_attention:
        alive += idx * block.inside.attention_bytes
    alive += (idx + 1 - bottom) * size
    return alive + below["outputs"][idx] - below["outputs"][bottom]
