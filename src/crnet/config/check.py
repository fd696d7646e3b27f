"""What is wrong with a configuration: every problem in one error."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from crnet import architectures, linears, optimizers, schedules, streams
from crnet.config.check_adapter import adapter_problems, unused_problems
from crnet.config.check_changing import changing_problems
from crnet.config.check_decay import decay_problems
from crnet.config.check_fused import fused_problems, shared_problems
from crnet.config.check_optimizer import optimizer_problems
from crnet.config.check_pipeline import pipeline_problems
from crnet.config.check_tensor import tensor_problems
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import (
    SECTIONS,
    SIZES,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    field_name,
    num_shares,
    options_of,
    trackers_of,
)
from crnet.errors import ConfigError
from crnet.recompute.plan import PACKING, KeepAs, parse_layers
from crnet.schedules import Steps
from crnet.specs import Slot

# Without these, no method can be asked.
_FIRST = ("--model.", "--optimizer.", "--data.vocab-size")


def check(config: RunConfig) -> None:
    """Raise one ``ConfigError`` with every problem that the words of the configuration show.

    Whether files exist and hold text is seen when they are opened (``data.prepare``).
    """
    model, data, optimizer, train = config.model, config.data, config.optimizer, config.train
    problems = [*_range_problems(config), *_option_problems(config), *_data_problems(data)]
    if model.hidden_size <= _WIDEST:  # of a larger one, not every divisor can be tried
        problems += _head_problems(model)
    problems += _name_problems(model, optimizer)
    if not any(problem.startswith(_FIRST) for problem in problems):
        problems += _method_problems(config)
    if _positive(train.batch_size, train.micro_batch_size) and (
        train.batch_size % min(train.micro_batch_size or train.batch_size, train.batch_size)
    ):
        problems.append(
            f"--train.batch-size {train.batch_size} is not divided by --train.micro-batch-size "
            f"{train.micro_batch_size}"
        )
    if train.precision != "bf16" and train.bf16_update != TrainConfig.bf16_update:
        problems.append(
            f"--train.bf16-update {train.bf16_update} has no effect with --train.precision "
            f"{train.precision}; say --train.precision bf16, or leave it out"
        )
    problems += unused_problems(train)
    problems += fused_problems(config)
    try:
        trackers_of(train)
    except ValueError as error:
        problems.append(str(error))
    if not problems:
        problems += parallel_problems(config)
    if problems:
        raise ConfigError(problems)


def parallel_problems(config: RunConfig) -> Iterator[str]:
    """What processes cannot share."""
    yield from pipeline_problems(config)
    yield from tensor_problems(config)
    yield from changing_problems(config)
    yield from shared_problems(config)
    if config.parallel.checkpoint == "parts" and config.parallel.shard == 1:
        yield (
            "--parallel.checkpoint parts is for what --parallel.shard splits; leave it out, or say "
            "--parallel.shard"
        )
    train, parallel, shares = config.train, config.parallel, num_shares(config.parallel)
    share, over = divmod(train.batch_size, shares)
    if over:
        yield (
            f"--train.batch-size {train.batch_size} is not divided by the {shares} processes that "
            f"share it (--parallel.*); take a multiple of {shares}"
        )
    elif shares > 1 and share % min(train.micro_batch_size or share, share):
        yield (
            f"--train.micro-batch-size {train.micro_batch_size} does not divide the {share} "
            f"sequences of a process; take a divisor of {share}"
        )
    if parallel.shard > 1 and train.precision == "bf16":
        yield (
            "--parallel.shard with --train.precision bf16: norms and gains have an fp32 master or "
            "are fp32, and fully_shard takes blocks of one dtype; say --train.precision bf16-mixed"
        )


def _positive(*values: float | None) -> bool:
    return all(value is None or value > 0 for value in values)


_ABOVE_ZERO = {
    "model": (
        *("hidden_size", "intermediate_size", "num_layers", "num_heads"),
        *("num_kv_heads", "head_size", "vocab_size", "rope_theta", "norm_eps", "init_std"),
        "embedding_lr_factor",
    ),
    "data": ("validation_tokens", "vocab_size", "sequence_length", "max_documents"),
    "optimizer": ("lr", "eps"),
    "train": (
        *("steps", "batch_size", "micro_batch_size", "threads", "epochs", "stop_after_steps"),
        *("log_every_steps", "invert_tolerance", "activation_budget_gib"),
        *("adapter_rank", "adapter_alpha"),
    ),
    "parallel": SIZES,
}
_ZERO_OR_MORE = {
    "train": ("eval_every_steps", "save_every_steps", "keep_checkpoints", "seed"),
    "optimizer": ("weight_decay", "clip_norm"),
}
_WIDEST, _LONGEST = 2**24, 2**63 - 1  # of a tensor; what 64 bits hold
_FP32 = 2.0**128
_MOST: dict[str, dict[str, int]] = {
    "model": {
        **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), _WIDEST),
        **dict.fromkeys(("num_heads", "num_kv_heads", "head_size"), _WIDEST),
        "num_layers": 2**16,
    },
    "data": {
        **dict.fromkeys(("vocab_size", "sequence_length"), _WIDEST),
        **dict.fromkeys(("validation_tokens", "max_documents"), _LONGEST),
    },
    "train": {
        **dict.fromkeys(("batch_size", "micro_batch_size", "adapter_rank"), _WIDEST),
        **dict.fromkeys(("steps", "log_every_steps", "eval_every_steps"), _LONGEST),
        **dict.fromkeys(("epochs", "stop_after_steps"), _LONGEST),
        **dict.fromkeys(("save_every_steps", "keep_checkpoints"), _LONGEST),
        "threads": 4096,
        "seed": 2**64 - 1,
    },
    "parallel": dict.fromkeys(SIZES, 2**16),
}
_SHARES = {"optimizer": ("warmup_frac", "min_lr_frac")}
_DECAYS = {"optimizer": ("beta1", "beta2")}


def _range_problems(config: RunConfig) -> Iterator[str]:
    """Numbers outside the range that their key has."""
    rules = (
        (_ABOVE_ZERO, lambda x: x > 0 and math.isfinite(x), "must be above zero and finite"),
        (_ZERO_OR_MORE, lambda x: 0 <= x < math.inf, "must be zero or more and finite"),
        (_DECAYS, lambda x: 0 <= x < 1, "must lie in [0, 1)"),
        (_SHARES, lambda x: 0 <= x <= 1, "is a share and must lie in [0, 1]"),
    )
    for keys_of, is_fine, wanted in rules:
        for section, keys in keys_of.items():
            for key in keys:
                value = getattr(getattr(config, section), key)
                if value is not None and not is_fine(value):
                    yield f"--{section}.{key.replace('_', '-')} is {value}; it {wanted}"
    for section, limits in _MOST.items():
        for key, most in limits.items():
            value = getattr(getattr(config, section), key)
            if value is not None and value > most:
                yield f"--{section}.{key.replace('_', '-')} is {value}; it must be {most} or less"


def _option_problems(config: RunConfig) -> Iterator[str]:
    """Numbers of methods' options that are none, or more than any count can be."""
    for section in SECTIONS:
        for field in dataclasses.fields(getattr(config, section)):
            options = getattr(getattr(config, section), field.name)
            if not dataclasses.is_dataclass(options):
                continue
            for key, value in vars(options).items():
                flag = f"--{section}.{field.name}.{key}".replace("_", "-")
                if isinstance(value, float) and not abs(value) < _FP32:
                    yield f"{flag} is {value}; it must be finite, in fp32 too"
                elif isinstance(value, int) and abs(value) >= 2**31:
                    yield f"{flag} is {value}; it must be {2**31 - 1} or less"


def _data_problems(data: DataConfig) -> Iterator[str]:
    if not 0 < data.validation_frac < 1:
        yield (
            f"--data.validation-frac is {data.validation_frac}; "
            "it is a share and must lie in (0, 1)"
        )
    if data.sequence_length < 2:
        yield (
            f"--data.sequence-length is {data.sequence_length}; a row needs at least 2 tokens "
            "to have one to predict"
        )
    if not data.source:
        yield "--data.source is empty; name a corpus, or python for the default one"
    if data.tokenizer == "train" and data.vocab_size < 257:
        yield (
            f"--data.vocab-size is {data.vocab_size}; byte-level BPE needs at least 257 "
            "(256 bytes and end-of-text)"
        )
    yield from _chat_problems(data)


def _chat_problems(data: DataConfig) -> Iterator[str]:
    """Keys that go with conversations, or do not."""
    if data.chat is None:
        for key in ("chat_template", "chat_loss"):
            if (value := getattr(data, key)) != getattr(DataConfig, key):
                flag = f"--data.{key.replace('_', '-')} {value}"
                yield f"{flag} has no effect without --data.chat; say --data.chat auto"
        return
    for key in ("text_key", "documents"):
        if (value := getattr(data, key)) != getattr(DataConfig, key):
            flag = f"--data.{key.replace('_', '-')} {value}"
            yield f"{flag} has no effect with --data.chat {data.chat}; leave one of them out"
    if "python" in (*data.source, *data.validation_source):
        yield (
            f"--data.chat {data.chat}: the source python holds no conversations; name files of "
            "records with --data.source"
        )


def _head_problems(model: ModelConfig) -> Iterator[str]:
    if not _positive(model.num_heads, model.hidden_size, model.num_kv_heads):
        return
    if model.head_size is None and model.hidden_size % model.num_heads:
        divisors = [n for n in range(1, model.hidden_size + 1) if model.hidden_size % n == 0]
        near = min(divisors, key=lambda n: abs(n - model.num_heads))
        yield (
            f"--model.hidden-size {model.hidden_size} is not divided by --model.num-heads "
            f"{model.num_heads}; the nearest number of heads that divides it is {near}"
        )
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        yield (
            f"--model.num-heads {model.num_heads} is not divided by --model.num-kv-heads "
            f"{model.num_kv_heads}"
        )


def _name_problems(model: ModelConfig, optimizer: OptimizerConfig) -> Iterator[str]:
    for flag, name, seam in (
        ("--model.architecture", model.architecture, architectures),
        ("--model.linear", model.linear, linears),
        ("--model.stream", model.stream, streams),
        ("--optimizer.name", optimizer.name, optimizers),
        ("--optimizer.schedule", optimizer.schedule, schedules),
    ):
        if name not in (known := seam.names()):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"{flag} is {name!r}; known are {', '.join(known)}{hint}"


def _unused_problems(
    section: Any, name: str, chosen: Sequence[str], seams: Sequence[ModuleType]
) -> Iterator[str]:
    """Options that were changed and belong to a method that was not chosen."""
    for seam in seams:
        for method in seam.names():
            options = options_of(section, method)
            if options is None or method in chosen or options == type(options)():
                continue
            changed = [
                field.name.replace("_", "-")
                for field in dataclasses.fields(options)
                if getattr(options, field.name) != field.default
            ]
            yield (
                f"--{name}.{method}.{changed[0]} has no effect: {', '.join(chosen)} "
                f"is chosen, not {method}; leave it out"
            )


def _method_problems(config: RunConfig) -> list[str]:
    """What the chosen methods say, once names and numbers are right."""
    model, optimizer = config.model, config.optimizer
    chosen = (model.architecture, model.linear, model.stream)
    seams = (architectures, linears, streams)
    problems = [*_unused_problems(model, "model", chosen, seams)]
    chosen = (optimizer.name, optimizer.schedule)
    problems += _unused_problems(optimizer, "optimizer", chosen, (optimizers, schedules))
    problems += optimizers.get(optimizer.name).problems(options_of(optimizer, optimizer.name))
    steps = steps_of(config)
    schedule = schedules.get(optimizer.schedule)
    problems += schedule.problems(options_of(optimizer, schedule.name), steps)
    if not schedule.falls and optimizer.min_lr_frac != type(optimizer).min_lr_frac:
        problems.append(
            f"--optimizer.min-lr-frac {optimizer.min_lr_frac:g} has no effect: the rate of "
            f"--optimizer.schedule {schedule.name} does not fall; leave it out"
        )
    size = model.vocab_size or config.data.vocab_size
    try:
        spec = model_spec(dataclasses.replace(model, vocab_size=size))
    except ValueError as error:
        return [*problems, str(error)]
    problems += spec_problems(spec)
    longest = spec.architecture.max_length(spec.architecture_options)
    if longest is not None and config.data.sequence_length > longest:
        problems.append(
            f"--data.sequence-length {config.data.sequence_length} is above the {longest} "
            f"positions of --model.{field_name(spec.architecture.name)}; take {longest} or less, "
            "or give it more"
        )
    if not any(problem.startswith("--model.") for problem in problems):
        problems += _recompute_problems(spec, config.train)
        problems += adapter_problems(spec, config.train, config.parallel)
        problems += optimizer_problems(spec, optimizer, config.train.adapter)
        problems += decay_problems(spec, config)
    return problems


def steps_of(config: RunConfig) -> Steps:
    """What a schedule is told of a run."""
    optimizer = config.optimizer
    return Steps(config.train.steps, optimizer.warmup_frac, optimizer.min_lr_frac)


def spec_problems(spec: ModelSpec) -> list[str]:
    """What the methods of a model say of its sizes, ranks and options."""
    slots = [slot for block in spec.slots for slot in block if not slot.is_operator]
    problems = [
        *spec.architecture.problems(spec.shape, spec.architecture_options),
        *spec.stream.problems(spec.shape, spec.stream_options),
        *_expert_problems(spec),
    ]
    too_large = _too_large(spec, slots)
    problems += too_large
    return problems if too_large else problems + spec.linear.problems(spec.linear_options, slots)


def _expert_problems(spec: ModelSpec) -> list[str]:
    """Maps of experts that would read an earlier block: rows of other tokens."""
    experts = [slot for block in spec.slots for slot in block if slot.expert]
    flag = f"--model.linear {spec.linear.name} in {spec.architecture.name}"
    if any(slot.position in spec.reads[slot.layer_idx] for slot in experts):
        return [
            f"{flag}: a map of an expert would read what that expert of an earlier block made of "
            "other tokens; take a parameterization without a carry, or one that carries what all "
            "experts give together"
        ]
    if any(spec.shared_tensors(slot) for slot in experts):
        return [
            f"{flag}: the experts of all blocks would share one matrix each, and they are not the "
            "same experts; take another parameterization"
        ]
    return []


def _too_large(spec: ModelSpec, slots: Sequence[Slot]) -> list[str]:
    """Ranks above the smaller width of their map."""
    found: dict[tuple[bool, int, int], list[Slot]] = {}
    for slot in slots:
        limit = min(slot.in_size, slot.out_size)
        if slot.rank > limit:
            fixed = spec.linear.fixed_rank(slot.layer_idx, spec.linear_options)
            found.setdefault((fixed is None, slot.rank, limit), []).append(slot)
    problems = []
    for (scheduled, rank, limit), where in found.items():
        method = spec.linear.name
        flag = f"--model.rank {spec.config.rank}" if scheduled else f"--model.{method}.first-rank"
        positions = ", ".join(dict.fromkeys(slot.position for slot in where))
        blocks = sorted({slot.layer_idx + 1 for slot in where})
        span = str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}..{blocks[-1]}"
        problems.append(
            f"{flag} gives rank {rank} to {positions} in block {span}, above the smaller width "
            f"there, {limit}; take {limit} or less"
        )
    return problems


def policy_problem(spec: ModelSpec, policy: str, keep_as: KeepAs = "computed") -> str | None:
    """Why a model cannot be run under a recompute policy that keeps tensors so; None: it can."""
    if keep_as != "computed" and (problem := _packing_problem(spec, policy, keep_as)):
        return problem
    if policy not in spec.stream.policies and policy != "auto":
        return (
            f"--train.recompute {policy}: the stream {spec.stream.name} cannot be rebuilt from "
            f"what its sublayers write; take {' or '.join(spec.stream.policies)}"
        )
    if policy == "invert":
        complete = all(
            len(block) == len(spec.positions) and all(read.inverts for read in block.values())
            for block in spec.reads[1:]
        )
        if not complete or spec.num_layers < 2:
            return (
                f"--train.recompute invert: the outputs of {spec.linear.name} do not follow from "
                "those of the block above; take replay or block"
            )
    return None


def _kept_problems(train: TrainConfig) -> Iterator[str]:
    """What does not go with keeping activations as codes, whatever the model."""
    if train.keep_as == "computed":
        return
    if train.compile:
        yield (
            f"--train.compile with --train.keep-as {train.keep_as} is not supported: a compiled "
            "block keeps what its compiler chose; leave one of them out"
        )
    if train.recompute_attention == "keep":
        yield (
            f"--train.recompute-attention keep with --train.keep-as {train.keep_as}: what "
            "attention keeps does not go with other queries and keys; leave it out"
        )


def _packing_problem(spec: ModelSpec, policy: str, keep_as: str) -> str | None:
    flag = f"--train.keep-as {keep_as}"
    if policy not in PACKING:
        reasons = {
            "invert": "would divide the error of what is kept by the gain, block after block",
            "block": "leaves what enters a block to torch's checkpointing",
        }
        reason = reasons.get(policy, "compares exact activations")
        return (
            f"{flag}: --train.recompute {policy} {reason}; take --train.recompute "
            f"{' or '.join(PACKING)}"
        )
    if not spec.architecture.packs(spec.architecture_options):
        return (
            f"{flag} with {spec.architecture.name} as it is: norms of heads, masks and routers "
            "keep several exact numbers a token, which would be packed with the rest; leave it out"
        )
    if not spec.stream.adds:
        return (
            f"{flag}: the last read of the stream {spec.stream.name}, behind the blocks, keeps all "
            "that they wrote as it is, and nothing would be saved; leave it out"
        )
    return None


def _recompute_problems(spec: ModelSpec, train: TrainConfig) -> list[str]:
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
    if problem := policy_problem(spec, policy, train.keep_as):
        problems.append(problem)
    problems += _kept_problems(train)
    if train.compile and not spec.architecture.compiles:
        problems.append(
            f"--train.compile with {spec.architecture.name} is not supported: how many tokens an "
            "expert gets is known only as it runs; leave it out"
        )
    if policy not in ("none", "block") and train.compile:
        problems.append(
            f"--train.compile with --train.recompute {policy} is not supported: a compiled block "
            "does not come apart; leave one of them out, or take --train.recompute block"
        )
    if policy in ("invert", "replay"):
        problems += _layer_problems(spec, train)
    return problems


def _layer_problems(spec: ModelSpec, train: TrainConfig) -> list[str]:
    try:
        given = train.recompute_layers
        layers = parse_layers("every-8" if given is None else given, spec.num_layers)
    except ValueError as error:
        return [str(error)]
    if train.recompute == "invert" and 1 in layers:
        return [
            f"--train.recompute-layers {train.recompute_layers}: invert never keeps block 1, "
            "which the block above leads to; leave it out"
        ]
    return []
