"""A micro-batch as one process of ``--parallel.tensor`` computes it: its parts of every block.

What lies between the maps is divided where a map that reads it is split by rows; what norms write
is whole on every process.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from crnet.config.model_spec import ModelSpec
from crnet.cost.micro_batch import BlockBytes, MicroBatch
from crnet.specs import BlockWork, Passes, TensorSpec, Traffic


@dataclass(frozen=True)
class PartOfMicroBatch(MicroBatch):
    """``spec`` is that of a part (``ModelSpec.in_parts``)."""

    @cached_property
    def blocks(self) -> list[BlockBytes]:
        return [BlockBytes(self, slots) for slots in self.spec.stored_slots]

    @cached_property
    def inside(self) -> BlockWork:
        """Accuracy: statistics of norms, eight bytes a token, count as divided."""
        spec, parts = self.spec, self.spec.num_parts
        whole = super().inside
        narrow = {each.input for each in spec.positions if each.split == "rows"}
        ahead, back = spec.architecture.last_norm_passes(spec.shape, self.batch)
        count = sum(name not in narrow for name in whole.input_bytes)
        return dataclasses.replace(
            whole,
            forward_flops=whole.forward_flops // parts,
            backward_flops=whole.backward_flops // parts,
            input_bytes={
                name: size // parts if name in narrow else size
                for name, size in whole.input_bytes.items()
            },
            kept_bytes=whole.kept_bytes // parts,
            kept_items=tuple(items // parts for items in whole.kept_items),
            attention_bytes=whole.attention_bytes // parts,
            attention_items=whole.attention_items // parts,
            activation_bytes=whole.activation_bytes // parts,
            passes=_beside(whole.passes, ahead * count, parts),
            backward_passes=_beside(whole.backward_passes, back * count, parts),
            attention_moved_bytes=whole.attention_moved_bytes // parts,
        )


def _beside(passes: Passes, whole: Passes, parts: int) -> Passes:
    """Passes of which ``whole`` stays, and of the rest a part of the bytes, in as many kernels."""

    def divided(each: Traffic, fixed: Traffic) -> Traffic:
        rest = max(each.moved_bytes - fixed.moved_bytes, 0)
        return Traffic(fixed.moved_bytes + rest // parts, each.kernels)

    return Passes(
        divided(passes.eager, whole.eager),
        divided(passes.compiled, whole.compiled),
        divided(passes.fused, whole.fused),
    )


def part_of(micro_batch: MicroBatch, num_parts: int) -> MicroBatch:
    """The micro-batch as one of so many processes computes it."""
    if num_parts == 1:
        return micro_batch
    spec, it = micro_batch.spec.in_parts(0, num_parts), micro_batch
    return PartOfMicroBatch(spec, it.sequences, it.length, it.precision, it.device_type)


def stored_tensors(spec: ModelSpec) -> dict[str, TensorSpec]:
    """The tensors of a model, or of a part of one, as wide as they are in memory."""
    shapes = spec.stored_shapes
    return {
        name: dataclasses.replace(tensor, shape=shapes[name])
        for name, tensor in spec.tensors.items()
    }
