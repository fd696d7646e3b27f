"""What the parts of a model declare, without torch: tensors, slots, carries, work.

A method's declaration answers with these; initialisation, checkpoints, optimizers, the cost model
and export read them. Nothing is listed twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal[
    "embedding",
    "head",
    "router",
    "norm",
    "bias",
    "gain",
    "matrix",
    "factor_in",
    "factor_out",
    "values",
    "index",
    "count",
]
"""What a tensor is to the model. ``router``: a row an expert. ``matrix``: dense, (out, in).
``factor_in`` (in, rank) and ``factor_out`` (rank, out): a pair. ``gain``: scalars of a carry or a
stream. ``values`` and ``index``: of a sparse matrix, or singular values and which of them are
trained. ``count``: of steps, kept by an event."""


@dataclass(frozen=True)
class Init:
    """How a tensor is filled, from a generator of its own."""

    kind: Literal["normal", "uniform", "constant", "own"]
    value: float = 0.0
    """Standard deviation, bound, or the constant. ``own``: the method's ``initial_value``."""


def normal(std: float) -> Init:
    """Gaussian of mean 0."""
    return Init("normal", std)


def uniform(bound: float) -> Init:
    """Uniform between -bound and bound."""
    return Init("uniform", bound)


def constant(value: float) -> Init:
    """One number everywhere."""
    return Init("constant", value)


OWN = Init("own")
"""Filled by the ``initial_value`` of the method that declares the tensor."""


@dataclass(frozen=True)
class TensorSpec:
    """One parameter of the model."""

    shape: tuple[int, ...]
    role: Role
    init: Init
    trained: bool = True
    dtype: Literal["model", "float32", "int32"] = "model"
    """``model``: that of the run's weights. A gain is fp32: near 1, bf16 knows steps of 2^-8."""
    partner: str | None = None
    """Name beside it of the other factor of a pair."""
    lr_factor: float = 1.0
    """Learning rate over the base rate."""
    decays: bool = True
    is_cast: bool = True
    """Whether autocast makes a cast of it, where its role is one that products read. Not of what
    events alone read, nor of what is an input for its gradient."""

    @property
    def num_items(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def item_bytes(self, model_bytes: int) -> int:
        """Of an item, where the run's weights take ``model_bytes``."""
        return model_bytes if self.dtype == "model" else 4


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; ``config.sections.ModelConfig`` adds which methods it is made of."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rope_theta: float
    norm_eps: float
    init_std: float
    tie_embeddings: bool
    head_size: int

    @property
    def attention_size(self) -> int:
        """Width of the queries of all heads, and of what attention gives."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of the keys of all heads, and of the values."""
        return self.num_kv_heads * self.head_size


Side = Literal["columns", "rows"]
"""Of a map: the columns of its output, or the rows of its input."""


@dataclass(frozen=True)
class Split:
    """How processes that each compute a part of a map make the whole of it (``--parallel.tensor``).

    Which tensors are split follows from the sizes: those of a map with fewer columns, or rows.
    """

    at: Literal["edge", "bottleneck"]
    """What is added up. Split by columns, a gradient: of the input, once for all maps that read
    it, or of the bottleneck. Split by rows, the output or the bottleneck."""
    summed: tuple[str, ...] = ()
    """Tensors whose gradients are summands too, on processes that have them whole: where a map is
    split by columns, or added up at the edge."""


@dataclass(frozen=True)
class Expert:
    """Of a map that stands beside others of its kind, of which every token goes through some."""

    idx: int
    count: int
    """How many there are."""
    active: int
    """How many of them a token goes through."""

    def rows(self, tokens: int) -> int:
        """Rows of this one, were all as busy as each other. Whatever is in proportion to rows is
        exact in sum over the experts, however a router deals the tokens out."""
        share, rest = divmod(tokens * self.active, self.count)
        return share + (self.idx < rest)


@dataclass(frozen=True)
class Position:
    """A linear map that every block has."""

    name: str
    module: str
    """Its path in the block, for example ``self_attn.q_proj``."""
    in_size: int
    out_size: int
    input: str
    """Maps of one input share its name."""
    has_bias: bool = False
    split: Side | None = None
    """By which side processes share the map, each with some of the heads or of the feed-forward's
    columns; None: they cannot."""
    head_size: int = 0
    """Of an output that is heads side by side; 0: it is not."""
    expert: Expert | None = None
    """None: every token goes through the map."""
    is_operator: bool = False
    """Whether it is no map but the output of several, a layer of experts: what a parameterization
    with a carry adds the carry to (``Parameterization.of``)."""

    @property
    def kind(self) -> str:
        """``gate`` of ``gate.3``: ranks and counts are those of all experts."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Slot:
    """One linear map of one block."""

    position: str
    layer_idx: int
    """0-based; the paper's l is this plus 1."""
    num_layers: int
    in_size: int
    out_size: int
    rank: int
    """0 where the map is full rank."""
    init_std: float
    head_size: int = 0
    """The position's."""
    expert: Expert | None = None
    is_operator: bool = False
    """Both as of its ``Position``."""

    @property
    def kind(self) -> str:
        """As of its ``Position``."""
        return self.position.partition(".")[0]

    def rows(self, tokens: int) -> int:
        """That the map gets of so many tokens."""
        return tokens if self.expert is None else self.expert.rows(tokens)


@dataclass(frozen=True)
class Read:
    """What a map reads of the same position in an earlier block: its carry."""

    source: Literal["below", "first"]
    width: int
    of: Literal["output", "bottleneck"] = "output"
    item_bytes: int | None = None
    """Of an item of the carry as the reader keeps it; None: of the compute dtype."""
    is_kept: bool = True
    """Whether the gradient needs it (that of a gain does)."""
    inverts: bool = False
    """Whether the carry follows from output and bottleneck (``LinearMap.carry_from``)."""
    initial_gain: float = 1.0
    """What the carry is multiplied with before the first step."""


@dataclass(frozen=True)
class Product:
    """A matrix product, (rows, inner) by (inner, columns)."""

    rows: int
    inner: int
    columns: int
    accumulates: bool = False
    """Onto a result that is read first."""

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    def moved_bytes(self, item_bytes: int) -> int:
        """Operands read once, the result written."""
        results = self.rows * self.columns * (2 if self.accumulates else 1)
        return item_bytes * (self.rows * self.inner + self.inner * self.columns + results)


@dataclass(frozen=True)
class Traffic:
    """Bytes that kernels other than products read and write, and how many kernels they are."""

    moved_bytes: int = 0
    kernels: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.moved_bytes + other.moved_bytes, self.kernels + other.kernels)

    def __mul__(self, count: int) -> Traffic:
        return Traffic(count * self.moved_bytes, count * self.kernels)


@dataclass(frozen=True)
class Passes:
    """The same elementwise work in three ways: ``eager``, a kernel for each operation of torch;
    ``compiled``, neighbours fused by Inductor; ``fused``, inside the products beside it."""

    eager: Traffic = Traffic()
    compiled: Traffic = Traffic()
    fused: Traffic = Traffic()

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.eager + other.eager, self.compiled + other.compiled, self.fused + other.fused
        )

    def __mul__(self, count: int) -> Passes:
        return Passes(self.eager * count, self.compiled * count, self.fused * count)


def in_each_way(moved_bytes: int, kernels: int) -> Passes:
    """Of what nothing fuses."""
    return Passes(*[Traffic(moved_bytes, kernels)] * 3)


@dataclass(frozen=True)
class Work:
    """What one map does on one micro-batch. FLOPs: products only, 2 a multiply-add."""

    forward_flops: int
    backward_flops: int
    weight_items: int
    """Items of its own weights that products read; autocast keeps a cast of each."""
    shared_items: int = 0
    """Of those that the map shares with other blocks (``Parameterization.shared``)."""
    keeps_input: bool = True
    kept_bytes: int = 0
    """What autograd keeps beside the input and the carry."""
    kept_items: tuple[int, ...] | None = None
    """Items of each tensor among them that has some for every token, in the compute dtype; the
    rest are gains and statistics. None: all of them are one such tensor."""
    bottleneck_bytes: int = 0
    """What the output follows from without the input; 0: the output itself."""
    rebuild_flops: int = 0
    """The output from its bottleneck and carry."""
    rerun_flops: int = 0
    """The graph made again, output and bottleneck known."""
    unrepeated_flops: int = 0
    """Of the forward: what comes after the last tensor that autograd keeps."""
    transient_bytes: int = 0
    """Alive in the backward pass for a moment, beyond its gradients."""
    products: tuple[Product, ...] = ()
    """Of the forward pass, one by one, for the time; none: FLOPs at the device's rate."""
    backward_products: tuple[Product, ...] = ()
    passes: Passes = Passes()
    """Elementwise work of the forward pass, casts of weights left out."""
    backward_passes: Passes = Passes()
    """Of the backward pass; sums of gradients left out."""


@dataclass(frozen=True)
class BlockWork:
    """What one block does between its maps, on one micro-batch."""

    forward_flops: int
    backward_flops: int
    input_bytes: Mapping[str, int]
    """Of each input that maps read, by its name."""
    kept_inputs: frozenset[str]
    """Inputs that attention keeps even where no map does."""
    kept_outputs: tuple[str, ...]
    """Positions whose outputs the block keeps, in the compute dtype."""
    kept_bytes: int
    """What else it keeps: statistics, rotated queries and keys; a sum with a bias is another
    tensor than the output. Not the inputs of its sublayers."""
    kept_items: tuple[int, ...]
    """Items of each tensor among them in the compute dtype; the rest are statistics."""
    attention_bytes: int
    """Output and log-sum-exp of attention: kept once more where attention is not run again."""
    attention_items: int
    """Of the output among them, where it is the input ``mixed`` too; the rest ``kept_bytes`` holds
    too."""
    activation_bytes: int
    """Alive in the backward pass of the feed-forward's activation beyond what is kept."""
    passes: Passes = Passes()
    """Elementwise work of the forward pass: norms, rotation, activation."""
    backward_passes: Passes = Passes()
    attention_moved_bytes: int = 0
    """What attention reads and writes, forward; backward twice that."""
    routing_flops: int = 0
    """Of the forward: products beside attention, which no policy keeps."""
    mask_bytes: int = 0
    """Of a mask that attention of every block keeps, one for all of them."""


@dataclass(frozen=True)
class StreamWork:
    """What the stream around one sublayer does on one micro-batch: its read and its write."""

    kept_bytes: int = 0
    """What autograd keeps beside what a sublayer gets and the written outputs."""
    keeps_writes: bool = False
    """Whether later reads keep what a sublayer wrote (and the embedding)."""
    kept_state_bytes: int = 0
    """Of the state behind it, what the next blocks have among their inputs for the first time and
    is no output: kept where blocks are run again."""
    reads_apart: bool = False
    """Whether what the sublayer gets is another tensor than those of the state."""
    repeats_output: bool = False
    """Whether the write itself keeps what it made of the output: a block that is run again makes
    that once more."""
    forward_flops: int = 0
    backward_flops: int = 0
    gradient_bytes: int = 0
    """Gradients of the state that wait while this sublayer goes backward."""
    passes: Passes = Passes()
    """Elementwise work of the forward pass."""
    backward_passes: Passes = Passes()
    """Of the backward pass, sums of the state's gradients among it."""


@dataclass(frozen=True)
class Forget:
    """What an optimizer is to forget of one tensor after an event."""

    tensor: str
    """Name of the parameter in its module."""
    indices: tuple[int, ...] | None = None
    """Of its rows, or columns (``dim`` 1); None: all of it."""
    dim: int = 0
    kept_frac: float = 0.0
    """Share of the items of its state that stay."""
    kept: Literal["random", "largest"] = "random"
    """Which: drawn at random, or those of the largest first moment."""
    restarts: bool = False
    """Whether the count of its steps begins anew too: the next step is a first one."""
