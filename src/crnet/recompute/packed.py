"""Activations that wait for the backward pass as NF4 codes (``RecomputePlan.keep_as``).

What a block's nodes would keep is noted as a number; the tensors lie packed in one node at the
block's exit (``second_run.Keep``). When the backward pass comes by there, all of the block's are
read back, and every number is answered. What would be kept once is packed once: a tensor is known
by its memory, whatever node looks at it in whatever shape, also in the block above.

Packed is what has more than one item a token: inputs of maps and norms, outputs, bottlenecks,
queries, keys and values. Exact stay weights, their casts, gains, tables of the rotary embedding,
and the norms' statistics, one item a token.

Attention is run again, from what is read back. With its own logarithms of sums kept, exp(q k - log)
of other q and k do not add up to one, and gradients of q and k are off by more than half
(docs/recomputation.md).

Refused: packing inside the operations themselves (every kernel would know of it), and reading a
tensor back when its node asks (three maps that share an input would read it three times).

Source: arXiv:2509.18993, E.2.4 and table 13, which says the format and not which tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from crnet.kernels.nf4 import NF4, quantise, read_back
from crnet.kernels.precision import casts_noted
from crnet.layers.block import Block
from crnet.layers.projector import Mix, Projector
from crnet.recompute.second_run import (
    OUT_OF_TURN,
    SECOND_PASS,
    Keep,
    address,
    autocast_of_now,
    never,
)


@dataclass(frozen=True)
class Packed:
    """The memory of a tensor, packed; or a tensor that stays as it is."""

    parts: tuple[Tensor, ...]
    num_items: int
    dtype: torch.dtype
    is_exact: bool = False

    def items(self, parts: Sequence[Tensor]) -> Tensor:
        """All items of the memory in their order, (num_items,), from ``parts`` as they were
        kept."""
        return parts[0] if self.is_exact else read_back(NF4(*parts), self.num_items, self.dtype)


@dataclass(frozen=True)
class View:
    """How a tensor looks at its memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    start: int

    def of(self, items: Tensor) -> Tensor:
        return items.as_strided(self.shape, self.stride, self.start)


def view_of(tensor: Tensor) -> View:
    return View(tensor.shape, tensor.stride(), int(tensor.storage_offset()))


class Packing:
    """What one forward pass has packed so far."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, int, Packed]] = {}

    def __call__(self, tensor: Tensor) -> Packed:
        """The packed memory of a tensor: what was packed before, if it is still the same.

        Cost: that of ``quantise`` for what is new.
        """
        storage, version = tensor.untyped_storage(), tensor._version
        known = self._known.get(address(tensor))
        # Memory that was given back may have been given to another tensor.
        if known is not None and known[1] == version and not known[0].expired():
            return known[2]
        num_items = storage.nbytes() // tensor.element_size()
        flat = tensor.detach().as_strided((num_items,), (1,), 0)
        packed = Packed(quantise(flat), num_items, tensor.dtype)
        self._known[address(tensor)] = StorageWeakRef(storage), version, packed
        return packed


class Shelf:
    """Tensors that one ``Keep`` holds, by number."""

    def __init__(self, packing: Packing):
        self.packing = packing
        self.entries: list[Packed] = []
        self._places: dict[int, int] = {}
        self.views: list[tuple[int, View]] = []

    def put(self, tensor: Tensor, *, exact: bool = False) -> int:
        """Take a tensor in; returns its number."""
        if exact:
            kept = Packed((tensor.detach(),), tensor.numel(), tensor.dtype, is_exact=True)
        else:
            kept = self.packing(tensor)
        place = self._places.setdefault(id(kept), len(self.entries))
        if place == len(self.entries):
            self.entries.append(kept)
        self.views.append((place, view_of(tensor)))
        return len(self.views) - 1

    def take_parts(self) -> list[Tensor]:
        """What a ``Keep`` is to hold. From now on the shelf holds no tensor itself."""
        parts = [part for kept in self.entries for part in kept.parts]
        self.counts = [len(kept.parts) for kept in self.entries]
        none: tuple[Tensor, ...] = ()
        self.entries = [Packed(none, it.num_items, it.dtype, it.is_exact) for it in self.entries]
        del self.packing
        return parts

    def open(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Every tensor that was put in, by number, from what ``take_parts`` returned."""
        found, rest = [], iter(parts)
        for kept, count in zip(self.entries, self.counts, strict=True):
            found.append(kept.items([next(rest) for _ in range(count)]))
        exact = [kept.is_exact for kept in self.entries]
        return [found[at] if exact[at] else view.of(found[at]) for at, view in self.views]


class _Mixing(Projector):
    """Attention is not kept: ``PackedBlock`` runs it again."""

    block_run: PackedBlock | None = None

    def attend(self, mix: Mix, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
        assert self.block_run is not None
        return self.block_run.attend(mix, q_BNTH, k_BKSH, v_BKSH)


class PackedBlock:
    """One block in one forward and backward pass whose nodes keep numbers."""

    def __init__(self, packing: Packing):
        self.shelf = Shelf(packing)
        self.opened: list[Tensor | None] | None = None
        self.mixed: list[Tensor | None] | None = None
        """What attention would have kept, run again."""
        self._is_weight: Callable[[Tensor], bool] | None = None
        self._is_exact: Callable[[Tensor], bool] | None = None

    def run(self, block: Block, context: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """As ``Block.forward``'s."""
        state, carries = block.split(tensors)
        projector = _Mixing(block.maps, carries, block.hands)
        projector.block_run = self
        batch = state[0].shape[:2]
        weights = {address(parameter) for parameter in block.parameters()}
        self.autocast = autocast_of_now(state[0].device.type)
        with casts_noted() as casts, saved_tensors_hooks(self._pack, self._unpack):
            self._is_weight = lambda tensor: address(tensor) in weights
            self._is_exact = lambda tensor: (
                address(tensor) in casts or not is_activation(tensor, batch)
            )
            *others, last = block.run(state, projector, context)
        # autograd holds on to the hooks, and they may know no tensor after the pass.
        self._is_weight = self._is_exact = None
        # Behind what was written last: every other node of the block lies before it.
        last = Keep.apply(last, self.shelf.take_parts(), self._open)
        return (*others, last, *(projector.handed[position] for position in block.hands))

    def attend(self, mix: Mix, *qkv: Tensor) -> Tensor:
        """``mix(q, k, v)``, which keeps these three alone."""
        self._mix, self._count = mix, 0
        self._wanted = [tensor.requires_grad for tensor in qkv]
        self._numbers = [self._pack(tensor) for tensor in qkv]

        def count(_: Tensor) -> int:
            self._count += 1
            return self._count - 1

        with saved_tensors_hooks(count, self._unpack_mixed):
            return mix(*qkv)

    def _pack(self, tensor: Tensor) -> Any:
        assert self._is_weight is not None
        assert self._is_exact is not None
        if self._is_weight(tensor):
            return tensor
        return self.shelf.put(tensor, exact=self._is_exact(tensor))

    def _unpack(self, kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else _taken(self.opened, kept)

    def _unpack_mixed(self, number: int) -> Tensor:
        if self.mixed is None:
            self.mixed = self._mix_again()
        return _taken(self.mixed, number)

    def _mix_again(self) -> list[Tensor | None]:
        qkv = [_taken(self.opened, number) for number in self._numbers]
        found: list[Tensor | None] = []

        def keep(tensor: Tensor) -> int:
            found.append(tensor.detach())
            return -1

        with torch.enable_grad(), self.autocast(), saved_tensors_hooks(keep, never):
            pairs = zip(qkv, self._wanted, strict=True)
            self._mix(*(tensor.detach().requires_grad_(wanted) for tensor, wanted in pairs))
        assert len(found) == self._count
        return found

    def _open(self, parts: Sequence[Tensor]) -> None:
        self.opened = list(self.shelf.open(parts))


def _taken(tensors: list[Tensor | None] | None, number: int) -> Tensor:
    """A tensor that is asked for once."""
    if tensors is None:
        raise RuntimeError(OUT_OF_TURN)
    tensor, tensors[number] = tensors[number], None
    if tensor is None:
        raise RuntimeError(SECOND_PASS)
    return tensor


def is_activation(tensor: Tensor, batch: torch.Size) -> bool:
    """Whether a tensor has more than one item for each token of (B, T): rows (M, F), (B, T, F), or
    heads before or behind the tokens."""
    *sizes, width = tensor.shape
    if not tensor.is_floating_point() or not sizes or width < 2:
        return False
    if len(sizes) == 1:
        return sizes[0] == batch.numel()
    return sizes[0] == batch[0] and batch[1] in sizes[1:]
