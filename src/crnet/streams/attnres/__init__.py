"""Attention Residuals: every sublayer reads a learned average of all that was written before it.

`x = sum_j p_j v_j`, `p = softmax_j(w . RMSNorm(v_j))` over the embedding v_0 and the outputs
v_1, v_2, ... of all earlier sublayers; w, one a sublayer, starts at zero (a plain average). The
norm has no gain: w is one. In the block variant (`--model.attnres.group`) outputs of so many
successive sublayers are summed first: the v_j are the groups' sums, and what the latest group has
come to so far.

Source: arXiv:2603.15031; third-party code wdlctc/open-attention-residuals at 83d2b8d.

Deviation: the first sublayer has one tensor to choose from, the embedding, and needs no w, which
nothing could train.

Unverified: the block variant is from the paper's description alone, in which the embedding is a
group of its own; rates beside low rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from crnet.specs import Shape, StreamWork, TensorSpec, constant, in_each_way
from crnet.streams import Stream
from crnet.streams._passes import ends_block


@dataclass(frozen=True, kw_only=True)
class AttentionResidualsOptions:
    """Attention Residuals."""

    group: int = 1
    """Sublayers, two a block, whose outputs are summed before others read them (the paper's blocks
    are of several; 1: none are)."""


class AttentionResiduals(Stream):
    name = "attnres"
    summary = "a learned average of the embedding and all earlier outputs, one a sublayer"
    Options = AttentionResidualsOptions
    examples = (AttentionResidualsOptions(group=2), AttentionResidualsOptions(group=3))
    policies = ("none", "block")

    def problems(self, shape: Shape, options: AttentionResidualsOptions) -> list[str]:
        if options.group >= 1:
            return []
        return [f"--model.attnres.group is {options.group}; take 1 or more"]

    def tensors(self, sublayer_idx, num_sublayers, shape, options):
        if not sublayer_idx:
            return {}
        return {
            "weight": TensorSpec(
                (shape.hidden_size,), "gain", constant(0.0), dtype="float32", decays=False
            )
        }

    def work(self, sublayer_idx, num_sublayers, shape, options, rows, item_bytes, written_bytes):
        sources, size = _num_sources(sublayer_idx, options), rows * shape.hidden_size * item_bytes
        is_last = sublayer_idx == num_sublayers
        # Elementwise, of each source, forward: square, mean, score, share; backward: slope, three
        # gradients, and their sum with those of other reads. Nothing is compiled into one.
        counted = sources if sublayer_idx else 0
        items = counted * rows * shape.hidden_size
        found = StreamWork(
            # Of each source its share and its inverse norm, fp32. What the first sublayer gets is
            # the embedding, which counts as kept already.
            kept_bytes=2 * 4 * rows * sources if sublayer_idx else -size,
            keeps_writes=True,
            reads_apart=sublayer_idx > 0,
            gradient_bytes=0
            if is_last
            else size + (sources - 1) * rows * shape.hidden_size * written_bytes,
            passes=in_each_way(28 * items, 7 * counted),
            backward_passes=in_each_way((52 + 3 * item_bytes) * items, 12 * counted),
        )
        if options.group == 1:
            return found
        # What the latest group has come to, which this read keeps, is no output; the embedding is
        # what the first sublayer gets.
        summed = in_each_way(3 * size, 1)
        return dataclasses.replace(
            found,
            kept_bytes=found.kept_bytes + size,
            keeps_writes=False,
            kept_state_bytes=size * _num_staying(sublayer_idx, num_sublayers, shape, options),
            gradient_bytes=0 if is_last else sources * size,
            passes=found.passes + summed,
            backward_passes=found.backward_passes + summed,
        )

    def crossing(self, sublayer_idx, num_sublayers, shape, options, item_bytes, written):
        if options.group == 1:
            return (item_bytes, *written)
        return (item_bytes,) * _num_sources(sublayer_idx, options)

    def make(self, sublayer_idx, num_sublayers, shape, options):
        from crnet.streams.attnres.module import Average, First

        adds = sublayer_idx % options.group > 0
        copies = options.group > 1
        if not sublayer_idx:
            return First(adds, copies)
        return Average(shape.hidden_size, shape.norm_eps, adds, copies)


def _num_sources(sublayer_idx: int, options: AttentionResidualsOptions) -> int:
    """The embedding, and a tensor for each group that has begun."""
    return 1 - (-sublayer_idx // options.group)


def _num_staying(sublayer_idx: int, num_sublayers: int, shape: Shape, options) -> int:
    """Sums that stay as a sublayer leaves them in the state of a later block; of the last read,
    groups that end inside the topmost block."""
    ends = [_ends_group(idx, options) for idx in range(num_sublayers)]
    if sublayer_idx == num_sublayers:
        return sum(ends[-(num_sublayers // shape.num_layers) : -1])
    return int(ends[sublayer_idx] or ends_block(sublayer_idx, num_sublayers, shape))


def _ends_group(sublayer_idx: int, options: AttentionResidualsOptions) -> bool:
    """Whether a sublayer is the last of its group."""
    return (sublayer_idx + 1) % options.group == 0


METHODS = [AttentionResiduals()]
