"""A block run with numbers in place of tensors, and once more in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from crnet.layers.block import Block, State
from crnet.layers.projector import refuse_second, with_bias

OUT_OF_TURN = (
    "a block's activations were asked for before those of the blocks above it were rebuilt: "
    "recomputation wants one backward pass from the loss through all blocks"
)
SECOND_PASS = (
    "a second backward pass through recomputed activations: retain_graph=True is not supported "
    "with recompute invert or replay, nor where activations are kept as nf4; run the forward pass "
    "again before it"
)


@dataclass
class Known:
    """What a block is run once more from, by position where it is of a map."""

    state: State
    carries: dict[str, Tensor]
    bottlenecks: dict[str, Tensor]
    outputs: dict[str, Tensor]
    mixed: tuple[Tensor, ...]
    """Of attention: its output and what else it keeps; empty where it is run again."""


class BlockRun:
    """One block in one forward and backward pass.

    It knows nothing of nodes above or below it, so that no cycle outlives the graph.
    """

    def __init__(self, block: Block, keep_attention: bool):
        self.block = block
        self.keep_attention = keep_attention
        self.known: Known | None = None
        self.rebuilt: list[Tensor | None] | None = None
        self.saved: list[tuple[torch.Size, torch.dtype]] = []
        """What its nodes would have kept, in their order."""
        self.strays: tuple[str, ...] = ()
        """Positions whose sublayer wrote something else than the output of their map."""

    def run(
        self, context: Any, tensors: Sequence[Tensor]
    ) -> tuple[State, dict[str, Tensor], Known]:
        """Return the new state, what the maps hand on, and what it would take to run once more."""
        state, carries = self.block.split(tensors)
        self.context = context
        self.wants_state = tuple(tensor.requires_grad for tensor in state)
        self.wants_carry = {name: tensor.requires_grad for name, tensor in carries.items()}
        self.state_dtypes = tuple(tensor.dtype for tensor in state)
        self.carry_dtypes = {name: tensor.dtype for name, tensor in carries.items()}
        self.autocast = autocast_of_now(state[0].device.type)
        self.parameters = self.block.read_parameters()
        self.versions = [parameter._version for parameter in self.parameters]
        projector = _FirstRun(self, carries)
        with saved_tensors_hooks(self.pack, self.unpack):
            left = self.block.run(state, projector, context)
        # Where nothing is saved no gradient passes, and nobody will ask.
        self.sums = _sums(self.parameters) if self.saved else None
        projector.check_outputs()
        self.views, self.num_mixed = projector.views, len(projector.mixed)
        self.strays = tuple(projector.strays)
        known = Known(
            tuple(tensor.detach() for tensor in state),
            {name: tensor.detach() for name, tensor in carries.items()},
            # In the order of the maps, not that of asking: they are kept and found by it.
            {position: projector.bottlenecks[position] for position in self.block.maps},
            {position: projector.outputs[position] for position in self.block.maps},
            tuple(projector.mixed),
        )
        return left, projector.handed, known

    def pack(self, tensor: Tensor) -> int:
        self.saved.append((tensor.shape, tensor.dtype))
        return len(self.saved) - 1

    def unpack(self, number: int) -> Tensor:
        if self.rebuilt is None:
            self.rebuilt = self.run_again()
        tensor, self.rebuilt[number] = self.rebuilt[number], None
        if tensor is None:
            raise RuntimeError(SECOND_PASS)
        return tensor

    def check_parameters(self) -> None:
        """Raise ``RuntimeError`` where the weights are not those of the forward pass."""
        now = self.block.read_parameters()
        same = len(now) == len(self.parameters) and all(map(_is, now, self.parameters))
        if not same:
            raise RuntimeError(
                "a block's weights are other tensors than in the forward pass (functional_call, or "
                "a weight set anew); recompute invert and replay run the block once more and need "
                "them: call backward inside, or take --train.recompute block or none"
            )
        changed = [parameter._version for parameter in now] != self.versions
        before, self.sums = self.sums, None
        assert before is not None
        sums = _sums(now)
        if not changed and sums.device.type == "cuda":  # no wait for the device
            torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
                (sums == before).all(), CHANGED
            )
        elif changed or not torch.equal(sums, before):
            raise RuntimeError(CHANGED)

    def run_again(self) -> list[Tensor | None]:
        known, self.known = self.known, None
        if known is None:
            raise RuntimeError(OUT_OF_TURN)
        self.check_parameters()
        saved: list[Tensor | None] = []

        def keep(tensor: Tensor) -> int:
            saved.append(tensor.detach())
            return -1

        with torch.enable_grad(), self.autocast(), saved_tensors_hooks(keep, never):
            state = tuple(
                tensor.detach().requires_grad_(wanted)
                for tensor, wanted in zip(known.state, self.wants_state, strict=True)
            )
            carries = {
                name: tensor.detach().requires_grad_(self.wants_carry[name])
                for name, tensor in known.carries.items()
            }
            projector = _SecondRun(self, known, carries, saved)
            self.block.run(state, projector, self.context, without_last_write=True)
        if [(tensor.shape, tensor.dtype) for tensor in saved if tensor is not None] != self.saved:
            raise RuntimeError(
                f"run once more, a block keeps {len(saved)} tensors instead of {len(self.saved)}, "
                "or of other shapes: was the model changed (a parameter frozen, a mode or an "
                "attention kernel switched) between the forward and the backward pass?"
            )
        return saved


CHANGED = (
    "a block's weights were changed between the forward and the backward pass, which runs it once "
    "more with them; change them after the backward pass"
)


def _is(one: Any, other: Any) -> bool:
    return one is other


def _sums(parameters: Sequence[Tensor]) -> Tensor:
    """One number a parameter: the sum of its bits, read as whole numbers.

    Version counters do not see edits through ``.data``; these do, however small the edit is, and
    in whatever order a device adds. Not seen: items that change places. Cost: one read.
    """
    with torch.no_grad():
        return torch.stack([_words(parameter.detach()).sum() for parameter in parameters])


def _words(tensor: Tensor) -> Tensor:
    num_bytes = tensor.numel() * tensor.element_size()
    if tensor.is_contiguous() and num_bytes % 8 == 0 and tensor.storage_offset() == 0:
        return tensor.view(-1).view(torch.int64)  # several times faster than narrow ones
    return tensor.view(_INTEGERS[tensor.element_size()])


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def never(_: int) -> Tensor:
    raise AssertionError("nobody goes backward through a block's second run")


def autocast_of_now(device_type: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Enters the autocast state of this moment again, in whichever thread."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    cache = torch.is_autocast_cache_enabled()
    return lambda: torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=cache)


class _FirstRun:
    """Projector of the first run: each map in its two halves, bottleneck and output noted."""

    def __init__(self, run: BlockRun, carries: Mapping[str, Tensor]):
        self.block_run = run
        self.carries = carries
        self.handed: dict[str, Tensor] = {}
        self.bottlenecks: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}
        self.returned: dict[str, _Look] = {}
        self.strays: list[str] = []
        self.mixed: list[Tensor] = []
        self.views: list[_View | int] = []
        """What attention keeps, in its order: a view of q, k or v, or a number in ``mixed``."""

    def __call__(self, position: str, x_BTD: Tensor) -> Tensor:
        linear, carry = self.block_run.block.maps[position], self.carries.get(position)
        refuse_second(position, self.outputs)
        if linear.hands == "bottleneck" and not linear.comes_apart:
            raise RuntimeError(
                f"the map {position} hands on its bottleneck and does not come apart: recompute "
                "replay cannot rebuild that; take --train.recompute block or none"
            )
        known = None
        if linear.comes_apart:
            with torch.no_grad():
                bottleneck = linear.down_project(x_BTD, carry)
                known = bottleneck, linear.up_project(bottleneck, carry)
        more = {"known": known} if known else {}
        output, self.handed[position] = linear(x_BTD, carry, **more)
        self.outputs[position] = output.detach()
        self.bottlenecks[position] = known[0] if known else output.detach()
        self.versions[position] = output._version
        output = with_bias(linear, output)
        if position in self.block_run.block.writes:
            self.returned[position] = _look(output)
        return output

    def wrote(self, position: str, y_BTD: Tensor) -> None:
        if self.returned.get(position) != _look(y_BTD):
            self.strays.append(position)

    def check_outputs(self) -> None:
        """Raise ``RuntimeError`` where the block did not leave its maps' outputs alone."""
        for position in self.block_run.block.maps:
            if position not in self.outputs:
                raise RuntimeError(
                    f"a block did not ask for its map {position}; recompute invert and replay "
                    "need the outputs of all: take --train.recompute block or none"
                )
            if self.outputs[position]._version != self.versions[position]:
                raise RuntimeError(
                    f"the output of the map {position} was changed in place; recompute invert and "
                    "replay rebuild it as the map made it: write to a copy"
                )

    def attend(self, mix: Any, *qkv: Tensor) -> Tensor:
        if not self.block_run.keep_attention:
            return mix(*qkv)
        if self.views:
            raise RuntimeError(
                "a block mixes tokens twice in one pass; take --train.recompute-attention rerun"
            )
        # autograd holds on to both hooks: they may know addresses and lists, never q, k and v.
        names = {
            address(tensor): (name, int(tensor.storage_offset()))
            for tensor, name in zip(qkv, "qkv", strict=True)
        }
        run, mixed, views = self.block_run, self.mixed, self.views

        def pack(tensor: Tensor) -> int:
            if (found := names.get(address(tensor))) is None:
                mixed.append(tensor.detach())
                views.append(len(mixed) - 1)
            else:  # q, k or v, perhaps looked at in another shape
                name, start = found
                offset = int(tensor.storage_offset()) - start
                views.append((name, tuple(tensor.shape), tensor.stride(), offset))
            return run.pack(tensor)

        with saved_tensors_hooks(pack, run.unpack):
            mixed_BNTH = mix(*qkv)
        self.mixed.insert(0, mixed_BNTH.detach())
        self.mixed = [*self.mixed]  # the list that the hook knows must not outlive this pass
        mixed.clear()
        return mixed_BNTH


class _SecondRun:
    """Projector of the second run: results are known, only what nodes keep is wanted."""

    def __init__(
        self,
        run: BlockRun,
        known: Known,
        carries: Mapping[str, Tensor],
        saved: list[Tensor | None],
    ):
        self.block_run, self.known, self.saved = run, known, saved
        self.carries = carries

    def __call__(self, position: str, x_BTD: Tensor) -> Tensor:
        linear, known = self.block_run.block.maps[position], None
        if linear.comes_apart:
            known = self.known.bottlenecks[position], self.known.outputs[position]
        output, _ = linear.run(x_BTD, self.carries.get(position), known)
        return with_bias(linear, output)

    def attend(self, mix: Any, *qkv: Tensor) -> Tensor:
        if not self.block_run.keep_attention:
            return mix(*qkv)
        tensors = dict(zip("qkv", qkv, strict=True))
        mixed_BNTH, *others = self.known.mixed
        for view in self.block_run.views:
            if isinstance(view, int):
                self.saved.append(others[view].detach())
            else:
                name, shape, stride, offset = view
                base = tensors[name].detach()
                offset += base.storage_offset()
                self.saved.append(base.as_strided(shape, stride, offset))
        return mixed_BNTH.detach().requires_grad_(any(tensor.requires_grad for tensor in qkv))

    def wrote(self, position: str, y_BTD: Tensor) -> None:
        pass


_View = tuple[str, tuple[int, ...], tuple[int, ...], int]
"""``q``, ``k`` or ``v``; shape, stride and offset of a look at it."""


_Look = tuple[int, int, torch.Size, tuple[int, ...], int]
"""Which items of which memory, and how often they were written."""


def _look(tensor: Tensor) -> _Look:
    offset = int(tensor.storage_offset())
    return address(tensor), offset, tensor.shape, tensor.stride(), tensor._version


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Keep(torch.autograd.Function):
    """The state, unchanged; keeps tensors, and hands them over when the backward pass comes by.

    The state leaves a block through this node, and every other node of the block lies before it.
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
            raise RuntimeError(SECOND_PASS)
        ctx.used = True
        ctx.hand_over(tensors)
        return dx_BTD, None, None


def gather(block: Any) -> None:
    """Under FSDP2 a block that is not due yet is sharded; nothing happens where it is whole."""
    if hasattr(block, "unshard"):
        block.unshard()


def refuse_hooks(blocks: Sequence[Block], policy: str) -> None:
    """Raise ``RuntimeError`` where a forward hook hangs on a block, a map, or every module.

    A map is not called as a module when it is rebuilt, and what a block returns is rebuilt without
    its hooks: they would be passed over. Honoured are FSDP2's on a block, torch's counters of
    FLOPs, backward hooks anywhere, and forward hooks between a block and its maps: those are called
    in both runs.
    """
    everywhere = [*_global_forward_hooks.values(), *_global_forward_pre_hooks.values()]
    _refuse([hook for hook in everywhere if not _is_of(hook, "torch.")], policy, "every module")
    for block in blocks:
        where = f"block {block.layer_idx + 1}"
        of_block = [hook for hook in _hooks_of(block) if not _is_of(hook, "torch.distributed.")]
        _refuse(of_block, policy, where)
        for position, linear in block.maps.items():
            of_map = [hook for module in linear.modules() for hook in _hooks_of(module)]
            _refuse(of_map, policy, f"the map {position} of {where}")


def _refuse(hooks: Sequence[Any], policy: str, where: str) -> None:
    if hooks:
        raise RuntimeError(
            f"recompute {policy} cannot honour the forward hook {hooks[0]!r} on {where}; "
            "remove it, or take --train.recompute block or none"
        )


def _hooks_of(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _is_of(hook: Any, package: str) -> bool:
    hook = getattr(hook, "func", hook)
    owner = getattr(hook, "__self__", None)
    module = type(owner).__module__ if owner is not None else getattr(hook, "__module__", "")
    return f"{module}.".startswith(package)


def written(run: BlockRun, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each sublayer writes, biases added."""
    maps = run.block.maps
    return {name: with_bias(maps[name], outputs[name]) for name in run.block.writes}
