"""What the paper's own runs differ in from the package's presets, key by key, and why; and its
perplexities beside a run's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from crnet.config import presets
from crnet.config.sections import RunConfig
from crnet.config.serialize import flags
from crnet.errors import ConfigError
from crnet.paper.perplexities import PERPLEXITIES

REASONS = {
    "data.source": "5.1: C4; table 8: TinyShakespeare, its file input.txt in the working folder",
    "data.subset": "5.1: C4-en",
    "data.tokenizer": "of the protocol that E.2.1 follows (GaLore's): t5-base, 32,000 entries; by "
    "that name 100 spare ones come along, the SentencePiece file has none. Tables 7, 8: the "
    "model's own; of Qwen-3 the 151,936 entries give E.3's 1.8B parameters",
    "data.rows": "GaLore's protocol: one document a row, cut or padded",
    "data.sequence_length": "E.2.1: 256; E.2.7: 2,048; table 8",
    "data.max_documents": "steps x rows of a batch: one pass over so many documents",
    "optimizer.clip_norm": "neither the paper nor GaLore's protocol up to 1B clips; ours does",
    "optimizer.lr": "table 8; its 100 steps of pre-training are the first of 500 of warm-up, and "
    "reach a fifth of 1e-5; of Qwen-3's 1,000, and reach a tenth of 2.5e-3",
    "optimizer.warmup_frac": "table 8: 500 iterations, Qwen-3 1,000",
    "train.steps": "table 9; E.2.7: 2.9B, 8.0B and 29.5B tokens; table 8",
    "train.batch_size": "E.2.1: 512; E.2.7 does not say, and 131,072 tokens are kept; table 8",
    "train.micro_batch_size": "not the paper's: what fits a device",
    "train.precision": "the memory that tables 2 and 3 print is bf16 throughout",
    "train.bf16_update": "not said; GaLore's protocol rounds updates to nearest, ours at random",
    "train.recompute": "5.1, E.2.3: algorithm 1; ours: replay, which is exact",
    "train.recompute_layers": "E.2.3: every 8th block",
    "train.invert_tolerance": "algorithm 1 has no guard on its rounding error; ours keeps more "
    "outputs where rounding would pass 0.05",
    "train.eval_every_steps": "table 8",
    "model": "table 8: the released model's shape; the weights are to be brought along",
}
"""By key, or by section: where a value is from, and why the package's own preset has another."""
OPEN = {
    "optimizer.lr": "E.2.1 searches {rates}, for 10% of the steps each; which one won is printed "
    "for 350M alone (0.01). The others are ours: search them",
    "optimizer.name": "weight decay, Adam's betas and epsilon are not printed: torch's defaults, "
    "no decay, as in GaLore's protocol",
    "model.crnet": "initial values of A, B and beta are not printed: ours",
    "model.init_std": "not printed: 0.02",
}
"""What the paper leaves open, and what a run takes."""
DATA = ("source", "subset", "tokenizer", "rows", "sequence_length", "text_key", "documents")
"""Keys of the data without which a perplexity cannot be put beside the paper's."""


@dataclass(frozen=True)
class Difference:
    """A key in which a run of the paper differs from the package's own preset."""

    key: str
    paper: Any
    preset: Any
    why: str


def base_of(name: str) -> str:
    """The package's own preset beside a run of the paper. Raises ``ConfigError`` if it is none."""
    if name not in presets.PAPER:
        raise ConfigError(
            f"no run of the paper is named {name!r}; known: {', '.join(presets.PAPER)}"
        )
    stem = name.removeprefix(presets.PREFIX).removesuffix(f"-{presets.LONG_ROW}")
    return stem if stem in presets.PRESETS else "tiny"


def differences(name: str) -> list[Difference]:
    """Every key that differs, in the order of the sections."""
    before = dict(flags(presets.get(base_of(name))))
    return [
        Difference(key, value, before[key], reason(key))
        for key, value in flags(presets.get(name))
        if value != before[key] and key != "preset"
    ]


def reason(key: str) -> str:
    """Why a key differs."""
    return REASONS.get(key) or REASONS[key.partition(".")[0]]


def left_open() -> Iterator[tuple[str, str]]:
    """What the paper does not say, key by key."""
    rates = ", ".join(f"{rate:g}" for rate in presets.RATES)
    for key, text in OPEN.items():
        yield key, text.format(rates=rates)


def beside(config: RunConfig) -> dict[str, Any] | None:
    """The paper's perplexities for the model of a run; None where it is no run of the paper.

    Returns: ``rows`` of table, method, step and perplexity, and ``differs``: the keys in which the
        run is not the paper's, without which its figure cannot be put beside them.
    """
    model = config.preset.removeprefix(presets.PREFIX)
    rows = [vars(each) for each in PERPLEXITIES if each.model == model]
    if config.preset not in presets.PAPER or not rows:
        return None
    wanted = dict(flags(presets.get(config.preset)))
    found = dict(flags(config))
    keys = [f"data.{key}" for key in DATA]
    keys += [
        key
        for key in wanted
        if key.startswith(("model.", "optimizer.", "train.")) and key not in _FREE
    ]
    wanted_ranks = ("aligned-parameters", "aligned-memory")
    differs = [
        f"--{key.replace('_', '-')}"
        for key in keys
        if found[key] != wanted[key] and not (key == "model.rank" and found[key] in wanted_ranks)
    ]
    rows = [{key: row[key] for key in ("table", "method", "step", "perplexity")} for row in rows]
    return {"rows": rows, "differs": differs}


def published(config: RunConfig) -> dict[str, Any]:
    """``beside`` under its name in ``run.json`` and ``--json``; empty if there is nothing."""
    found = beside(config)
    return {} if found is None else {"published": found}


_FREE = {
    "model.vocab_size",  # the tokenizer's, once it is known
    *("model.linear", "optimizer.name"),  # the tables' other rows
    "optimizer.lr",  # searched
    *(
        f"train.{key}"
        for key in (
            *("micro_batch_size", "seed", "tf32", "compile", "deterministic", "kernels", "device"),
            *("threads", "log_every_steps", "eval_every_steps", "save_every_steps"),
            *("keep_checkpoints", "tensorboard", "activation_budget_gib", "bf16_update"),
            *("recompute", "recompute_layers", "recompute_attention", "invert_tolerance"),
        )
    ),
}
"""Keys that a run of the paper may have otherwise."""


def lines(config: RunConfig) -> list[str]:
    """The perplexities beside a run's own, for the terminal; none if it is no run of the paper."""
    found = beside(config)
    if found is None:
        return []
    tables: dict[int, list[str]] = {}
    for row in found["rows"]:
        at = "" if row["step"] is None else f" at step {row['step']:,}"
        tables.setdefault(row["table"], []).append(f"{row['method']}{at} {row['perplexity']:.2f}")
    text = [f"the paper's table {table}: {'; '.join(each)}" for table, each in tables.items()]
    if found["differs"]:
        text.append(f"not comparable with it, by {', '.join(found['differs'])}")
    return text
