"""CR-Net beside other methods on the user's own machine: runs, a table, a picture, a sample.

Each method has its own learning rate and initial scale: at one that is shared by all, the one it
suits would win. ``TUNED`` says what they are, and from how many seeds of a sweep on this corpus
(``runs/sweep.py``) each was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crnet.compare.processes import train_all
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


@dataclass(frozen=True)
class Tuned:
    """What one method trains with."""

    lr: float
    """Peak rate, ``--optimizer.lr``."""
    init_std: float
    """``--model.init-std``."""
    seeds: int
    """Of the sweep on this corpus that chose them; 0: the preset's values, not swept."""


TUNED = {
    "crnet": Tuned(lr=3e-3, init_std=0.02, seeds=1),
    "full": Tuned(lr=3e-3, init_std=0.06, seeds=1),
    "lowrank": Tuned(lr=1.5e-3, init_std=0.02, seeds=0),
}
"""LOG.md, 2026-11-26, has the sweep."""
SIDES = ("crnet", "full")
"""The methods that are trained where none are named."""
POLICIES = ("none", "block", "replay")
"""Of ``--train.recompute``: what would be kept under each, whichever the runs were made with."""
PROMPT = "def read_file(path):\n"


def run(
    config: RunConfig, out: Path, *, sides: Sequence[str] = SIDES, progress: bool = True
) -> dict[str, Any]:
    """Train each of ``sides`` with everything else equal; return the figures of the table.

    Args:
        config: parameterization, rate and initial scale are each side's own (``TUNED``).
        out: gets a folder for each side, an ordinary run.
    Raises:
        ConfigError: a side has no values in ``TUNED``; or a signal stopped a run.
    Cost: a training run a side; on a CPU as many at a time as it has cores.
    """
    if unknown := [side for side in sides if side not in TUNED]:
        raise ConfigError(f"the demo has no side {', '.join(unknown)}; it has {', '.join(TUNED)}")
    runs = {linear: side_config(config, linear) for linear in dict.fromkeys(sides)}
    ended = train_all(runs, out, progress=progress)
    saved = {linear: load(Path(each["checkpoint"])) for linear, each in ended.items()}
    curves = {linear: metrics.read(out / linear / "metrics.jsonl") for linear in saved}
    picture = loss_picture(curves, out / "loss.png")
    return {
        "rows": {
            linear: _row(each, saved[linear].config, curves[linear])
            for linear, each in ended.items()
        },
        "picture": None if picture is None else str(picture),
        "prompt": PROMPT,
        "sample": _sample(saved[sides[0]]),
    }


def side_config(config: RunConfig, linear: str) -> RunConfig:
    """A side's run: another parameterization, with its own rate and initial scale."""
    tuned = TUNED[linear]
    model = {"linear": linear, "init_std": tuned.init_std}
    return override(config, model=model, optimizer={"lr": tuned.lr})


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
    swept = {side: TUNED[side].seeds for side in sides if TUNED[side].seeds}
    words = ", ".join(f"{side} ({seeds} seed{'s' * (seeds > 1)})" for side, seeds in swept.items())
    left = ", ".join(side for side in sides if side not in swept)
    return "Rate and initial scale decide more than the method does. " + " ".join(
        ([f"Best of a sweep on this corpus: {words}."] if words else [])
        + ([f"The preset's, not swept: {left}."] if left else [])
    )


def short(config: RunConfig) -> RunConfig:
    """Under two minutes on two cores: 120 steps of 8 x 128 tokens a side."""
    return override(
        config,
        train={"steps": 120, "eval_every_steps": 40, "save_every_steps": 0},
        data={"sequence_length": 128, "validation_tokens": 32_768},
    )


def quick(config: RunConfig) -> RunConfig:
    """The same work in seconds, for a check that everything runs: fewer steps, a smaller model."""
    return override(
        config,
        model={"hidden_size": 64, "intermediate_size": 176, "num_layers": 3, "num_heads": 4},
        train={"steps": 30, "eval_every_steps": 15, "save_every_steps": 15},
        data={"sequence_length": 64, "validation_tokens": 20_000},
    )
