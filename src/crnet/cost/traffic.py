"""What a micro-batch moves through memory beside its products, in each of three ways.

``specs.Passes``: ``eager`` has a kernel for each operation of torch, and ``measure.traffic`` counts
the same on tensors without memory; ``compiled`` and ``fused`` are priced, not counted. Here stands
what no method declares: casts of weights, sums of gradients, the head, the embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from crnet.cost.micro_batch import BlockBytes, MicroBatch
from crnet.kernels.loss_chunks import chunk_rows
from crnet.specs import Passes, Product, TensorSpec, Traffic, in_each_way

NARROW = 4
"""Bytes of fp32; narrower products are rounded from it."""


def forward_passes(micro_batch: MicroBatch, blocks: Iterable[BlockBytes]) -> Passes:
    """Of these blocks, forward; without the casts of weights, which no second run repeats."""
    found = Passes()
    for block in blocks:
        found += block.inside.passes + _carry_casts(micro_batch, block)
        for work in (*block.works.values(), *block.streams):
            found += work.passes
    return found


def backward_passes(micro_batch: MicroBatch, blocks: Iterable[BlockBytes]) -> Passes:
    """Of these blocks, backward, gradients that meet added up."""
    found = Passes()
    for block in blocks:
        found += block.inside.backward_passes + _sums(micro_batch, block)
        found += _carry_casts(micro_batch, block)
        for work in (*block.works.values(), *block.streams):
            found += work.backward_passes
    return found


def cast_passes(micro_batch: MicroBatch, tensors: Iterable[TensorSpec]) -> Passes:
    """Of these weights: their casts, forward."""
    sizes = [each.num_items for each in tensors if _read_by_products(each) and each.is_cast]
    return in_each_way(6 * sum(sizes), len(sizes)) if micro_batch.is_mixed else Passes()


def gradient_passes(micro_batch: MicroBatch, tensors: Iterable[TensorSpec]) -> Passes:
    """Of these weights' gradients: their casts; added to those that are there."""
    item = 2 if micro_batch.precision == "bf16" else 4
    trained = [tensor for tensor in tensors if tensor.trained]
    moved = sum(3 * tensor.num_items * tensor.item_bytes(item) for tensor in trained)
    # The head's gradient is made in its own dtype.
    cast = [each for each in trained if _read_by_products(each) and each.role != "head"]
    cast = cast if micro_batch.is_mixed else []
    moved += sum(6 * tensor.num_items for tensor in cast)
    return in_each_way(moved, len(trained) + len(cast))


def _read_by_products(tensor: TensorSpec) -> bool:
    return tensor.role in ("head", "matrix", "factor_in", "factor_out", "values")


def _sums(micro_batch: MicroBatch, block: BlockBytes) -> Passes:
    """Gradients of one tensor from its several readers: of an input its maps', of an output the
    blocks' that read it. Inductor adds them where the sum is read; fused there is one product."""
    found, spec = Passes(), micro_batch.spec
    for name, count in Counter(block.inputs.values()).items():
        experts = {slot.expert for at, slot in block.slots.items() if block.inputs[at] == name}
        sums = count // len(experts) - 1  # of each row: an expert's maps read its own
        size = sums * block.inside.input_bytes[name]
        found += Passes(Traffic(3 * size, sums * len(experts)), Traffic(size))
    for name, readers in block.readers.items():
        count = sum(read.of == "output" for read in readers)
        size = count * block.outputs[name]
        found += Passes(Traffic(3 * size, count), Traffic(size))
    # Of what blocks share ``gradient_passes`` counts one.
    return found + (gradient_passes(micro_batch, spec.shared.values()) if block.idx else Passes())


def _carry_casts(micro_batch: MicroBatch, block: BlockBytes) -> Passes:
    """Outputs that travel wider than the block computes, brought to its dtype."""
    e, rows = micro_batch.compute_bytes, micro_batch.rows
    found = Passes()
    for name, slot in block.slots.items():
        if block.items[name] != e and name not in block.writes:
            found += in_each_way(slot.rows(rows) * slot.out_size * (e + block.items[name]), 1)
        for read in block.readers.get(name, ()):
            own, wanted = block.items[name], read.item_bytes or e
            if read.of == "output" and own != wanted:
                found += in_each_way(rows * slot.out_size * (own + wanted), 1)
    return found


def num_chunks(micro_batch: MicroBatch) -> int:
    """Of the loss."""
    vocab_size = micro_batch.spec.shape.vocab_size
    return -(-micro_batch.rows // chunk_rows(vocab_size, micro_batch.device_type))


def head_products(micro_batch: MicroBatch) -> list[tuple[Product, int]]:
    """Of the loss, and how many of each: logits and both gradients, chunk by chunk."""
    shape, chunks = micro_batch.spec.shape, num_chunks(micro_batch)
    rows, h, v = -(-micro_batch.rows // chunks), shape.hidden_size, shape.vocab_size
    adds = micro_batch.compute_bytes == NARROW  # else the sum is wider, and added to by itself
    products = Product(rows, h, v), Product(rows, v, h), Product(v, rows, h, accumulates=adds)
    return [(product, chunks) for product in products]


def head_passes(micro_batch: MicroBatch) -> Passes:
    """Of the loss, both ways: its gradients are made forward and scaled backward.

    Fused: logits written once and turned into their gradient in place.
    """
    shape, e = micro_batch.spec.shape, micro_batch.compute_bytes
    chunks, narrow = num_chunks(micro_batch), e < NARROW
    logits = micro_batch.rows * shape.vocab_size
    weight = shape.vocab_size * shape.hidden_size
    hidden = micro_batch.rows * shape.hidden_size
    # To fp32; log-softmax, its exponential in place; to the compute dtype. Else a number a row.
    eager = Traffic((28 if narrow else 16) * logits, (18 if narrow else 16) * chunks)
    # Rows left out are zeroed in both gradients' factors; chunks' gradients are added up.
    eager += Traffic(4 * e * hidden) + Traffic(((8 + e) * weight if narrow else 0) * chunks)
    # Zeros at first; scaled in place at last, and in pure bf16 brought to the head's dtype.
    own = 6 * weight if micro_batch.precision == "bf16" else 0
    ends = Traffic(12 * weight + own + 2 * e * hidden, 4 + bool(own))
    fused = Traffic(3 * e * logits, chunks) + Traffic(2 * e * hidden, 1)
    return Passes(eager + ends, eager + ends, fused)


def embedding_passes(micro_batch: MicroBatch) -> tuple[Passes, Passes]:
    """Forward and backward."""
    shape, size = micro_batch.spec.shape, micro_batch.stream_size
    table = shape.vocab_size * shape.hidden_size * micro_batch.stream_bytes
    return in_each_way(2 * size, 1), in_each_way(size + table, 1)


def last_passes(micro_batch: MicroBatch) -> tuple[Passes, Passes]:
    """Of the last read and norm, forward and backward."""
    spec = micro_batch.spec
    norm, back = spec.architecture.last_norm_passes(spec.shape, micro_batch.batch)
    last = micro_batch.stream_work(spec.num_sublayers)
    return norm + last.passes, back + last.backward_passes


def micro_batch_passes(micro_batch: MicroBatch) -> Passes:
    """All of them, forward and backward, nothing recomputed."""
    blocks, tensors = micro_batch.blocks, micro_batch.spec.tensors.values()
    found = forward_passes(micro_batch, blocks) + backward_passes(micro_batch, blocks)
    found += cast_passes(micro_batch, tensors) + gradient_passes(micro_batch, tensors)
    for each in (*embedding_passes(micro_batch), *last_passes(micro_batch)):
        found += each
    return found + head_passes(micro_batch)
