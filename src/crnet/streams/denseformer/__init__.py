"""DenseFormer: what leaves a block is a learned weighted sum of all blocks' outputs so far.

`X_i <- sum_j alpha_ij X_j` after block i, over the embedding `X_0` and the outputs `X_1 ... X_i`;
with a dilation k over those j that leave the rest of i by k, with a period p after every p-th
block. `alpha_ii` is 1 at first and every other weight 0: the model begins as the one without. The
next block reads the sum; later sums are made of the outputs themselves, before they were mixed.

Source: Pagliardini et al. 2024 (arXiv:2402.02622), official code at c99a623. Figure 6 of CR-Net's
paper has it over low rank: `--model.linear lowrank --model.stream denseformer`.

Deviation: the weights of a sum are two tensors, the block's own and the others, so that both begin
as constants. An output that no later sum reads is not held on to. No weight decays. Figure 6's
first block is full rank; `lowrank` has a rank there too (`--model.rank 2048x1,448x23` comes near).

Unverified: dilation and period of figure 6, and rates on LLaMA; the weights learn at the base rate.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from crnet.specs import Shape, StreamWork, TensorSpec, constant, in_each_way
from crnet.streams import Stream
from crnet.streams._passes import sum_work


@dataclass(frozen=True, kw_only=True)
class DenseFormerOptions:
    """DenseFormer."""

    dilation: int = 1
    """A sum takes every so many-th output, from the block's own down (published: 1, 2, 4)."""
    period: int = 1
    """Blocks from one sum to the next (published: 1, 5)."""


@dataclass(frozen=True)
class Around:
    """Where a sublayer stands. Outputs are counted from the embedding, 0: block i makes i."""

    output: int
    """That its block makes."""
    num_blocks: int
    is_first: bool
    """Of its block."""
    is_last: bool
    options: DenseFormerOptions

    @property
    def sources(self) -> list[int]:
        """Outputs that are mixed behind it, the block's own at the end; none: there is no sum."""
        return self._read_by(self.output) if self.is_last else []

    def held(self, output: int) -> list[int]:
        """Those that later sums read, once that output is made."""
        later = range(output + 1, self.num_blocks + 1)
        wanted = {source for each in later for source in self._read_by(each)}
        return sorted(source for source in wanted if source <= output)

    def _read_by(self, output: int) -> list[int]:
        rest = output % self.options.dilation
        is_mixed = output % self.options.period == 0
        return [*range(rest, output + 1, self.options.dilation)] if is_mixed else []


def around(sublayer_idx: int, num_sublayers: int, shape: Shape, options) -> Around:
    """Of a sublayer, counted from the bottom of the model."""
    of_block = num_sublayers // shape.num_layers
    block, within = divmod(sublayer_idx, of_block)
    ends = within == of_block - 1, within == 0
    return Around(block + 1, num_sublayers // of_block, ends[1], ends[0], options)


class DenseFormer(Stream):
    name = "denseformer"
    summary = "a learned weighted sum of all blocks' outputs, after each block"
    Options = DenseFormerOptions
    examples = (DenseFormerOptions(dilation=2), DenseFormerOptions(period=2))
    policies = ("none", "block")

    def problems(self, shape: Shape, options: DenseFormerOptions) -> list[str]:
        found = [
            f"--model.denseformer.{key} is {value}; take 1 or more"
            for key, value in dataclasses.asdict(options).items()
            if value < 1
        ]
        if options.period > shape.num_layers:
            found.append(
                f"--model.denseformer.period {options.period} with {shape.num_layers} blocks: no "
                f"sum would be made; take at most {shape.num_layers}"
            )
        return found

    def tensors(self, sublayer_idx, num_sublayers, shape, options):
        if sublayer_idx == num_sublayers:
            return {}
        sources = around(sublayer_idx, num_sublayers, shape, options).sources
        own = TensorSpec((1,), "gain", constant(1.0), dtype="float32", decays=False)
        others = TensorSpec(
            (len(sources) - 1,), "gain", constant(0.0), dtype="float32", decays=False
        )
        found = {"own": own} if sources else {}
        return found | ({"others": others} if len(sources) > 1 else {})

    def work(self, sublayer_idx, num_sublayers, shape, options, rows, item_bytes, written_bytes):
        if sublayer_idx == num_sublayers:
            return StreamWork()
        items = rows * shape.hidden_size
        size, where = items * item_bytes, around(sublayer_idx, num_sublayers, shape, options)
        plain = sum_work(size, items * written_bytes, item_bytes != written_bytes)
        count, stays = len(where.sources), size if where.is_last else 0
        waiting = len(where.held(where.output - 1)) * size
        if not count:
            return dataclasses.replace(plain, gradient_bytes=waiting, kept_state_bytes=stays)
        casts = 2 if item_bytes < 4 else 0  # to fp32 and back
        return dataclasses.replace(
            plain,
            kept_bytes=size,  # the block's own output; the others are kept already
            kept_state_bytes=stays + (size if where.output in where.held(where.output) else 0),
            repeats_output=True,
            gradient_bytes=waiting,
            passes=plain.passes + in_each_way((3 + casts) * count * size, count),
            # Of each source a dot, its gradient, and the sum with those of other reads.
            backward_passes=plain.backward_passes
            + in_each_way((7 + casts) * count * size, 3 * count),
        )

    def crossing(self, sublayer_idx, num_sublayers, shape, options, item_bytes, written):
        where = around(sublayer_idx, num_sublayers, shape, options)
        return (item_bytes,) * (1 + len(where.held(where.output - 1)))

    def make(self, sublayer_idx, num_sublayers, shape, options):
        from crnet.streams._add import Add
        from crnet.streams.denseformer.module import Outputs

        if sublayer_idx == num_sublayers:
            return Add()
        return Outputs(around(sublayer_idx, num_sublayers, shape, options))


METHODS = [DenseFormer()]
