"""CR-Net beside other methods on the user's own machine: runs, a table, a picture, a sample.

The methods, their learning rates and initial scales are the rows of the study ``demo``
(``compare.study``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from crnet.compare.processes import train_all
from crnet.compare.study import read
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.cost.workload import workload
from crnet.errors import ConfigError
from crnet.inference.generate import complete
from crnet.inference.load import load_model, load_tokenizer
from crnet.inference.sampling import Sampling
from crnet.measure.memory import saved_bytes
from crnet.model.build import build
from crnet.report.plots import loss_picture
from crnet.storage import metrics
from crnet.storage.checkpoint import Checkpoint, load

STUDY = "demo"
"""The built-in study that says what is trained, with which rates and initial scales."""
SIDES = ("crnet", "full")
"""Its rows that are trained where none are named."""
POLICIES = ("none", "block", "replay")
"""Of ``--train.recompute``: what would be kept under each, whichever the runs were made with."""
PROMPT = "def read_file(path):\n"


def sides_of(names: Sequence[str] = SIDES) -> dict[str, RunConfig]:
    """What some rows of the study train with. Raises ``ConfigError`` where it has no such row."""
    rows = read(STUDY).rows
    if unknown := [name for name in names if name not in rows]:
        raise ConfigError(f"the demo has no side {', '.join(unknown)}; it has {', '.join(rows)}")
    return {name: rows[name].config for name in dict.fromkeys(names)}


def run(configs: Mapping[str, RunConfig], out: Path, *, progress: bool = True) -> dict[str, Any]:
    """Train each of some sides; return the figures of the table.

    Args:
        configs: by name (``sides_of``); the first writes a text.
        out: gets a folder for each side, an ordinary run.
    Raises:
        ConfigError: a signal stopped a run.
    Cost: a training run a side; on a CPU as many at a time as it has cores.
    """
    ended = train_all(configs, out, progress=progress)
    saved = {side: load(Path(each["checkpoint"])) for side, each in ended.items()}
    curves = {side: metrics.read(out / side / "metrics.jsonl") for side in saved}
    picture = loss_picture(curves, out / "loss.png")
    return {
        "rows": {
            side: _row(each, saved[side].config, curves[side]) for side, each in ended.items()
        },
        "picture": None if picture is None else str(picture),
        "prompt": PROMPT,
        "sample": _sample(next(iter(saved.values()))),
    }


def _row(
    ended: Mapping[str, Any], config: RunConfig, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The figures of one run: what ``crnet train --json`` says, its configuration as it was
    resolved, its metrics."""
    step_tokens = config.train.batch_size * config.data.sequence_length
    return {
        "lr": config.optimizer.lr,
        "init_std": config.model.init_std,
        "parameters": ended["parameters"],
        "perplexity_before": next(row["val_perplexity"] for row in rows if "val_perplexity" in row),
        "perplexity_after": ended["val_perplexity"],
        "bits_per_byte_after": ended["val_bits_per_byte"],
        "accuracy_after": ended["val_accuracy"],
        "tokens": ended["tokens"],
        "tokens_per_s": ended["tokens_per_s"],
        "step_s": step_tokens / ended["tokens_per_s"],
        "saved_activation_bytes": _saved_bytes(config),
        "run": ended["run"],
        "checkpoint": ended["checkpoint"],
    }


def _saved_bytes(config: RunConfig) -> dict[str, int]:
    """Bytes of activations that one micro-batch keeps, by recompute policy."""
    found = {}
    model = build(workload(config).spec, seed=0)
    for policy in POLICIES:
        work = workload(override(config, train={"recompute": policy}))
        model.recompute(work.plan)
        batch = work.micro_batch
        tokens = torch.zeros(batch.sequences, batch.length, dtype=torch.int64)
        found[policy] = saved_bytes(model, tokens, tokens)
    return found


def _sample(saved: Checkpoint) -> str:
    sampling = Sampling(max_tokens=120, temperature=0.8, top_p=0.95, seed=1)
    return "".join(complete(load_model(saved), load_tokenizer(saved), PROMPT, sampling))


def table(figures: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{'':8}{'parameters':>12}{'rate':>9}{'init':>7}{'perplexity':>20}{'bits':>8}"
        f"{'right':>8}{'tokens/s':>10}{'s/step':>8}{'MiB of saved activations':>30}",
        f"{'':8}{'':>12}{'':>9}{'std':>7}{'before':>10}{'after':>10}{'/byte':>8}"
        f"{'':>8}{'':>10}{'':>8}" + "".join(f"{policy:>10}" for policy in POLICIES),
    ]
    for linear, row in figures["rows"].items():
        lines.append(
            f"{linear:8}{row['parameters']:>12,}{row['lr']:>9.2g}{row['init_std']:>7.2g}"
            f"{row['perplexity_before']:>10,.1f}{row['perplexity_after']:>10,.1f}"
            f"{row['bits_per_byte_after']:>8.3f}{row['accuracy_after']:>8.1%}"
            f"{row['tokens_per_s']:>10,.0f}{row['step_s']:>8.3f}"
            + "".join(
                f"{row['saved_activation_bytes'][policy] / 2**20:>10,.1f}" for policy in POLICIES
            )
        )
    return "\n".join([*lines, "", tuning(list(figures["rows"]))])


def tuning(sides: Sequence[str]) -> str:
    """Where the rates and initial scales come from."""
    rows = read(STUDY).rows
    words = "; ".join(f"{side}: {rows[side].note}" for side in sides)
    return f"Rate and initial scale decide more than the method does. {words}."


def quick(config: RunConfig) -> RunConfig:
    """The same work in seconds, for a check that everything runs: fewer steps, a smaller model."""
    return override(
        config,
        model={"hidden_size": 64, "intermediate_size": 176, "num_layers": 3, "num_heads": 4},
        train={"steps": 30, "eval_every_steps": 15, "save_every_steps": 15},
        data={"sequence_length": 64, "validation_tokens": 20_000},
    )
