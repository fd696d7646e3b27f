"""CR-Net beside full rank on the user's own machine: two runs, a table, a picture, a sample."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.cost import activations as cost
from crnet.errors import ConfigError
from crnet.inference import generate
from crnet.inference.sampling import Sampling
from crnet.measure.memory import saved_bytes
from crnet.model.backbone import build
from crnet.recompute.engine import Recomputation
from crnet.report.loss_plot import plot_losses
from crnet.storage import metrics
from crnet.storage.checkpoint import load
from crnet.train import run as train

LINEARS = ("crnet", "full")
POLICIES = ("none", "block", "replay")
"""Of ``--train.recompute``: what would be kept under each, whichever the runs were made with."""
PROMPT = "def read_file(path):\n"


def run(config: RunConfig, out: Path, *, progress: bool = True) -> dict[str, Any]:
    """Train each of ``LINEARS`` with everything else equal; return the figures of the table.

    Cost: two training runs. The folders ``out/crnet`` and ``out/full`` are ordinary runs.
    """
    figures: dict[str, Any] = {"rows": {}, "picture": str(out / "loss.png")}
    for linear in LINEARS:
        its = override(config, model={"linear": linear})
        if progress:
            print(f"training {linear} ({its.train.steps} steps)", file=sys.stderr)
        result = train.run(its, out / linear, progress=progress)
        if not result.finished:
            raise ConfigError(
                f"the demo was stopped at step {result.step} of {linear}; start it again"
            )
        assert result.before is not None
        assert result.after is not None
        assert result.checkpoint is not None
        figures["rows"][linear] = {
            "parameters": result.num_parameters,
            "perplexity_before": result.before.perplexity,
            "perplexity_after": result.after.perplexity,
            "tokens": result.tokens,
            "tokens_per_s": result.tokens_per_s,
            "saved_activation_bytes": {
                policy: _saved_bytes(result.checkpoint, policy) for policy in POLICIES
            },
            "run": str(result.run_dir),
            "checkpoint": str(result.checkpoint),
        }
    curves = {linear: metrics.read(out / linear / "metrics.jsonl") for linear in figures["rows"]}
    plot_losses(curves, out / "loss.png")
    figures["prompt"] = PROMPT
    figures["sample"] = _sample(Path(figures["rows"]["crnet"]["checkpoint"]))
    return figures


def _saved_bytes(folder: Path, recompute: str) -> int:
    config = override(load(folder).config, train={"recompute": recompute})
    model = build(config.model, seed=0)
    model.model.recomputation = Recomputation(cost.plan(config))
    rows = config.train.micro_batch_size or config.train.batch_size
    tokens = torch.zeros(rows, config.data.sequence_length, dtype=torch.int64)
    return saved_bytes(model, tokens, tokens)


def _sample(folder: Path) -> str:
    saved = load(folder)
    sampling = Sampling(max_tokens=120, temperature=0.8, top_p=0.95, seed=1)
    return "".join(generate.complete(saved.model(), saved.tokenizer(), PROMPT, sampling))


def table(figures: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{'':8}{'parameters':>12}{'perplexity':>20}{'tokens/s':>10}"
        f"{'MiB of saved activations':>30}",
        f"{'':8}{'':>12}{'before':>10}{'after':>10}{'':>10}"
        + "".join(f"{policy:>10}" for policy in POLICIES),
    ]
    for linear, row in figures["rows"].items():
        lines.append(
            f"{linear:8}{row['parameters']:>12,}{row['perplexity_before']:>10,.1f}"
            f"{row['perplexity_after']:>10,.1f}{row['tokens_per_s']:>10,.0f}"
            + "".join(f"{row['saved_activation_bytes'][it] / 2**20:>10,.1f}" for it in POLICIES)
        )
    return "\n".join(lines)


def quick(config: RunConfig) -> RunConfig:
    """The same work in seconds, for a check that everything runs: fewer steps, a smaller model."""
    return override(
        config,
        model={"hidden_size": 64, "intermediate_size": 176, "num_layers": 3, "num_heads": 4},
        train={"steps": 30, "eval_every_steps": 15, "save_every_steps": 15},
        data={"sequence_length": 64, "validation_tokens": 20_000},
    )
