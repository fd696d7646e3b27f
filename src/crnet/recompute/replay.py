"""Rebuilding a segment of blocks from the bottom up, exact to the bit; where what it is rebuilt
from was packed, as exact as that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crnet.layers.block import Block, Carries
from crnet.recompute.packed import Packing, Shelf, is_activation
from crnet.recompute.second_run import BlockRun, Keep, Known, gather, written

Rebuilt = dict[tuple[int, str], Tensor]
"""Outputs by (layer, position) that a segment above kept as its carries: they need no product."""


class Segment:
    """Successive blocks whose activations are rebuilt together."""

    def __init__(
        self,
        blocks: Sequence[Block],
        keep_attention: bool,
        rebuilt: Rebuilt,
        packing: Packing | None = None,
    ):
        """``packing``: of the forward pass, where what is kept is packed."""
        self.packing = packing
        self.block_runs = [BlockRun(block, keep_attention) for block in blocks]
        self.rebuilt = rebuilt
        self.noted: list[Known] = []
        self.entering: dict[tuple[str, str], Any] = {}
        """What the blocks below had handed on when the segment began, by source and position."""

    def runs(self) -> list[Any]:
        """One a block: carries -> the ``run`` of its call."""

        def made(block_run: BlockRun) -> Any:
            return lambda carries: (
                lambda block, context, tensors: self.run(block_run, carries, context, tensors)
            )

        return [made(block_run) for block_run in self.block_runs]

    def run(
        self, block_run: BlockRun, carries: Carries, context: Any, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        bottom, top = self.block_runs[0], self.block_runs[-1]
        if block_run is bottom:
            self.entering = carries.needed([each.block for each in self.block_runs])
        (state,), handed, known = block_run.run(context, tensors)
        if block_run.strays and block_run is not top:
            raise RuntimeError(
                f"what block {block_run.block.layer_idx + 1} writes to the stream is not the "
                f"output of its map {block_run.strays[0]} (a hook, or an operation behind it): "
                "recompute replay rebuilds the stream from the maps' outputs; take "
                "--train.recompute block, or end a segment at every block "
                "(--train.recompute-layers every-1)"
            )
        self.noted.append(known)
        if block_run is top:
            noted, self.noted = self.noted, []
            entering = {key: tensor.detach() for key, tensor in self.entering.items()}
            self.entering = dict.fromkeys(entering)
            kept = [*noted[0].state, *entering.values()]
            for known in noted:
                kept += [*known.bottlenecks.values(), *known.mixed]
            state = self._keep(state, kept)
        return state, *(handed[position] for position in block_run.block.hands)

    def _keep(self, state: Tensor, kept: list[Tensor]) -> Tensor:
        if self.packing is None:
            return Keep.apply(state, kept, self.rebuild)
        shelf, self.packing = Shelf(self.packing), None
        for tensor in kept:
            shelf.put(tensor, exact=not is_activation(tensor, kept[0].shape[:2]))
        parts, rebuild = shelf.take_parts(), self.rebuild
        return Keep.apply(state, parts, lambda parts: rebuild(shelf.open(parts)))

    def rebuild(self, kept: Sequence[Tensor]) -> None:
        tensors = iter(kept)
        state = (next(tensors),)
        carries = Carries({key: next(tensors) for key in self.entering})
        self._hand_down(carries)
        for block_run in self.block_runs:
            block = block_run.block
            # A hook between blocks may have cast (FSDP2's cast_forward_inputs).
            state = tuple(
                tensor.to(dtype)
                for tensor, dtype in zip(state, block_run.state_dtypes, strict=True)
            )
            read = {
                name: tensor.to(block_run.carry_dtypes[name])
                for name, tensor in zip(block.reads, carries.of(block), strict=True)
            }
            bottlenecks = {position: next(tensors) for position in block.maps}
            mixed = tuple(next(tensors) for _ in range(block_run.num_mixed))
            with torch.no_grad(), block_run.autocast():
                outputs = self._outputs(block, bottlenecks, read)
            if block_run.saved:  # else no gradient passes through the block
                block_run.known = Known(state, read, bottlenecks, outputs, mixed)
            if block_run is not self.block_runs[-1]:
                with torch.no_grad(), block_run.autocast():
                    state = block.rebuild_state(state, written(block_run, outputs))
                handed = {"output": outputs, "bottleneck": bottlenecks}
                returned = [handed[block.maps[name].hands][name] for name in block.hands]
                carries.take(block, (*state, *returned))

    def _hand_down(self, carries: Carries) -> None:
        """Give the outputs that were kept as carries to the segment that made them."""
        bottom = self.block_runs[0]
        for position, source in bottom.block.reads.items():
            is_output = bottom.block.maps[position].hands == "output"
            wanted = bottom.wants_carry[position]  # somebody asks for it
            if source == "below" and is_output and wanted:
                key = (bottom.block.layer_idx - 1, position)
                self.rebuilt[key] = carries.below(position)

    def _outputs(
        self, block: Block, bottlenecks: dict[str, Tensor], carries: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        gather(block)
        outputs = {}
        for position, linear in block.maps.items():
            output = self.rebuilt.pop((block.layer_idx, position), None)
            if output is None and linear.comes_apart:
                output = linear.up_project(bottlenecks[position], carries.get(position))
            elif output is None:
                output = bottlenecks[position]  # which is the output
            outputs[position] = output
        return outputs
