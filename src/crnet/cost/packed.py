"""Bytes of one block's activations where they are kept as NF4 codes (``recompute.packed``)."""

from __future__ import annotations

from crnet.cost.micro_batch import BlockBytes, MicroBatch
from crnet.kernels.nf4_bytes import nf4_bytes


def packed_size(num_items: int, item_bytes: int, rows: int) -> int:
    """Of a tensor: with one item a token or fewer it stays as it is."""
    return nf4_bytes(num_items) if num_items > rows else num_items * item_bytes


def packed_stream(micro_batch: MicroBatch) -> int:
    """Of a tensor of the stream."""
    size = micro_batch.stream_bytes
    return packed_size(micro_batch.stream_size // size, size, micro_batch.rows)


class PackedBlockBytes:
    """What ``BlockBytes`` says, packed."""

    def __init__(self, block: BlockBytes):
        self._block = block

    def _size(self, num_items: int) -> int:
        return packed_size(num_items, self._block.compute_bytes, self._block.rows)

    def output(self, name: str) -> int:
        """Of the output of a position."""
        block = self._block
        num_items = block.slots[name].rows(block.rows) * block.slots[name].out_size
        return packed_size(num_items, block.items[name], block.rows)

    def bottlenecks(self) -> int:
        """Of all bottlenecks that are not outputs."""
        return sum(map(self._size, self._bottleneck_items()))

    def _bottleneck_items(self) -> list[int]:
        sizes = self._block.bottlenecks.values()
        return [size // self._block.compute_bytes for size in sizes if size]

    def autograd_outputs(self) -> int:
        rows = self._block.rows
        return sum(packed_size(*each, rows) for each in self._block.output_copies())

    def maps(self) -> int:
        """What maps keep beside inputs and carries."""
        total, e = 0, self._block.compute_bytes
        for work in self._block.works.values():
            items = work.kept_items
            items = (work.kept_bytes // e,) if items is None else items
            total += sum(map(self._size, items)) + work.kept_bytes - e * sum(items)
        return total

    def inside(self) -> int:
        """Inputs of maps, and what lies between the maps."""
        inside, e = self._block.inside, self._block.compute_bytes
        inputs = self._block.kept_input_sizes(mixes_again=True)
        items = [size // e for size in inputs] + [*inside.kept_items]
        exact = inside.kept_bytes - e * sum(inside.kept_items)
        exact -= inside.attention_bytes - e * inside.attention_items  # it is run again
        return sum(map(self._size, items)) + exact
