"""One micro-batch of a model: what each block keeps, hands on and computes, map by map."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from crnet.architectures import Batch
from crnet.config.model_spec import ModelSpec
from crnet.config.sections import Precision
from crnet.recompute.plan import Added, RecomputePlan, added_layers
from crnet.specs import BlockWork, Read, Slot, StreamWork, Work


@dataclass(frozen=True)
class MicroBatch:
    """The part of a training step that activations hang on."""

    spec: ModelSpec
    sequences: int
    length: int
    precision: Precision = "fp32"
    device_type: str = "cpu"
    """torch's word for the kind of device: it decides the rows of a chunk of the loss."""

    @property
    def rows(self) -> int:
        return self.sequences * self.length

    @property
    def compute_bytes(self) -> int:
        """Of an item that products read."""
        return 4 if self.precision == "fp32" else 2

    @property
    def stream_bytes(self) -> int:
        """Of an item of the stream: that of the embedding."""
        return 2 if self.precision == "bf16" else 4

    @property
    def is_mixed(self) -> bool:
        """Whether products read casts of the weights."""
        return self.precision == "bf16-mixed"

    @cached_property
    def batch(self) -> Batch:
        return Batch(self.sequences, self.length, self.compute_bytes, self.stream_bytes)

    @cached_property
    def stream_size(self) -> int:
        """Bytes of one tensor of the stream."""
        return self.rows * self.spec.shape.hidden_size * self.stream_bytes

    @property
    def cache_bytes(self) -> int:
        """Of what all blocks keep of one row in generation, for the tokens to come
        (``layers.cache``): in the weights' dtype, which generation computes in."""
        spec = self.spec
        items = spec.architecture.cache_items(spec.shape, spec.architecture_options)
        return spec.num_layers * self.length * items * self.stream_bytes

    @cached_property
    def inside(self) -> BlockWork:
        """What each block does between its maps."""
        spec = self.spec
        return spec.architecture.work(
            spec.shape, spec.architecture_options, self.batch, spec.keeps_activation
        )

    def stream_work(self, sublayer_idx: int) -> StreamWork:
        """Around one sublayer of the model, counted from the bottom; at its end the last read."""
        spec = self.spec
        return spec.stream.work(
            sublayer_idx,
            spec.num_sublayers,
            spec.shape,
            spec.stream_options,
            self.rows,
            self.stream_bytes,
            self.compute_bytes,
        )

    @cached_property
    def blocks(self) -> list[BlockBytes]:
        return [BlockBytes(self, slots) for slots in self.spec.slots]

    @cached_property
    def below(self) -> dict[str, list[int]]:
        """Bytes in all blocks below the one at that index, by kind."""
        kinds = {
            "bottlenecks": [sum(block.bottlenecks.values()) for block in self.blocks],
            "outputs": [sum(block.outputs.values()) for block in self.blocks],
        }
        return {name: [0, *itertools.accumulate(sizes)] for name, sizes in kinds.items()}

    @cached_property
    def first_gradients(self) -> int:
        """Gradients of the first block's hand-on, which wait until the backward pass is there."""
        readers = [reads for reads in self.spec.reads[1:] if reads]
        names = {n for reads in readers for n, read in reads.items() if read.source == "first"}
        return sum(self.blocks[0].handed_bytes(name, readers[0][name]) for name in names)

    @cached_property
    def shared_casts(self) -> int:
        """Bytes of the bf16 copies of weights that blocks share: each is made once."""
        items = sum(work.shared_items for work in self.blocks[0].works.values())
        return 2 * items if self.is_mixed else 0

    @cached_property
    def shared_gradients(self) -> int:
        """Bytes of the gradients of weights that blocks share, which wait for the lowest one."""
        own = 2 if self.precision == "bf16" else 4
        trained = [each for each in self.spec.shared.values() if each.trained]
        return sum(each.num_items * each.item_bytes(own) for each in trained)

    def added_at_first(self, plan: RecomputePlan) -> Added:
        """What ``invert``'s guard keeps beyond the plan before the first step."""
        if plan.policy != "invert":
            return {}
        reads = self.spec.reads[-1]
        gains = {n: [read.initial_gain] * self.spec.num_layers for n, read in reads.items()}
        wide = {n: (read.item_bytes or self.compute_bytes) == 4 for n, read in reads.items()}
        units = {n: 2.0**-24 if is_wide else 2.0**-8 for n, is_wide in wide.items()}
        return added_layers(plan, gains, units)


class BlockBytes:
    """Bytes of one block's activations; by position where they are of a map."""

    def __init__(self, micro_batch: MicroBatch, slots: tuple[Slot, ...]):
        spec, rows, e = micro_batch.spec, micro_batch.rows, micro_batch.compute_bytes
        linear, options = spec.linear, spec.linear_options
        self.idx = slots[0].layer_idx
        self.rows, self.compute_bytes = rows, e
        self.slots = {slot.position: slot for slot in slots}
        self.works: dict[str, Work] = {
            slot.position: linear.of(slot).work(slot, options, slot.rows(rows), e) for slot in slots
        }
        self.items = {
            slot.position: linear.of(slot).output_bytes(slot, options, e) for slot in slots
        }
        """Bytes of an item of each output."""
        self.outputs = {
            slot.position: slot.rows(rows) * slot.out_size * self.items[slot.position]
            for slot in slots
        }
        self.bottlenecks = {name: work.bottleneck_bytes for name, work in self.works.items()}
        self.reads: Mapping[str, Read] = spec.reads[self.idx]
        self.hands = spec.hands[self.idx]
        weight_items = sum(work.weight_items for work in self.works.values())
        self.casts = 2 * weight_items if micro_batch.is_mixed else 0
        """Bytes of the bf16 copies of its own weights."""
        self.inside = micro_batch.inside
        per_block = len(spec.architecture.writes)
        first = self.idx * per_block
        self.streams = [micro_batch.stream_work(first + i) for i in range(per_block)]
        self.writes = spec.architecture.writes
        self.weight_gradients = {
            slot.position: sum(
                tensor.num_items * e
                for tensor in (
                    *spec.map_tensors(slot).values(),
                    *spec.shared_tensors(slot).values(),
                )
                if tensor.trained and len(tensor.shape) > 1
            )
            for slot in slots
        }
        """Bytes of the gradients of a map's matrices, before they are added to those there."""
        self.readers = self._readers(spec)
        self.biased = {each.name for each in spec.positions if each.has_bias}
        self.inputs = {each.name: each.input for each in spec.positions}

    def _readers(self, spec: ModelSpec) -> dict[str, list[Read]]:
        """By position: how later blocks read its hand-on."""
        found: dict[str, list[Read]] = {}
        later = spec.reads[self.idx + 1 :]
        for name in self.hands:
            below = [later[0][name]] if later and name in later[0] else []
            found[name] = [read for read in below if read.source == "below"]
            if self.idx == 0:
                reads = [block[name] for block in later if name in block]
                found[name] += [read for read in reads if read.source == "first"]
        return found

    def kept_input_sizes(self, *, mixes_again: bool = False) -> list[int]:
        """Bytes of the maps' inputs that autograd keeps: of each, if one of its maps keeps it, or
        attention, where it is not run again."""
        kept = {self.inputs[name] for name, work in self.works.items() if work.keeps_input}
        kept |= frozenset() if mixes_again else self.inside.kept_inputs
        return [self.inside.input_bytes[name] for name in kept]

    @cached_property
    def kept_inside(self) -> int:
        """What lies between the maps: norms, rotation, attention, activation."""
        return sum(self.kept_input_sizes()) + self.inside.kept_bytes

    @cached_property
    def kept_by_maps(self) -> int:
        return sum(work.kept_bytes for work in self.works.values())

    @cached_property
    def kept_by_streams(self) -> int:
        return sum(work.kept_bytes for work in self.streams)

    @cached_property
    def kept_of_states(self) -> int:
        """Tensors of the stream's state that are inputs of the blocks above."""
        return sum(work.kept_state_bytes for work in self.streams)

    @cached_property
    def consumed(self) -> int:
        """The outputs that the inside keeps, in the compute dtype."""
        return sum(
            self.slots[name].rows(self.rows) * self.slots[name].out_size * self.compute_bytes
            for name in self.inside.kept_outputs
        )

    @property
    def carries(self) -> int:
        """What it keeps of earlier blocks."""
        kept = [read for read in self.reads.values() if read.is_kept]
        items = [read.width * (read.item_bytes or self.compute_bytes) for read in kept]
        return self.rows * sum(items)

    @cached_property
    def carried_bottlenecks(self) -> int:
        """Bottlenecks that later blocks read: inputs of a block that is run again."""
        return sum(
            self.bottlenecks[name]
            for name, readers in self.readers.items()
            if any(read.of == "bottleneck" for read in readers)
        )

    def handed_bytes(self, name: str, read: Read) -> int:
        """Of what a position hands on, in its own dtype."""
        return self.outputs[name] if read.of == "output" else self.bottlenecks[name]

    def autograd_outputs(self) -> int:
        """Bytes of outputs that stay where autograd keeps everything."""
        return sum(num_items * item for num_items, item in self.output_copies())

    def output_copies(self) -> list[tuple[int, int]]:
        """Items, and bytes of one, of every tensor that is an output and stays where autograd keeps
        everything.

        An output is kept by whoever reads it, in the reader's dtype: by the inside of the block, by
        later blocks, by the stream. Those that take it in its own dtype share one copy.
        """
        found: list[tuple[int, int]] = []
        for name, slot in self.slots.items():
            wanted: list[int] = []
            num_items = slot.rows(self.rows) * slot.out_size
            if name in self.inside.kept_outputs:
                wanted.append(self.compute_bytes)
            if name in self.writes and self.streams[0].keeps_writes:
                found += [(num_items, self.items[name])] if name in self.biased else []
                wanted += [] if name in self.biased else [self.items[name]]
            for read in self.readers.get(name, ()):
                if read.of == "output" and read.is_kept:
                    wanted.append(read.item_bytes or self.compute_bytes)
            own = self.items[name]
            casts = [item for item in wanted if item != own]
            shared = [own] if own in wanted else []
            found += [(num_items, item) for item in (*casts, *shared)]
        return found

    def is_read(self, name: str) -> bool:
        return any(read.of == "output" for read in self.readers.get(name, ()))

    @property
    def reads_output(self) -> bool:
        """Whether the last write's map has a carry as wide as its output."""
        read = self.reads.get(self.writes[-1])
        return read is not None and read.of == "output"
