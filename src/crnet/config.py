"""What a run is: frozen dataclasses, their validation, and their way to and from plain dicts.

A field's docstring is its ``--help`` line; a field's default is what a user gets who says nothing.
Nothing here imports torch, so that ``crnet --help`` and ``crnet list`` answer at once.

``ConfigError`` carries every problem found, not the first: each says what came, what was wanted
and how to mend it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from crnet import linears, optimizers
from crnet.linears.crnet import CRNetOptions
from crnet.linears.lowrank import LowRankOptions


class ConfigError(ValueError):
    """The configuration, or an input it names, cannot be used. ``problems`` lists every reason."""

    def __init__(self, problems: Iterable[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class TrainingError(RuntimeError):
    """Training cannot go on: a loss or a gradient is no longer a finite number."""


def _whole(_: Any, tokens: Any) -> int:
    # cyclopts would round 2.5 steps to 2 without a word.
    word, source = tokens[0].value, tokens[0].source
    if not re.fullmatch(r"[+-]?\d+", word.strip()):
        at = "" if source == "cli" else f" from {source}"
        raise ValueError(f"{word!r}{at} is not a whole number (int)")
    return int(word)


Int = Annotated[int, Parameter(converter=_whole)]
"""A whole number, from the command line or a file; a fraction is an error."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the model and the parameterization of its linear maps."""

    linear: str = "crnet"
    """Parameterization of the seven linear maps of every block: crnet, full or lowrank."""
    rank: str = "0.25h"
    """Ranks, bottom block first: 96 | 96x3,112x4 | 0.25h | aligned-parameters | aligned-memory.
    One position apart from the rest: 96x7/v=128x7/down=128x7. For crnet they are those of blocks
    2..L, for lowrank of blocks 1..L."""
    hidden_size: Int = 192
    """Model width h."""
    intermediate_size: Int = 512
    """Feed-forward width f."""
    num_layers: Int = 8
    """Blocks L."""
    num_heads: Int = 6
    """Query heads."""
    num_kv_heads: Int | None = None
    """Key/value heads (grouped-query attention); none: as many as query heads."""
    vocab_size: Int | None = None
    """Rows of the embedding; none: the tokenizer's."""
    rope_theta: float = 10_000.0
    """Base of the rotary embedding."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding as the head."""
    init_std: float = 0.02
    """Standard deviation of every dense weight, and of the product of every pair of factors."""
    crnet: CRNetOptions = CRNetOptions()
    lowrank: LowRankOptions = LowRankOptions()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus, the tokenizer, and how tokens become rows."""

    source: tuple[str, ...] = ("python",)
    """Corpus: files, folders or globs (text, .jsonl, .parquet, also .gz .xz .zst), a Hugging Face
    data set (allenai/c4, or a folder in its layout), or python: the standard library's own text."""
    validation_source: tuple[str, ...] = ()
    """Validation corpus, as source; none: the source's own validation split, else a share of it."""
    validation_frac: float = 0.05
    """Share of the documents, chosen by their hash, that is held out where no split exists."""
    validation_tokens: Int = 10_000_000
    """Most tokens an evaluation reads."""
    subset: str | None = None
    """Configuration of a Hugging Face data set (for example en)."""
    text_key: str | None = None
    """Field of a JSON or parquet record that holds the text; several as title,abstract.
    None: text, content, ... whichever is there."""
    documents: Literal["auto", "file", "paragraph", "line"] = "auto"
    """What one document of a text file is; auto: the file, long files cut at blank lines."""
    max_documents: Int | None = None
    """Read at most so many documents of the source (none: all; sources without an end need one)."""
    tokenizer: str = "train"
    """A tokenizer.json, a SentencePiece .model, a Hugging Face name or folder, or train: byte-level
    BPE trained on the corpus."""
    vocab_size: Int = 4096
    """Entries of a trained tokenizer."""
    sequence_length: Int = 256
    """Tokens in a row."""
    rows: Literal["packed", "document"] = "packed"
    """packed: rows cut from the stream of documents; document: one a row, cut or padded."""
    cache_dir: Path | None = None
    """Where prepared tokens are kept; none: $XDG_CACHE_HOME/crnet, else ~/.cache/crnet."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    name: str = "adamw"
    """Optimizer."""
    lr: float = 1.5e-3
    """Peak learning rate; low-rank factors take a share of it (model.LINEAR.lr-factor)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    warmup_frac: float = 0.1
    """Share of the steps over which the rate rises linearly."""
    min_lr_frac: float = 0.1
    """Share of the peak rate at which the cosine ends."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: Int = 300
    """Optimizer steps."""
    batch_size: Int = 8
    """Sequences per step."""
    micro_batch_size: Int | None = None
    """Sequences per forward pass; none: the whole batch at once."""
    seed: Int = 0
    """Seed of the initial weights and of the order of the data."""
    precision: Literal["fp32", "bf16-mixed", "bf16"] = "fp32"
    """fp32; bf16-mixed: fp32 weights, bf16 products (autocast); bf16: everything bf16."""
    recompute: Literal["none", "block", "invert", "replay", "auto"] = "none"
    """What the backward pass computes again instead of keeping it. none; block: whole blocks;
    replay: maps' outputs, upwards from kept ones, exact to the bit; invert: the same downwards (the
    paper's algorithm 1), not exact; auto: the fastest that fits the budget."""
    recompute_layers: str | None = None
    """Blocks, from 1, whose outputs replay and invert keep: 4,8,12 or every-8; none: those of the
    least peak (replay), every 8th (invert)."""
    recompute_attention: Literal["rerun", "keep"] = "rerun"
    """replay and invert: run attention again, or keep its output."""
    invert_tolerance: float = 0.05
    """invert keeps more blocks' outputs where the bound of the relative error would pass this."""
    activation_budget_gib: float | None = None
    """auto: most memory for activations and their gradients, in GiB."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU where there is one."""
    threads: Int | None = None
    """CPU threads of torch; none: torch's choice."""
    log_every_steps: Int = 10
    """Steps between two training rows of metrics.jsonl."""
    eval_every_steps: Int = 100
    """Steps between two evaluations; 0: only before the first and after the last step."""
    save_every_steps: Int = 100
    """Steps between two checkpoints; 0: only after the last step."""
    keep_checkpoints: Int = 2
    """Newest checkpoints kept; 0: all."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's numbers."""

    preset: str = "tiny"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to stop."""

    max_tokens: Int = 100
    """Most tokens written after the prompt."""
    temperature: float = 1.0
    """Divides the logits: below 1 the likely tokens gain, above 1 the unlikely ones."""
    top_k: Int | None = None
    """Choose among so many of the likeliest tokens; none: all."""
    top_p: float | None = None
    """Choose among the fewest likeliest tokens that hold this share of the probability (after
    top-k); none: all."""
    greedy: bool = False
    """Always take the likeliest token."""
    seed: Int = 0
    """Seed of the draws."""
    stop_at_end: bool = True
    """Stop where the model writes end-of-text; else that token is written like any other."""
    use_cache: bool = True
    """Keep the keys and values of earlier tokens; else recompute them for every token."""


SECTIONS = ("model", "data", "optimizer", "train")


def override(config: RunConfig, **sections: Mapping[str, Any]) -> RunConfig:
    """Return ``config`` with some keys of its sections replaced.

    >>> override(RunConfig(), model={"linear": "full"}, train={"steps": 3}).train.steps
    3
    """
    return dataclasses.replace(
        config, **{name: _replace(getattr(config, name), keys) for name, keys in sections.items()}
    )


def _replace(section: Any, keys: Mapping[str, Any]) -> Any:
    known = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    changed: dict[str, Any] = {}
    for key, value in keys.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"unknown key {key!r} of {type(section).__name__}{hint}")
        nested = dataclasses.is_dataclass(known[key]) and isinstance(value, Mapping)
        changed[key] = _replace(known[key], value) if nested else value
    return dataclasses.replace(section, **changed)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists, strings and numbers: what JSON and YAML can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Inverse of ``to_dict``. Raises ``ConfigError`` on an unknown key or a wrong type."""
    return _build(RunConfig, values, "")


def _build(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    problems = [f"unknown key {where}{key}" for key in sorted(set(values) - known)]
    built = {}
    for key in sorted(set(values) & known):
        try:
            built[key] = _coerce(hints[key], values[key], where + key)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return cls(**built)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _build(hint, value, where + ".")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerce(args[0], item, where) for item in value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ConfigError(f"{where} is {value!r}, which is not a {getattr(hint, '__name__', hint)}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or broken file is a ``ConfigError`` that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: altered (it holds no JSON object)")
    return value


def check(config: RunConfig) -> None:
    """Raise one ``ConfigError`` with every problem that the words of the configuration show.

    Whether files exist and hold text is seen when they are opened (``data.prepare``).
    """
    model, data, optimizer, train = (getattr(config, name) for name in SECTIONS)
    problems: list[str] = []

    def want(ok: bool, message: str) -> None:
        if not ok:
            problems.append(message)

    def positive(section: Any, name: str, *keys: str) -> None:
        for key in keys:
            value = getattr(section, key)
            flag = f"--{name}.{key.replace('_', '-')}"
            fine = value is None or (value > 0 and math.isfinite(value))
            want(fine, f"{flag} is {value}; it must be above zero and finite")

    positive(model, "model", "hidden_size", "intermediate_size", "num_layers", "num_heads")
    positive(model, "model", "num_kv_heads", "vocab_size", "rope_theta", "norm_eps", "init_std")
    positive(data, "data", "validation_tokens", "vocab_size", "sequence_length", "max_documents")
    positive(optimizer, "optimizer", "lr", "eps")
    positive(train, "train", "steps", "batch_size", "micro_batch_size", "threads")
    positive(train, "train", "log_every_steps", "invert_tolerance", "activation_budget_gib")
    for key in ("eval_every_steps", "save_every_steps", "keep_checkpoints", "seed"):
        flag, value = f"--train.{key.replace('_', '-')}", getattr(train, key)
        want(value >= 0, f"{flag} is {value}; it must be zero or more")
    for key in ("beta1", "beta2"):
        value = getattr(optimizer, key)
        want(0 <= value < 1, f"--optimizer.{key} is {value}; it must lie in [0, 1)")
    for key in ("warmup_frac", "min_lr_frac"):
        flag, value = f"--optimizer.{key.replace('_', '-')}", getattr(optimizer, key)
        want(0 <= value <= 1, f"{flag} is {value}; it is a share and must lie in [0, 1]")
    for key in ("weight_decay", "clip_norm"):
        flag, value = f"--optimizer.{key.replace('_', '-')}", getattr(optimizer, key)
        want(value >= 0, f"{flag} is {value}; it must be zero or more")
    want(
        0 < data.validation_frac < 1,
        f"--data.validation-frac is {data.validation_frac}; it is a share and must lie in (0, 1)",
    )
    want(
        data.sequence_length >= 2,
        f"--data.sequence-length is {data.sequence_length}; a row needs at least 2 tokens "
        "to have one to predict",
    )
    want(bool(data.source), "--data.source is empty; name a corpus, or python for the default one")
    want(
        data.tokenizer != "train" or data.vocab_size >= 257,
        f"--data.vocab-size is {data.vocab_size}; byte-level BPE needs at least 257 "
        "(256 bytes and end-of-text)",
    )

    problems += _head_problems(model)
    if train.batch_size > 0 and train.micro_batch_size and train.micro_batch_size > 0:
        want(
            train.batch_size % train.micro_batch_size == 0,
            f"--train.batch-size {train.batch_size} is not divided by --train.micro-batch-size "
            f"{train.micro_batch_size}",
        )

    problems += _name_problems(model, optimizer)
    shaped = not any(problem.startswith("--model.") for problem in problems)
    if shaped:
        problems += _rank_problems(model)
        problems += _recompute_problems(model, train)
    if problems:
        raise ConfigError(problems)


def _head_problems(model: ModelConfig) -> list[str]:
    problems: list[str] = []
    heads_ok = model.num_heads > 0 and model.hidden_size > 0
    if heads_ok and model.hidden_size % model.num_heads:
        divisors = [n for n in range(1, model.hidden_size + 1) if model.hidden_size % n == 0]
        near = min(divisors, key=lambda n: abs(n - model.num_heads))
        problems.append(
            f"--model.hidden-size {model.hidden_size} is not divided by --model.num-heads "
            f"{model.num_heads}; the nearest number of heads that divides it is {near}"
        )
    elif heads_ok and (model.hidden_size // model.num_heads) % 2:
        problems.append(
            f"--model.hidden-size {model.hidden_size} over --model.num-heads {model.num_heads} "
            f"gives heads of odd size {model.hidden_size // model.num_heads}; "
            "rotary embedding needs an even one"
        )
    kv_heads = model.num_kv_heads
    if heads_ok and kv_heads and kv_heads > 0 and model.num_heads % kv_heads:
        problems.append(
            f"--model.num-heads {model.num_heads} is not divided by --model.num-kv-heads {kv_heads}"
        )
    return problems


def _name_problems(model: ModelConfig, optimizer: OptimizerConfig) -> list[str]:
    problems: list[str] = []
    for flag, name, known in (
        ("--model.linear", model.linear, linears.names()),
        ("--optimizer.name", optimizer.name, optimizers.names()),
    ):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{flag} is {name!r}; known are {', '.join(known)}{hint}")
    return problems


def _rank_problems(model: ModelConfig) -> list[str]:
    try:
        slots = linears.slots(model)
    except ValueError as error:
        return [str(error)]
    method = linears.get(model.linear)
    problems = method.problems(getattr(model, model.linear, None))
    too_large: dict[tuple[bool, int, int], list[linears.Slot]] = {}
    for slot in slots:
        limit = min(slot.in_size, slot.out_size)
        if slot.rank > limit:
            scheduled = slot.layer_idx >= method.first_ranked_layer_idx
            too_large.setdefault((scheduled, slot.rank, limit), []).append(slot)
    for (scheduled, rank, limit), where in too_large.items():
        flag = f"--model.rank {model.rank}" if scheduled else f"--model.{model.linear}.first-rank"
        positions = ", ".join(dict.fromkeys(slot.position for slot in where))
        blocks = sorted({slot.layer_idx + 1 for slot in where})
        span = str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}..{blocks[-1]}"
        problems.append(
            f"{flag} gives rank {rank} to {positions} in block {span}, above the smaller width "
            f"there, {limit}; take {limit} or less"
        )
    return problems


def _recompute_problems(model: ModelConfig, train: TrainConfig) -> list[str]:
    policy = train.recompute
    problems = []
    if policy == "auto" and train.activation_budget_gib is None:
        problems.append("--train.recompute auto needs --train.activation-budget-gib, for example 8")
    if policy != "auto" and train.activation_budget_gib is not None:
        problems.append(
            f"--train.activation-budget-gib has no effect with --train.recompute {policy}; "
            "say --train.recompute auto, or leave it out"
        )
    if policy not in ("invert", "replay") and train.recompute_layers is not None:
        problems.append(
            f"--train.recompute-layers has no effect with --train.recompute {policy}; "
            "leave it out, or say invert or replay"
        )
    if policy in ("none", "block") and train.recompute_attention == "keep":
        problems.append(
            f"--train.recompute-attention keep has no effect with --train.recompute {policy}; "
            "leave it out"
        )
    if policy == "invert" and linears.get(model.linear).carry != "below":
        problems.append(
            f"--train.recompute invert: the outputs of {model.linear} do not follow from those of "
            "the block above; take replay or block"
        )
    if policy not in ("none", "block") and train.compile:
        problems.append(
            f"--train.compile with --train.recompute {policy} is not supported: a compiled block "
            "does not come apart; leave one of them out, or take --train.recompute block"
        )
    if policy in ("invert", "replay"):
        try:
            layers = parse_layers(train.recompute_layers or "every-8", model.num_layers)
        except ValueError as error:
            return [*problems, str(error)]
        if policy == "invert" and 1 in layers:
            problems.append(
                f"--train.recompute-layers {train.recompute_layers}: invert never keeps block 1, "
                "which the block above leads to; leave it out"
            )
    return problems


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Read a set of blocks, 1-based: ``4,8,12``, or ``every-8`` for 8, 16, ...

    Raises:
        ValueError: unreadable, or a block that the model does not have.
    """
    if match := re.fullmatch(r"every-([1-9]\d*)", text):
        every = int(match[1])
        return tuple(range(every, num_layers + 1, every))
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(
            f"--train.recompute-layers {text!r} cannot be read; write 4,8,12 or every-8"
        )
    layers = tuple(sorted({int(number) for number in text.split(",")}))
    if layers[0] < 1 or layers[-1] > num_layers:
        raise ValueError(
            f"--train.recompute-layers {text}: the model's blocks are 1 to {num_layers}"
        )
    return layers


def check_sampling(sampling: Sampling) -> None:
    """Raise one ``ConfigError`` with every problem of the options."""
    if problems := sampling_problems(sampling):
        raise ConfigError(problems)


def sampling_problems(sampling: Sampling) -> list[str]:
    """What is wrong with the options, one sentence each."""
    problems = []
    if sampling.max_tokens < 1:
        problems.append(f"--max-tokens is {sampling.max_tokens}; it must be at least 1")
    if sampling.temperature == 0:
        problems.append("--temperature is 0; use --greedy to take the likeliest token always")
    elif not (sampling.temperature > 0 and math.isfinite(sampling.temperature)):
        problems.append(f"--temperature is {sampling.temperature}; it must be above zero, finite")
    if sampling.top_k is not None and sampling.top_k < 1:
        problems.append(
            f"--top-k is {sampling.top_k}; it must be at least 1; leave it out to choose among all"
        )
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        problems.append(f"--top-p is {sampling.top_p}; it is a share and must lie in (0, 1]")
    if not 0 <= sampling.seed < 2**64:
        problems.append(f"--seed is {sampling.seed}; it must lie in [0, 2**64)")
    if sampling.greedy:
        given = {
            "--temperature": sampling.temperature != 1,
            "--top-k": sampling.top_k is not None,
            "--top-p": sampling.top_p is not None,
        }
        if without_effect := [flag for flag, is_given in given.items() if is_given]:
            problems.append(
                f"--greedy takes the likeliest token, so {', '.join(without_effect)} would have no "
                "effect; leave out one or the other"
            )
    return problems
