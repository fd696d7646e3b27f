"""Blocks compiled by torch, each kind of them once, in passes that are differentiated.

All blocks share the code of one ``forward``, and torch stops compiling a code object after eight
graphs: three kinds of block, met by training and by two batch sizes of an evaluation, are nine.
Here every kind has a copy of its own, and evaluation and generation run as written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from crnet.kernels.compiled import compiled, shapes
from crnet.layers.block import Block


def forward(block: Block, context: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The block as it is written."""
    return block.forward(context, *tensors)


class CompiledForward:
    """``forward``, compiled for each kind of block and each shape it meets.

    Equal blocks share a graph: the same maps with tensors of the same shapes, the same carries.
    Cost: compiling takes seconds to a minute a kind, at its first call.
    """

    def __init__(self, backend: Any = "inductor"):
        """``backend``: of ``torch.compile``."""
        self.backend = backend
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._kinds: dict[int, tuple[Any, ...]] = {}

    def __call__(self, block: Block, context: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        kind = self._kinds.get(block.layer_idx)
        if kind is None:
            kind = self._kinds[block.layer_idx] = kind_of(block)
        key = (kind, shapes(tensors))
        if key not in self.compiled:
            self.compiled[key] = compiled(forward, fullgraph=False, backend=self.backend)
        return self.compiled[key](block, context, tensors)


def kind_of(block: Block) -> tuple[Any, ...]:
    """What blocks of one graph have in common. Hashable."""
    parameters = tuple(
        (name, parameter.shape, parameter.dtype, parameter.requires_grad)
        for name, parameter in block.named_parameters()
    )
    maps = tuple((position, type(linear)) for position, linear in block.maps.items())
    return type(block), maps, tuple(block.reads.items()), block.hands, parameters
