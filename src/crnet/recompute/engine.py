"""Activation recomputation: keep little in the forward pass, rebuild the rest in the backward pass.

The graph is autograd's own. Under a plan, what its nodes would keep is not kept: each node gets a
number instead (``torch.autograd.graph.saved_tensors_hooks``), and when the backward pass asks for
the first number of a block, the block is run once more from what was kept or rebuilt, and every
number is answered. The nodes, their order and their arithmetic stay those of a run without a plan,
so nothing but the values of rebuilt tensors could make a gradient differ; and parameters, hooks of
DDP and FSDP2, frozen factors and accumulation meet an ordinary graph.

Run once more, a block repeats no product of its maps: their bottlenecks Z = X A are kept and their
outputs Y are known. Norms, rotation, activation and attention are repeated.

    block   keep X_l and all Y_{l-1}; run the block again, products too (torch's own checkpointing)
    invert  keep X_l, Z_l, and Y_l for l in A; from the top down, Y_{l-1} = (Y_l - Z_l B_l) / gain_l
            (the paper's algorithm 1)
    replay  keep Z_l, and X_l and Y_{l-1} at the bottom of every segment of blocks; when the
            backward pass enters a segment, Y_l = gain_l Y_{l-1} + Z_l B_l and
            X_{l+1} = X_l + Y_l^o + Y_l^down from the bottom up, as the forward pass computed them

``replay`` is exact to the bit and needs a segment's Y at once; ``invert`` needs one block's Y at
once and multiplies rounding errors by 1/|gain| per layer (``cost.invert_error``), which a guard
keeps below a tolerance. ``rebuild_up`` and ``rebuild_down`` are the plain reference.
Which layers to keep, and what it all costs: ``crnet.cost``. Figures: docs/recomputation.md.

Refused: running blocks inside an ``autograd.Function`` with a nested backward (torch's reentrant
checkpointing). It holds all incoming gradients of a block until the last is done, one block's Y
more at the peak, and hides the parameters from the hooks of DDP and FSDP2.

Shapes: B batch, T tokens, D model width, F output width, R rank.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from crnet.cost.activations import Plan, guarded_layers, segments
from crnet.kernels.precision import compute_dtype
from crnet.linears import POSITIONS

Tensors = tuple[Tensor, ...]


class Block(Protocol):
    """What recomputation asks of a block (``model.Block``)."""

    def compute(self, x_BTD: Tensor, rope: Any, maps: Any) -> tuple[Tensor, Tensors]: ...
    def leave(self, x_BTD: Tensor, outputs: Sequence[Tensor]) -> Tensor: ...
    def above(self, x_BTD: Tensor, outputs: Sequence[Tensor]) -> Tensor: ...
    def linear(self, position: str) -> Any: ...


Step = Callable[[Any, Tensor, Any, Tensors], Tensors]
"""``step(block, x, rope, carry)``: what ``block(x, rope, *carry)`` returns, keeping less."""


class Recomputation:
    """A plan at work on one model."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.added: dict[str, tuple[int, ...]] = {}
        """Layers (1-based, by position) that ``invert``'s guard kept in the latest forward pass
        beyond the plan's, because the error would have passed the tolerance."""

    def steps(self, blocks: Sequence[Block], carry: str) -> Sequence[Step | None]:
        """How each block is run in one forward pass, and what the backward pass after it does.

        Args:
            blocks: bottom first.
            carry: which outputs a block reads: ``none``, ``below``, ``first`` (``linears.Method``).
        Raises:
            ValueError: ``invert`` where no block reads the outputs of the one below.
        """
        plan = self.plan
        if plan.policy == "replay":
            return _replay(plan, len(blocks), carry)
        if plan.policy == "invert":
            if carry != "below":
                raise ValueError(
                    "recompute invert turns a block's outputs into those of the block below, and "
                    "this parameterization does not carry them; take replay or block"
                )
            kept = self._guarded(blocks)
            return _invert(len(blocks), kept, plan)
        return [_checkpointed if plan.policy == "block" else None] * len(blocks)

    def _guarded(self, blocks: Sequence[Block]) -> dict[str, tuple[int, ...]]:
        """The set A of each position: the plan's, and what the bound of the error asks for."""
        kept: dict[str, tuple[int, ...]] = {}
        maps = [[block.linear(position) for block in blocks[1:]] for position in POSITIONS]
        gains = _values([it.gain() for column in maps for it in column])
        _gather(blocks[0])  # FSDP2 decides what dtype gathered parameters have
        compute = compute_dtype(next(blocks[0].linear("q").parameters()))
        for position, column in zip(POSITIONS, maps, strict=True):
            own, gains = gains[: len(column)], gains[len(column) :]
            dtype = (column[0].carry_dtype if column else None) or compute
            kept[position] = guarded_layers(
                self.plan.kept_layers,
                [math.inf, *own],
                torch.finfo(dtype).eps / 2,
                self.plan.tolerance,
            )
        planned = {*self.plan.kept_layers, len(blocks)}
        extra = {position: tuple(sorted({*layers} - planned)) for position, layers in kept.items()}
        self.added = {position: layers for position, layers in extra.items() if layers}
        return kept


def _gather(block: Any) -> None:
    # Under FSDP2 a block that is not due yet is sharded; no-op where it is whole.
    if hasattr(block, "unshard"):
        block.unshard()


def _values(items_1: Sequence[Any]) -> list[float]:
    """Of tensors of one item, with one wait for the device. Under FSDP2 the blocks are sharded when
    the forward pass begins, and one rank has the item: one collective for all of them."""
    sharded = [it for it in items_1 if hasattr(it, "full_tensor")]
    if sharded:
        from torch.distributed.tensor import DTensor, Partial  # a third of a second to import

        local = [it.to_local() for it in sharded]
        summands = torch.cat([it if it.numel() else it.new_zeros(1) for it in local])
        placements = [Partial() if it.is_shard() else it for it in sharded[0].placements]
        summed = DTensor.from_local(summands, sharded[0].device_mesh, placements)
        whole = iter(summed.full_tensor().split(1))
        items_1 = [next(whole) if hasattr(it, "full_tensor") else it for it in items_1]
    return torch.cat(list(items_1)).tolist() if items_1 else []


def next_carry(carry: str, layer_idx: int, below: Tensors, outputs: Tensors) -> Tensors:
    """What the block above ``layer_idx`` reads, given what this one read and its outputs."""
    return outputs if carry == "below" or (carry == "first" and layer_idx == 0) else below


# --- the plain reference --------------------------------------------------------------------------


def rebuild_up(
    carry_BTF: Tensor, z_BTR: Sequence[Tensor], b_RF: Sequence[Tensor], gains: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs of successive blocks from the output below them: eq. 6 repeated. Source: eq. 6."""
    outputs = []
    for z, b, gain in zip(z_BTR, b_RF, gains, strict=True):
        carry_BTF = gain * carry_BTF + z @ b
        outputs.append(carry_BTF)
    return outputs


def rebuild_down(
    y_BTF: Tensor, z_BTR: Sequence[Tensor], b_RF: Sequence[Tensor], gains: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs below that of the top block, nearest first: eq. 7 repeated, Z, B and gain of the
    blocks from the top one down. Source: eq. 7, algorithm 1."""
    outputs = []
    for z, b, gain in zip(z_BTR, b_RF, gains, strict=True):
        y_BTF = (y_BTF - z @ b) / gain
        outputs.append(y_BTF)
    return outputs


# --- block ----------------------------------------------------------------------------------------


def _checkpointed(block: Any, x_BTD: Tensor, rope: Any, carry: Tensors) -> Tensors:
    # forward, not the call: hooks of the module (FSDP2's) stay outside, around both runs.
    return checkpoint(
        block.forward, x_BTD, rope, *carry, use_reentrant=False, preserve_rng_state=False
    )


# --- a block run with numbers in place of tensors -------------------------------------------------


@dataclass
class _Known:
    """What a block is run once more from."""

    x_BTD: Tensor
    carry: Tensors
    reduced: Tensors
    outputs: Tensors
    mixed: Tensors
    """Of attention: its output and what else it keeps; empty where it is run again."""


class _Cell:
    """One block in one forward and backward pass.

    It knows nothing of nodes above or below it, so that no cycle outlives the graph.
    """

    def __init__(self, keep_attention: bool):
        self.keep_attention = keep_attention
        self.known: _Known | None = None
        self.rebuilt: list[Tensor | None] | None = None
        self.saved: list[tuple[torch.Size, torch.dtype]] = []
        """What its nodes would have kept, in their order."""

    def run(
        self, block: Any, x_BTD: Tensor, rope: Any, carry: Tensors
    ) -> tuple[Tensor, Tensors, _Known]:
        """What ``block.compute`` returns, and what it would have to be run once more from."""
        self.block, self.rope = block, rope
        self.requires_grad = (x_BTD.requires_grad, *(it.requires_grad for it in carry))
        self.dtypes = (x_BTD.dtype, *(it.dtype for it in carry))
        self.autocast = _autocast(x_BTD.device.type)
        self.versions = _versions(block)
        maps = _Recording(self, carry)
        with saved_tensors_hooks(self.pack, self.unpack):
            stream, outputs = block.compute(x_BTD, rope, maps)
        self.mixed_slots, self.num_mixed = maps.mixed_slots, len(maps.mixed)
        known = _Known(
            x_BTD.detach(),
            tuple(it.detach() for it in carry),
            tuple(maps.reduced),
            tuple(it.detach() for it in outputs),
            tuple(maps.mixed),
        )
        return stream, outputs, known

    def pack(self, tensor: Tensor) -> int:
        self.saved.append((tensor.shape, tensor.dtype))
        return len(self.saved) - 1

    def unpack(self, number: int) -> Tensor:
        if self.rebuilt is None:
            self.rebuilt = self.run_again()
        tensor, self.rebuilt[number] = self.rebuilt[number], None
        if tensor is None:
            raise RuntimeError(_SECOND_PASS)
        return tensor

    def run_again(self) -> list[Tensor | None]:
        known, self.known = self.known, None
        if known is None:
            raise RuntimeError(_OUT_OF_TURN)
        if _versions(self.block) != self.versions:
            raise RuntimeError(
                "a block's weights were changed in place between the forward and the backward "
                "pass, which runs it once more with them; change them after the backward pass"
            )
        saved: list[Tensor | None] = []

        def keep(tensor: Tensor) -> int:
            saved.append(tensor.detach())
            return -1

        wants_x, *wants_carry = self.requires_grad
        with torch.enable_grad(), self.autocast(), saved_tensors_hooks(keep, _never):
            x_BTD = known.x_BTD.detach().requires_grad_(wants_x)
            carry = [
                it.detach().requires_grad_(wanted)
                for it, wanted in zip(known.carry, wants_carry, strict=True)
            ]
            self.block.compute(x_BTD, self.rope, _Recalling(self, known, carry, saved))
        if [(it.shape, it.dtype) for it in saved if it is not None] != self.saved:
            raise RuntimeError(
                f"run once more, a block keeps {len(saved)} tensors instead of {len(self.saved)}, "
                "or of other shapes: was the model changed (a parameter frozen, a mode or an "
                "attention kernel switched) between the forward and the backward pass?"
            )
        return saved


_OUT_OF_TURN = (
    "a block's activations were asked for before those of the blocks above it were rebuilt: "
    "recomputation wants one backward pass from the loss through all blocks"
)
_SECOND_PASS = (
    "a second backward pass through recomputed activations: retain_graph=True is not supported "
    "with recompute invert or replay; run the forward pass again before it"
)


def _versions(block: Any) -> list[int]:
    # Each change in place counts one up; what autograd's own nodes look at for what they keep.
    return [parameter._version for parameter in block.parameters()]


def _never(_: int) -> Tensor:
    raise AssertionError("nobody goes backward through a block's second run")


def _autocast(device_type: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Enters the autocast state of this moment again, in whichever thread."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    cache = torch.is_autocast_cache_enabled()
    return lambda: torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=cache)


class _Recording:
    """Maps of the first run: each in its two halves, the bottleneck noted."""

    def __init__(self, cell: _Cell, carry: Tensors):
        self.cell, self.block = cell, cell.block
        self.below = dict(zip(POSITIONS, carry, strict=True)) if carry else {}
        self.reduced: list[Tensor] = []
        self.mixed: list[Tensor] = []
        self.mixed_slots: list[_View | int] = []
        """What attention keeps, in its order: a view of q, k or v, or a number in ``mixed``."""

    def __call__(self, position: str, x_BTD: Tensor) -> Tensor:
        module, carry = self.block.linear(position), self.below.get(position)
        with torch.no_grad():
            reduced = module.reduce(x_BTD)
            output = module.expand(reduced, carry)
        self.reduced.append(reduced)
        return module.recall(x_BTD, carry, (reduced, output))

    def attend(self, mix: Any, *qkv: Tensor) -> Tensor:
        if not self.cell.keep_attention:
            return mix(*qkv)
        # autograd holds on to both hooks: they may know addresses and lists, never q, k and v.
        names = {
            _address(it): (name, int(it.storage_offset()))
            for it, name in zip(qkv, "qkv", strict=True)
        }
        cell, mixed, slots = self.cell, self.mixed, self.mixed_slots

        def pack(tensor: Tensor) -> int:
            if (found := names.get(_address(tensor))) is None:
                mixed.append(tensor.detach())
                slots.append(len(mixed) - 1)
            else:  # q, k or v, perhaps looked at in another shape
                name, start = found
                offset = int(tensor.storage_offset()) - start
                slots.append((name, tuple(tensor.shape), tensor.stride(), offset))
            return cell.pack(tensor)

        with saved_tensors_hooks(pack, self.cell.unpack):
            mixed_BNTH = mix(*qkv)
        self.mixed.insert(0, mixed_BNTH.detach())
        self.mixed = [*self.mixed]  # the list that the hook knows must not outlive this pass
        mixed.clear()
        return mixed_BNTH


class _Recalling:
    """Maps of the second run: their results are known, only what nodes keep is wanted."""

    def __init__(
        self,
        cell: _Cell,
        known: _Known,
        carry: Sequence[Tensor],
        saved: list[Tensor | None],
    ):
        self.cell, self.known, self.saved = cell, known, saved
        self.below = dict(zip(POSITIONS, carry, strict=True)) if carry else {}
        self.halves = dict(
            zip(POSITIONS, zip(known.reduced, known.outputs, strict=True), strict=True)
        )

    def __call__(self, position: str, x_BTD: Tensor) -> Tensor:
        module = self.cell.block.linear(position)
        return module.recall(x_BTD, self.below.get(position), self.halves[position])

    def attend(self, mix: Any, *qkv: Tensor) -> Tensor:
        if not self.cell.keep_attention:
            return mix(*qkv)
        tensors = dict(zip("qkv", qkv, strict=True))
        mixed_BNTH, *others = self.known.mixed
        for slot in self.cell.mixed_slots:
            if isinstance(slot, int):
                self.saved.append(others[slot].detach())
            else:
                name, shape, stride, offset = slot
                base = tensors[name].detach()
                offset += base.storage_offset()
                self.saved.append(base.as_strided(shape, stride, offset))
        return mixed_BNTH.detach().requires_grad_(any(it.requires_grad for it in qkv))


_View = tuple[str, tuple[int, ...], tuple[int, ...], int]
"""``q``, ``k`` or ``v``; shape, stride and offset of a look at it."""


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Keep(torch.autograd.Function):
    """The stream, unchanged; keeps tensors, and hands them over when the backward pass comes by.

    The stream leaves a block through this node, and every other node of the block lies before it.
    """

    @staticmethod
    def forward(ctx, x_BTD, tensors, hand_over):
        ctx.save_for_backward(*tensors)
        ctx.hand_over = hand_over
        ctx.used = False
        return x_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_BTD):
        tensors = ctx.saved_tensors
        if ctx.used:
            raise RuntimeError(_SECOND_PASS)
        ctx.used = True
        ctx.hand_over(tensors)
        return dx_BTD, None, None


# --- replay ---------------------------------------------------------------------------------------


def _replay(plan: Plan, num_blocks: int, carry: str) -> list[Step]:
    made: list[Step] = []
    segment = None
    for bottom, top in segments(plan, num_blocks):
        segment = _Segment(bottom, top, carry, plan.keep_attention, below=segment)
        made += segment.steps()
    return made


class _Segment:
    """Successive blocks whose activations are rebuilt together, from the bottom up."""

    def __init__(
        self, bottom: int, top: int, carry: str, keep_attention: bool, below: _Segment | None
    ):
        self.bottom, self.carry = bottom, carry
        self.cells = [_Cell(keep_attention) for _ in range(bottom, top)]
        self.noted: list[_Known] = []
        self.from_above: list[Tensors] = []
        """Outputs of the top block: the segment above keeps them, and brings them by."""
        self.to_below = below.from_above if below else []

    def steps(self) -> list[Step]:
        return [functools.partial(self.run, cell) for cell in self.cells]

    def run(self, cell: _Cell, block: Any, x_BTD: Tensor, rope: Any, carry: Tensors) -> Tensors:
        stream, outputs, known = cell.run(block, x_BTD, rope, carry)
        self.noted.append(known)
        above = block.leave(stream, outputs)
        if cell is self.cells[-1]:
            noted, self.noted = self.noted, []
            kept = [noted[0].x_BTD, *noted[0].carry]
            for known in noted:
                kept += [*known.reduced, *known.mixed]
            above = _Keep.apply(above, kept, self.rebuild)
        return above, *outputs

    def rebuild(self, kept: Tensors) -> None:
        x_BTD, *rest = kept
        tensors = iter(rest)
        carry = tuple(next(tensors) for _ in self.cells[0].requires_grad[1:])
        if self.carry == "below" and any(self.cells[0].requires_grad[1:]):  # somebody asks for it
            self.to_below.append(carry)
        for idx, cell in enumerate(self.cells, start=self.bottom):
            # A hook between blocks may have cast (FSDP2's cast_forward_inputs).
            entering = zip((x_BTD, *carry), cell.dtypes, strict=True)
            x_BTD, *several = (it.to(dtype) for it, dtype in entering)
            carry = tuple(several)
            reduced = tuple(next(tensors) for _ in POSITIONS)
            mixed = tuple(next(tensors) for _ in range(cell.num_mixed))
            if cell is self.cells[-1] and self.from_above:
                outputs = self.from_above.pop()
            else:
                below = carry or (None,) * len(POSITIONS)
                outputs = tuple(
                    linear.expand(z, y)
                    for linear, z, y in zip(_linears(cell.block), reduced, below, strict=True)
                )
            if cell.saved:  # else no gradient passes through the block
                cell.known = _Known(x_BTD, carry, reduced, outputs, mixed)
            if cell is not self.cells[-1]:
                x_BTD = cell.block.above(x_BTD, outputs)
            carry = next_carry(self.carry, idx, carry, outputs)


def _linears(block: Any) -> list[Any]:
    _gather(block)
    return [block.linear(position) for position in POSITIONS]


# --- invert ---------------------------------------------------------------------------------------


def _invert(num_blocks: int, kept_layers: Mapping[str, Sequence[int]], plan: Plan) -> list[Step]:
    handed: dict[int, dict[str, Tensor]] = {}
    return [
        _Inverted(idx, kept_layers, _Cell(plan.keep_attention), handed).run
        for idx in range(num_blocks)
    ]


class _Inverted:
    """One block of algorithm 1: its outputs come from above or were kept, those below follow."""

    def __init__(
        self,
        idx: int,
        kept_layers: Mapping[str, Sequence[int]],
        cell: _Cell,
        handed: dict[int, dict[str, Tensor]],
    ):
        self.idx, self.cell, self.handed = idx, cell, handed
        self.is_kept = [idx + 1 in kept_layers[position] for position in POSITIONS]
        self.is_kept_below = [idx in kept_layers[position] for position in POSITIONS]

    def run(self, block: Any, x_BTD: Tensor, rope: Any, carry: Tensors) -> Tensors:
        stream, outputs, known = self.cell.run(block, x_BTD, rope, carry)
        self.is_dense = [
            _address(z) == _address(y) for z, y in zip(known.reduced, known.outputs, strict=True)
        ]
        kept = [x_BTD.detach()]
        kept += [z for z, dense in zip(known.reduced, self.is_dense, strict=True) if not dense]
        kept += [y for y, is_kept in zip(known.outputs, self.is_kept, strict=True) if is_kept]
        if carry:
            kept += [
                y for y, is_kept in zip(known.carry, self.is_kept_below, strict=True) if is_kept
            ]
        kept += known.mixed
        return _Keep.apply(block.leave(stream, outputs), kept, self.rebuild), *outputs

    def rebuild(self, kept: Tensors) -> None:
        x_BTD, *rest = kept
        tensors = iter(rest)
        bottlenecks = [None if dense else next(tensors) for dense in self.is_dense]
        handed = self.handed.pop(self.idx, {})
        for position, is_kept in zip(POSITIONS, self.is_kept, strict=True):
            if not is_kept and position not in handed:
                raise RuntimeError(_OUT_OF_TURN)
        outputs = tuple(
            next(tensors) if is_kept else handed[position]
            for position, is_kept in zip(POSITIONS, self.is_kept, strict=True)
        )
        carry = []
        below: dict[str, Tensor] = {}
        if any(self.cell.requires_grad[1:]):  # somebody asks for it
            self.handed[self.idx - 1] = below
        for position, is_kept, dtype in zip(
            POSITIONS, self.is_kept_below, self.cell.dtypes[1:], strict=False
        ):
            if is_kept:
                carry.append(next(tensors))
                continue
            at = len(carry)
            linear = self.cell.block.linear(position)
            below[position] = linear.shrink(outputs[at], bottlenecks[at]).to(dtype)
            carry.append(below[position])
        reduced = tuple(y if z is None else z for z, y in zip(bottlenecks, outputs, strict=True))
        self.cell.known = _Known(x_BTD, tuple(carry), reduced, outputs, tuple(tensors))
