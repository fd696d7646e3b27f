"""What a run is: frozen dataclasses.

A field's docstring is its ``--help`` line; a field's default is what a user gets who says nothing;
``Fixed`` or ``Free`` says whether a resumed run may have another value (``config.resuming``).
Nothing here imports torch, so that ``crnet --help`` and ``crnet list`` answer at once. A method
that has options is found behind its seam and has a field here under its name.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from crnet import architectures, linears, optimizers, schedules, streams, trackers
from crnet.config import defaults
from crnet.config.adapter import Adapter
from crnet.config.resuming import Fixed, Free
from crnet.optimizers._low_precision import Bf16Update
from crnet.recompute.plan import KeepAs


def _method(name: str, text: str, seam: ModuleType) -> Any:
    """A field that names a method of a seam; its help line lists them all."""
    known = "; ".join(f"{each}: {seam.get(each).summary}" for each in seam.names())
    return field(default=name, metadata={"help": f"{text} {known}."})


@dataclass(frozen=True, kw_only=True)
class BaseModelConfig:
    """The shape of the model and what it is made of."""

    architecture: Fixed[str] = _method(
        defaults.ARCHITECTURE, "What a block is made of.", architectures
    )
    linear: Fixed[str] = _method(
        defaults.LINEAR, "Parameterization of the linear maps of every block.", linears
    )
    stream: Fixed[str] = _method(
        defaults.STREAM, "What travels from sublayer to sublayer.", streams
    )
    rank: Fixed[str] = "0.25h"
    """Ranks, bottom block first: 96 | 96x3,112x4 | 0.25h | aligned-parameters | aligned-memory | a
    profile of the paper's ablation, s1 | s2 | s3.
    One position apart from the rest: 96x7/v=128x7/down=128x7. They are those of the blocks that the
    parameterization leaves open (blocks 2..L where the first is full rank)."""
    hidden_size: Fixed[int] = 192
    """Model width h."""
    intermediate_size: Fixed[int] = 512
    """Feed-forward width f."""
    num_layers: Fixed[int] = 8
    """Blocks L."""
    num_heads: Fixed[int] = 6
    """Query heads."""
    num_kv_heads: Fixed[int | None] = None
    """Key/value heads (grouped-query attention); none: as many as query heads."""
    head_size: Fixed[int | None] = None
    """Width of a head; none: hidden size over heads."""
    vocab_size: Fixed[int | None] = None
    """Rows of the embedding; none: the tokenizer's."""
    rope_theta: Fixed[float] = 10_000.0
    """Base of the rotary embedding."""
    norm_eps: Fixed[float] = 1e-6
    """Epsilon of the norms."""
    tie_embeddings: Fixed[bool | None] = None
    """Use the embedding as the head; none: as the architecture has it."""
    init_std: Fixed[float] = 0.02
    """Standard deviation of every dense weight, and of the product of every pair of factors."""
    embedding_lr_factor: Fixed[float] = 1.0
    """Learning rate of the embedding and the head over the base rate."""


ChatLayout = Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus, the tokenizer, and how tokens become rows."""

    source: Fixed[tuple[str, ...]] = ("python",)
    """Corpus: files, folders or globs (text, .jsonl, .parquet, also .gz .xz .zst), a Hugging Face
    data set (allenai/c4, or a folder in its layout), or python: the standard library's own text."""
    validation_source: Fixed[tuple[str, ...]] = ()
    """Validation corpus, as source; none: the source's own validation split, else a share of it."""
    validation_frac: Fixed[float] = 0.05
    """Share of the documents, chosen by their hash, that is held out where no split exists."""
    validation_tokens: Free[int] = 10_000_000
    """Most tokens an evaluation reads; of a larger set always the same rows, spread over it all."""
    subset: Fixed[str | None] = None
    """Configuration of a Hugging Face data set (for example en)."""
    text_key: Fixed[str | None] = None
    """Field of a JSON or parquet record that holds the text; several as title,abstract.
    None: text, content, ... whichever is there."""
    chat: Fixed[ChatLayout | None] = None
    """Records are conversations, in the layout that their keys show (auto) or that is named; their
    answers alone are trained on (docs/finetuning.md). None: records are texts."""
    chat_template: Fixed[str | None] = None
    """chat: how a conversation becomes one text. chatml; plain: User: and Assistant:; a .jinja
    file; another of the tokenizer's by its name; none: the tokenizer's own."""
    chat_loss: Fixed[Literal["answers", "all"]] = "answers"
    """chat: the tokens that count, in training and in evaluation."""
    documents: Fixed[Literal["auto", "file", "paragraph", "line"]] = "auto"
    """What one document of a text file is; auto: the file, long files cut at blank lines."""
    max_documents: Fixed[int | None] = None
    """Read at most so many documents of the source (none: all; sources without an end need one)."""
    tokenizer: Fixed[str] = "train"
    """A tokenizer.json, a SentencePiece .model, a Hugging Face name or folder, or train: byte-level
    BPE trained on the corpus."""
    vocab_size: Fixed[int] = 4096
    """Entries of a trained tokenizer."""
    sequence_length: Fixed[int] = 256
    """Tokens in a row."""
    rows: Fixed[Literal["packed", "document"]] = "packed"
    """packed: rows cut from the stream of documents; document: one a row, cut or padded."""
    cache_dir: Free[Path | None] = None
    """Where prepared tokens are kept; none: $XDG_CACHE_HOME/crnet, else ~/.cache/crnet."""


@dataclass(frozen=True, kw_only=True)
class BaseOptimizerConfig:
    """The optimizer and its schedule."""

    name: Fixed[str] = _method(defaults.OPTIMIZER, "Optimizer.", optimizers)
    lr: Free[float] = 1.5e-3
    """Peak learning rate; low-rank factors take a share of it (model.LINEAR.lr-factor)."""
    beta1: Fixed[float] = 0.9
    """Decay of the first moment."""
    beta2: Fixed[float] = 0.999
    """Decay of the second moment."""
    eps: Fixed[float] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Fixed[float] = 0.0
    """Decoupled weight decay of matrices."""
    decay: Fixed[Literal["own", "composed"]] = "own"
    """What low-rank factors decay by. own: each as other matrices; composed: their product does,
    by the gradient of its squared norm."""
    schedule: Fixed[str] = _method(defaults.SCHEDULE, "Learning rate over the steps.", schedules)
    warmup_frac: Free[float] = 0.1
    """Share of the steps over which the rate rises linearly, to the nearest whole step."""
    min_lr_frac: Free[float] = 0.1
    """Share of the peak rate at which the schedule ends."""
    clip_norm: Free[float] = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    fused_backward: Free[bool] = False
    """Update each parameter inside the backward pass, once its gradient is there, and free the
    gradient: less memory, the same numbers (docs/performance.md). One process, clip_norm 0; where
    micro-batches add up it saves nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: Free[int] = 300
    """Optimizer steps."""
    epochs: Free[int | None] = None
    """Passes over the training rows, in the place of steps; none: steps says it."""
    stop_after_steps: Free[int | None] = None
    """Save and end at this step of the schedule; a resumed run goes on from there, to a later one
    (``steps``: to the end). None: at the last step."""
    init_from: Fixed[Path | None] = None
    """Begin with the weights of a checkpoint or a run (its newest), of the same model and
    tokenizer; full-rank ones also begin a run of what can be any matrix (docs/finetuning.md). The
    optimizer, the schedule and the data are this run's. None: initial values."""
    adapter: Fixed[defaults.AdapterName | None] = None
    """Train this adapter of PEFT on the maps of every block, and nothing else, beside the weights
    of init_from (docs/finetuning.md). None: every weight trains."""
    adapter_rank: Fixed[int] = 8
    """Rank of the adapter's updates."""
    adapter_alpha: Fixed[float | None] = None
    """An update is multiplied by adapter_alpha / adapter_rank; none: by 2."""
    batch_size: Fixed[int] = 8
    """Sequences per step."""
    micro_batch_size: Free[int | None] = None
    """Most sequences per forward pass; none: the whole batch at once."""
    seed: Fixed[int] = 0
    """Seed of the initial weights and of the order of the data."""
    precision: Fixed[Literal["auto", "fp32", "bf16-mixed", "bf16"]] = "auto"
    """fp32; bf16-mixed: fp32 weights, bf16 products (autocast); bf16: weights too, only gains fp32;
    auto: bf16-mixed on a GPU, fp32 on a CPU."""
    bf16_update: Fixed[Bf16Update] = "stochastic"
    """How bf16 weights take their updates. masters: fp32 copies and states of all (8 bytes more a
    parameter under adamw); vectors: of norms, biases and gains alone; stochastic: as vectors, and
    matrices rounded at random (no bytes more); plain: all to nearest, what starts at 1 stays."""
    tf32: Free[bool] = True
    """Allow TF32 in fp32 products on a GPU."""
    recompute: Free[Literal["none", "block", "invert", "replay", "auto"]] = "none"
    """What the backward pass computes again instead of keeping it. none; block: whole blocks;
    replay: maps' outputs, upwards from kept ones, exact to the bit; invert: the same downwards (the
    paper's algorithm 1), not exact; auto: the fastest that fits the budget."""
    recompute_layers: Free[str | None] = None
    """Blocks, from 1, whose outputs replay and invert keep: 4,8,12 or every-8; none: those of the
    least peak (replay), every 8th (invert)."""
    recompute_attention: Free[Literal["rerun", "keep"]] = "rerun"
    """replay and invert: run attention again, or keep its output."""
    keep_as: Free[KeepAs] = "computed"
    """none and replay: how blocks keep activations. computed: as they are; nf4: in four and a half
    bits an item (table 13); a step's loss stays, its gradients are some 5% off."""
    invert_tolerance: Free[float] = 0.05
    """invert keeps more blocks' outputs where the bound of the relative error would pass this."""
    activation_budget_gib: Free[float | None] = None
    """auto: most memory for activations and their gradients, in GiB."""
    compile: Free[bool] = False
    """Compile the blocks with torch.compile."""
    deterministic: Free[bool] = False
    """The same bits from the same run on the same GPU, slower; on a CPU that is always so."""
    kernels: Free[Literal["auto", "eager"]] = "auto"
    """auto: on a CUDA device with Triton, fused kernels (docs/kernels.md); eager: torch's own."""
    device: Free[str] = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU where there is one."""
    threads: Free[int | None] = None
    """CPU threads of torch; none: torch's choice."""
    log_every_steps: Free[int] = 10
    """Steps between two training rows of metrics.jsonl."""
    eval_every_steps: Free[int] = 100
    """Steps between two evaluations; 0: only before the first and after the last step."""
    save_every_steps: Free[int] = 100
    """Steps between two checkpoints; 0: only after the last step."""
    keep_checkpoints: Free[int] = 2
    """Newest checkpoints kept; 0: all."""
    trackers: Free[str | None] = None
    """Where figures also go, with commas: tensorboard, wandb, trackio (docs/looking.md); none:
    nowhere."""
    tensorboard: Free[bool] = False
    """The same as --train.trackers tensorboard."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Processes that share a run, a device each (docs/scale.md); the sizes multiply."""

    pipeline: Free[int] = 1
    """Processes that each have some of the blocks of a copy, and hand their outputs on."""
    data: Free[int] = 1
    """Copies of the model, each with its share of every batch."""
    shard: Free[int] = 1
    """Processes that split the weights, gradients and optimizer state of a copy, and its share."""
    tensor: Free[int] = 1
    """Processes that compute every block of a copy together, each with a part of its heads and of
    the feed-forward's columns."""
    checkpoint: Free[Literal["whole", "parts"]] = "whole"
    """whole: the first process gathers a checkpoint and writes it; parts: every process writes what
    it has, while training goes on. Either is read by any number of processes."""
    schedule: Free[Literal["1f1b", "interleaved"]] = "1f1b"
    """Of a pipeline. 1f1b: one stage a process; interleaved: two, less waiting and more sending."""


SIZES = ("pipeline", "data", "shard", "tensor")
"""The keys of ``parallel`` that count processes, outermost first: ranks that differ in the last one
are neighbours."""
STAGES_A_PROCESS = {"1f1b": 1, "interleaved": 2}


def num_processes(parallel: ParallelConfig) -> int:
    """How many processes the sizes ask for."""
    return math.prod(getattr(parallel, size) for size in SIZES)


def num_stages(parallel: ParallelConfig) -> int:
    """Into how many runs of blocks the model is cut; 1: no pipeline."""
    if parallel.pipeline == 1:
        return 1
    return parallel.pipeline * STAGES_A_PROCESS[parallel.schedule]


def num_shares(parallel: ParallelConfig) -> int:
    """Into how many equal shares every batch is cut; the stages of a pipeline read the same."""
    return parallel.data * parallel.shard


def field_name(method: str) -> str:
    """The field of a section that holds a method's options."""
    return method.replace("-", "_")


def options_of(section: Any, method: str) -> Any:
    """A method's options in a section; None where it has none."""
    return getattr(section, field_name(method), None)


def choose(section: Any, key: str, name: str) -> Any:
    """A section with another method under ``key``; options of the former are at their defaults."""
    former = getattr(section, key)
    changes: dict[str, Any] = {key: name}
    if name != former and (options := options_of(section, former)) is not None:
        changes[field_name(former)] = type(options)()
    return dataclasses.replace(section, **changes)


Precision = Literal["fp32", "bf16-mixed", "bf16"]


def precision_of(train: TrainConfig, kind: str | None = None) -> Precision:
    """The precision that ``auto`` stands for.

    ``kind``: of the device (torch's word: cpu, cuda); None: as ``train.device`` says, a CPU where
    that says ``auto`` too.
    """
    if train.precision != "auto":
        return train.precision
    kind = kind or train.device.partition(":")[0]
    return "fp32" if kind in ("auto", "cpu") else "bf16-mixed"


def update_of(train: TrainConfig) -> Bf16Update | None:
    """How the weights of a bf16 run take their updates; None in another precision."""
    return train.bf16_update if train.precision == "bf16" else None


def adapter_of(train: TrainConfig) -> Adapter | None:
    """The adapter of a run; None: it trains every weight."""
    if train.adapter is None:
        return None
    alpha = train.adapter_alpha
    return Adapter(train.adapter_rank, 2.0 * train.adapter_rank if alpha is None else alpha)


def trackers_of(train: TrainConfig) -> list[str]:
    """Names of a run's trackers. Raises ``ValueError`` where one is not known."""
    names = trackers.parse(train.trackers)
    return names if not train.tensorboard or "tensorboard" in names else [*names, "tensorboard"]


def settings_of(
    section: BaseOptimizerConfig, seed: int, num_steps: int | None = None
) -> optimizers.Settings:
    """What an optimizer is told of its section, the run's seed and its steps."""
    return optimizers.Settings(
        lr=section.lr,
        beta1=section.beta1,
        beta2=section.beta2,
        eps=section.eps,
        weight_decay=section.weight_decay,
        seed=seed,
        num_steps=num_steps,
    )


def _with_options(base: type, name: str, seams: Sequence[ModuleType]) -> Any:
    """``base`` with one field for each method that has options."""
    fields = [
        (field_name(method), seam.get(method).Options, seam.get(method).Options())
        for seam in seams
        for method in seam.names()
        if seam.get(method).Options is not None
    ]
    made = dataclasses.make_dataclass(name, fields, bases=(base,), frozen=True, kw_only=True)
    made.__module__, made.__doc__ = __name__, base.__doc__
    # The base's annotations are words of this file; a made class's functions live elsewhere.
    made.__init__.__annotations__ |= typing.get_type_hints(made, include_extras=True)
    return made


if TYPE_CHECKING:
    ModelConfig = BaseModelConfig
    OptimizerConfig = BaseOptimizerConfig
else:
    ModelConfig = _with_options(BaseModelConfig, "ModelConfig", (architectures, linears, streams))
    OptimizerConfig = _with_options(BaseOptimizerConfig, "OptimizerConfig", (optimizers, schedules))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's numbers."""

    preset: Fixed[str] = "tiny"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()


def model_of(config: RunConfig) -> ModelConfig:
    """The model with a vocabulary size: its own, or the one that its tokenizer will have."""
    size = config.model.vocab_size or config.data.vocab_size
    return dataclasses.replace(config.model, vocab_size=size)


def share_of(config: RunConfig) -> int:
    """Sequences of a batch that one share of it has (``num_shares``)."""
    return config.train.batch_size // num_shares(config.parallel)


SECTIONS = ("model", "data", "optimizer", "train", "parallel")
