"""What is wrong with a configuration: every problem in one error."""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

from crnet import linears, optimizers
from crnet.config.sections import SECTIONS, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from crnet.errors import ConfigError


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
