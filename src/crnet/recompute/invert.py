"""The paper's algorithm 1: a block's outputs lead to those of the block below (eq. 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crnet.layers.block import Block
from crnet.recompute.second_run import OUT_OF_TURN, BlockRun, Keep, Known, address


class InvertedBlock:
    """One block of algorithm 1: its outputs come from above or were kept, those below follow."""

    def __init__(
        self,
        block: Block,
        kept_layers: Mapping[str, Sequence[int]],
        keep_attention: bool,
        handed: dict[int, dict[str, Tensor]],
    ):
        self.block_run = BlockRun(block, keep_attention)
        self.layer_idx, self.handed = block.layer_idx, handed
        self.kept = {name for name in block.maps if block.layer_idx + 1 in kept_layers[name]}
        """Positions whose outputs are kept."""
        self.kept_below = {name for name in block.reads if block.layer_idx in kept_layers[name]}

    def run(self, block: Block, context: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        (state,), handed, known = self.block_run.run(context, tensors)
        self.dense = {
            name
            for name, bottleneck in known.bottlenecks.items()
            if address(bottleneck) == address(known.outputs[name])
        }
        """Positions whose bottleneck is the output itself."""
        kept = [*known.state]
        kept += [known.bottlenecks[name] for name in block.maps if name not in self.dense]
        kept += [known.outputs[name] for name in block.maps if name in self.kept]
        kept += [known.carries[name] for name in block.reads if name in self.kept_below]
        kept += known.mixed
        state = Keep.apply(state, kept, self.rebuild)
        return state, *(handed[position] for position in block.hands)

    def rebuild(self, kept: Sequence[Tensor]) -> None:
        block, tensors = self.block_run.block, iter(kept)
        state = (next(tensors),)
        bottlenecks = {name: next(tensors) for name in block.maps if name not in self.dense}
        outputs = dict(self.handed.pop(self.layer_idx, {}))
        outputs |= {name: next(tensors) for name in block.maps if name in self.kept}
        if outputs.keys() != block.maps.keys():
            raise RuntimeError(OUT_OF_TURN)
        carries = {name: next(tensors) for name in block.reads if name in self.kept_below}
        below: dict[str, Tensor] = {}
        with torch.no_grad(), self.block_run.autocast():
            for name in block.reads:
                if name not in carries:
                    dtype = self.block_run.carry_dtypes[name]
                    carry = block.maps[name].carry_from(outputs[name], bottlenecks[name])
                    below[name] = carries[name] = carry.to(dtype)
        if any(self.block_run.wants_carry.values()):  # somebody asks for it
            self.handed[self.layer_idx - 1] = below
        bottlenecks |= {name: outputs[name] for name in self.dense}
        carries = {name: carries[name] for name in block.reads}
        self.block_run.known = Known(state, carries, bottlenecks, outputs, tuple(tensors))
