"""The seam of the architecture: what a block is made of, between its linear maps.

One folder or file is one family. It says which positions a block has, which tensors stand beside
the maps, what its operations keep and compute, and makes the modules. Declarations import no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crnet.registry import discover, find
from crnet.specs import BlockWork, Passes, Position, Shape, Side, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from crnet.layers.block import Block
    from crnet.layers.cache import LayerCache


class Batch:
    """Sizes of one micro-batch."""

    def __init__(self, sequences: int, length: int, compute_bytes: int, stream_bytes: int):
        self.sequences = sequences
        self.length = length
        self.rows = sequences * length
        self.compute_bytes = compute_bytes
        """Of an item that products read."""
        self.stream_bytes = stream_bytes
        """Of an item of the stream: that of the embedding."""


class Architecture:
    """What an architecture answers; a family states only what differs."""

    name: str
    summary: str
    Options: type | None = None
    """A frozen dataclass; its fields become ``--model.NAME.OPTION``."""
    examples: tuple[Any, ...] = ()
    """More ``Options`` that the contract is checked with (``measure.contract``)."""
    writes: tuple[str, ...] = ("o", "down")
    """The position whose output each sublayer writes."""
    ties_embeddings: bool = False
    """Whether the embedding is the head where the configuration does not say."""
    input_modules: Mapping[str, str] = {}
    """By the name of an input (``Position.input``): the module of the block whose output it is."""
    compiles: bool = True
    """Whether ``--train.compile`` can take its blocks: no shape in them hangs on values."""
    pads: bool = False
    """Whether a feed-forward whose maps give 0 in some columns has 0 there, and hands back a
    gradient of 0."""

    def problems(self, shape: Shape, options: Any) -> list[str]:
        """What is wrong with sizes and options, one sentence each, with the mend."""
        return []

    def max_length(self, options: Any) -> int | None:
        """Most tokens of a row; None: any number."""
        return None

    def window(self, options: Any) -> int | None:
        """Tokens that one attends to, itself among them; None: all before it."""
        return None

    def balance_factor(self, options: Any) -> float:
        """Share in the gradient of how uneven its experts are (``Context.uneven``); 0: none."""
        return 0.0

    def key_size(self, shape: Shape, options: Any) -> int:
        """Width of a head's query and key, and of a value as attention gets it."""
        return shape.head_size

    def cache_items(self, shape: Shape, options: Any) -> int:
        """What a block keeps of a token for those that come after it (``layers.cache``): keys and
        values of all heads."""
        return 2 * shape.kv_size

    def packs(self, options: Any) -> bool:
        """Whether what its blocks keep may be kept as codes (``--train.keep-as``): what has more
        than one item a token is activations, nothing that has to stay exact."""
        return True

    def plain_form(self, shape: Shape, options: Any) -> Mapping[str, Any] | None:
        """Of transformers' own model that has these tensors by these names, every map a matrix:
        what its ``config.json`` says beyond the sizes, or in their place. None: there is none."""
        return None

    def positions(self, shape: Shape, options: Any) -> tuple[Position, ...]:
        """The linear maps of a block, in the order of the published tables."""
        raise NotImplementedError

    def tensors(self, shape: Shape, options: Any) -> dict[str, TensorSpec]:
        """Every parameter that is no linear map's and no head, by its full name, in the order of
        the model."""
        raise NotImplementedError

    def summed(self, shape: Shape, options: Any) -> tuple[str, ...]:
        """Full names of tensors whose gradients are summands where processes share the heads: each
        has them whole, and finds the gradient of its own heads (``--parallel.tensor``)."""
        return ()

    def work(self, shape: Shape, options: Any, batch: Batch, keeps_activation: bool) -> BlockWork:
        """What a block does between its maps."""
        raise NotImplementedError

    def table_bytes(self, shape: Shape, options: Any, batch: Batch) -> int:
        """What all blocks together keep of tables (rotary) where autograd keeps everything."""
        return 0

    def last_norm_bytes(self, batch: Batch) -> int:
        """What the last norm keeps beside its input."""
        return 4 * batch.rows

    def last_norm_passes(self, shape: Shape, batch: Batch) -> tuple[Passes, Passes]:
        """Elementwise work of the last norm, forward and backward."""
        return Passes(), Passes()

    def make_block(
        self, shape: Shape, options: Any, layer_idx: int, keeps_activation: bool
    ) -> Block:
        """A block without its maps (``Block.prepare`` brings them)."""
        raise NotImplementedError

    def make_outside(self, shape: Shape, options: Any) -> Mapping[str, nn.Module]:
        """What stands around the blocks, by its name under ``model``: ``embed_tokens``, ``norm``,
        and what else the family has."""
        raise NotImplementedError

    def embed(self, outside: Any, tokens_BT: Tensor, start: int | Tensor) -> Tensor:
        """The stream's first tensor, (B, T, D), of tokens at positions ``start`` and on; or at
        those that ``start`` gives for each, (B, T) or (1, T)."""
        return self.place(outside, outside.embed_tokens(tokens_BT), start)

    def place(self, outside: Any, x_BTD: Tensor, start: int | Tensor) -> Tensor:
        """Embedded tokens with what tells their positions, where that is added to them."""
        return x_BTD

    def context(
        self,
        shape: Shape,
        options: Any,
        start: int | Tensor,
        length: int,
        device: torch.device,
        caches: Sequence[LayerCache] | None,
    ) -> Any:
        """What every block needs of these tokens besides their state. ``start``: as ``embed``'s."""
        raise NotImplementedError


def split_side(source: str) -> Side:
    """By which side a map is split, from the name of its input: what heads and the feed-forward
    give is split already; what a norm gives is whole."""
    return "rows" if source in ("mixed", "activated") else "columns"


def names() -> list[str]:
    """Every architecture, sorted."""
    return sorted(discover(__name__, Architecture))


def get(name: str) -> Architecture:
    """The architecture of that name. Raises ``ValueError`` if there is none."""
    return find(__name__, name, Architecture)
