"""Activation recomputation: keep little in the forward pass, rebuild the rest in the backward pass.

The graph is autograd's own. Under a plan, what its nodes would keep is not kept: each node gets a
number instead (``torch.autograd.graph.saved_tensors_hooks``), and when the backward pass asks for
the first number of a block, the block is run once more from what was kept or rebuilt, and every
number is answered. The nodes, their order and their arithmetic stay those of a run without a plan,
so nothing but the values of rebuilt tensors could make a gradient differ; and parameters, hooks of
DDP and FSDP2, frozen factors and accumulation meet an ordinary graph.

Run once more, a block repeats no product of its maps: their bottlenecks Z = X A are kept and their
outputs Y are known, each by the name of its position. Norms, rotation, activation and attention
are repeated.

    block   keep the state that enters a block, and the carries; run the block again, products too
            (torch's own checkpointing)
    invert  keep X_l, Z_l, and Y_l for l in A; from the top down, Y_{l-1} = (Y_l - Z_l B_l) / gain_l
            (the paper's algorithm 1)
    replay  keep Z_l, and X_l and the carries at the bottom of every segment of blocks; when the
            backward pass enters a segment, Y_l = gain_l Y_{l-1} + Z_l B_l and
            X_{l+1} = X_l + Y_l^o + Y_l^down from the bottom up, as the forward pass computed them

Under ``none`` and ``replay`` what is kept may wait in four bits an item (``packed``).

``replay`` is exact to the bit and needs a segment's Y at once; ``invert`` needs one block's Y at
once and multiplies rounding errors by 1/|gain| per layer (``plan.invert_error``), which a guard
keeps below a tolerance. ``kernels.naive`` has the plain reference of both directions.
Which layers to keep, and what it all costs: ``crnet.cost``. Figures: docs/recomputation.md.

Refused: running blocks inside an ``autograd.Function`` with a nested backward (torch's reentrant
checkpointing). It holds all incoming gradients of a block until the last is done, one block's Y
more at the peak, and hides the parameters from the hooks of DDP and FSDP2.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crnet.kernels.precision import casts_kept, compute_dtype
from crnet.layers.block import Block, Carries, State
from crnet.layers.compiled_blocks import forward
from crnet.recompute.invert import InvertedBlock
from crnet.recompute.packed import PackedBlock, Packing
from crnet.recompute.plan import Added, RecomputePlan, added_layers, inverted_layers, segments
from crnet.recompute.replay import Rebuilt, Segment
from crnet.recompute.second_run import gather, refuse_hooks


class Recomputation:
    """A plan at work on one model: the runner of its blocks."""

    def __init__(self, plan: RecomputePlan, run: Any = None):
        """``run``: how ``block`` runs a block, as ``Block.forward``'s; None: as written."""
        self.plan = plan
        self.run = run or forward
        self.added: Added = {}
        """What ``invert``'s guard kept in the latest forward pass beyond the plan's layers, because
        the error would have passed the tolerance."""
        self._fixed, self._guarded = False, False

    def __call__(
        self,
        blocks: Sequence[Block],
        state: State,
        context: Any,
        carries: Carries | None = None,
    ) -> State:
        """Run every block; the backward pass after it does what the plan says.

        ``carries``: as ``run_blocks``'s. The plan counts layers from the first of these blocks.

        Raises:
            RuntimeError: ``replay`` or ``invert`` where somebody hooked a map or a block.
            ValueError: ``invert`` where a block does not read the outputs of the one below.
        """
        policy = self.plan.policy
        if policy in ("replay", "invert"):
            refuse_hooks(blocks, policy)
        runs = {
            "none": self._packed,
            "replay": self._replayed,
            "invert": self._inverted,
            "block": self._checkpointed,
        }
        carries = Carries() if carries is None else carries
        for block, run in zip(blocks, runs[policy](blocks), strict=True):
            returned = block(context, *state, *carries.of(block), run=run(carries))
            state = carries.take(block, returned)
            del returned
        return state

    @contextlib.contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """Meanwhile the weights do not change: the guard reads the gains once, which waits for the
        device, and not in every forward pass. (Version counters do not tell: torch's fused
        optimizers leave them alone.) Under ``none`` their casts are kept."""
        self._fixed, self._guarded = True, False
        kept = casts_kept() if self.plan.policy == "none" else contextlib.nullcontext()
        try:
            with kept:
                yield
        finally:
            self._fixed = False

    def _packed(self, blocks: Sequence[Block]) -> list[Any]:
        packing = Packing()
        return [lambda carries: PackedBlock(packing).run] * len(blocks)

    def _checkpointed(self, blocks: Sequence[Block]) -> list[Any]:
        def flat(block: Block, context: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
            return self.run(block, context, tensors)

        def run(block: Block, context: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            # forward, not the call: hooks of the module (FSDP2's) stay outside, around both runs.
            return checkpoint(
                flat, block, context, *tensors, use_reentrant=False, preserve_rng_state=False
            )

        return [lambda carries: run] * len(blocks)

    def _replayed(self, blocks: Sequence[Block]) -> list[Any]:
        rebuilt: Rebuilt = {}
        runs: list[Any] = []
        packing = Packing() if self.plan.is_packed else None
        for bottom, top in segments(self.plan, len(blocks)):
            segment = Segment(blocks[bottom:top], self.plan.keep_attention, rebuilt, packing)
            runs += segment.runs()
        return runs

    def _inverted(self, blocks: Sequence[Block]) -> list[Any]:
        positions = tuple(blocks[0].maps)
        for block in blocks[1:]:
            if any(block.reads.get(position) != "below" for position in positions):
                raise ValueError(
                    "recompute invert turns a block's outputs into those of the block below, and "
                    "this parameterization does not carry them; take replay or block"
                )
            if not all(linear.comes_apart for linear in block.maps.values()):
                raise ValueError(
                    "recompute invert: the output below a map with an adapter does not follow from "
                    "its own; take replay or block"
                )
        if not (self._fixed and self._guarded):
            self.added, self._guarded = self._guard(blocks), True
        kept = inverted_layers(self.plan, len(blocks), positions, self.added)
        handed: dict[int, dict[str, Tensor]] = {}
        made = [
            InvertedBlock(block, kept, self.plan.keep_attention, handed).run for block in blocks
        ]
        return [lambda carries, run=run: run for run in made]

    def _guard(self, blocks: Sequence[Block]) -> Added:
        """What the bound of the error asks for beyond the plan, from the gains of this moment."""
        maps = {name: [block.maps[name] for block in blocks[1:]] for name in blocks[0].maps}
        values = iter(_values([linear.gain() for column in maps.values() for linear in column]))
        gather(blocks[0])  # FSDP2 decides what dtype gathered parameters have
        compute = compute_dtype(next(iter(blocks[0].maps.values())).weight_for_dtype())
        gains, units = {}, {}
        for name, column in maps.items():
            gains[name] = [math.inf, *(next(values) for _ in column)]
            dtype = (column[0].carry_dtype if column else None) or compute
            units[name] = torch.finfo(dtype).eps / 2
        return added_layers(self.plan, gains, units)


def _values(items_1: Sequence[Any]) -> list[float]:
    """Of tensors of one item, with one wait for the device. Under FSDP2 the blocks are sharded when
    the forward pass begins, and one rank has the item: one collective for all of them."""
    sharded = [item for item in items_1 if hasattr(item, "full_tensor")]
    if sharded:
        from torch.distributed.tensor import DTensor, Partial  # a third of a second to import

        local = [item.to_local() for item in sharded]
        summands = torch.cat([item if item.numel() else item.new_zeros(1) for item in local])
        placements = [Partial() if each.is_shard() else each for each in sharded[0].placements]
        summed = DTensor.from_local(summands, sharded[0].device_mesh, placements)
        whole = iter(summed.full_tensor().split(1))
        items_1 = [next(whole) if hasattr(item, "full_tensor") else item for item in items_1]
    return torch.cat(list(items_1)).tolist() if items_1 else []
