"""The seam of the stream: what travels from sublayer to sublayer. One file is one family.

The state is a tuple of tensors, ``hidden_size`` wide. Around every sublayer stands one module of
the stream: ``read(state)`` is what the sublayer gets, ``write(state, y)`` the state after it; a
last read ends the model. Declarations import no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from crnet.registry import discover, find
from crnet.specs import Shape, StreamWork, TensorSpec

if TYPE_CHECKING:
    from torch.nn import Module


class Stream:
    """What a stream answers; a method states only what differs."""

    name: str
    summary: str
    Options: type | None = None
    """A frozen dataclass; its fields become ``--model.NAME.OPTION``."""
    examples: tuple[Any, ...] = ()
    """More ``Options`` that the contract is checked with (``measure.contract``)."""
    adds: bool = False
    """Whether it is the sum of what sublayers write, and nothing besides."""
    policies: tuple[str, ...] = ("none", "block")
    """Recomputation that it allows. ``replay`` and ``invert`` build a block's state anew from what
    entered it and what its sublayers wrote: ``write`` must not need ``read``."""

    def problems(self, shape: Shape, options: Any) -> list[str]:
        """What is wrong with the options, one sentence each, with the mend."""
        return []

    def tensors(
        self, sublayer_idx: int, num_sublayers: int, shape: Shape, options: Any
    ) -> dict[str, TensorSpec]:
        """The parameters of the module around one sublayer (``num_sublayers``: of the last read),
        by their name there."""
        return {}

    def work(
        self,
        sublayer_idx: int,
        num_sublayers: int,
        shape: Shape,
        options: Any,
        rows: int,
        item_bytes: int,
        written_bytes: int,
    ) -> StreamWork:
        """Of the read before a sublayer (``num_sublayers``: of the last read) and its write.

        Args:
            item_bytes: of an item of what sublayers get.
            written_bytes: of an item of what they write.
        """
        return StreamWork()

    def crossing(
        self,
        sublayer_idx: int,
        num_sublayers: int,
        shape: Shape,
        options: Any,
        item_bytes: int,
        written: Sequence[int],
    ) -> tuple[int, ...]:
        """Bytes of an item of each tensor of the state before a sublayer: what crosses to a stage
        of a pipeline that begins there.

        Args:
            item_bytes: of an item of what sublayers get.
            written: of an item of what each sublayer before it wrote.
        """
        return (item_bytes,)

    def make(self, sublayer_idx: int, num_sublayers: int, shape: Shape, options: Any) -> Module:
        """The module around one sublayer (``num_sublayers``: of the last read)."""
        raise NotImplementedError


def names() -> list[str]:
    """Every stream, sorted."""
    return sorted(discover(__name__, Stream))


def get(name: str) -> Stream:
    """The stream of that name. Raises ``ValueError`` if there is none."""
    return find(__name__, name, Stream)
