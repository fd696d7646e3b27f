"""CR-Net beside full rank on the user's own machine: two runs, a table, a picture, a sample."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.cost.workload import workload
from crnet.errors import ConfigError
from crnet.inference.generate import complete
from crnet.inference.load import load_model, load_tokenizer
from crnet.inference.sampling import Sampling
from crnet.measure.memory import saved_bytes
from crnet.model.build import build
from crnet.report.plots import plot_losses
from crnet.storage import metrics
from crnet.storage.checkpoint import Checkpoint, load
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
    saved: dict[str, Checkpoint] = {}
    for linear in LINEARS:
        side = override(config, model={"linear": linear})
        if progress:
            print(f"training {linear} ({side.train.steps} steps)", file=sys.stderr)
        result = train.run(side, out / linear, progress=progress)
        if not result.finished:
            raise ConfigError(
                f"the demo was stopped at step {result.step} of {linear}; start it once more"
            )
        assert result.checkpoint is not None
        saved[linear] = load(result.checkpoint)
        figures["rows"][linear] = _row(result, saved[linear].config)
    curves = {linear: metrics.read(out / linear / "metrics.jsonl") for linear in LINEARS}
    plot_losses(curves, out / "loss.png")
    figures["prompt"] = PROMPT
    figures["sample"] = _sample(saved[LINEARS[0]])
    return figures


def _row(result: train.Result, config: RunConfig) -> dict[str, Any]:
    """The figures of one run; ``config`` as it was resolved."""
    assert result.before is not None
    assert result.after is not None
    return {
        "parameters": result.num_parameters,
        "perplexity_before": result.before.perplexity,
        "perplexity_after": result.after.perplexity,
        "tokens": result.tokens,
        "tokens_per_s": result.tokens_per_s,
        "saved_activation_bytes": _saved_bytes(config),
        "run": str(result.run_dir),
        "checkpoint": str(result.checkpoint),
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
        f"{'':8}{'parameters':>12}{'perplexity':>20}{'tokens/s':>10}"
        f"{'MiB of saved activations':>30}",
        f"{'':8}{'':>12}{'before':>10}{'after':>10}{'':>10}"
        + "".join(f"{policy:>10}" for policy in POLICIES),
    ]
    for linear, row in figures["rows"].items():
        lines.append(
            f"{linear:8}{row['parameters']:>12,}{row['perplexity_before']:>10,.1f}"
            f"{row['perplexity_after']:>10,.1f}{row['tokens_per_s']:>10,.0f}"
            + "".join(
                f"{row['saved_activation_bytes'][policy] / 2**20:>10,.1f}" for policy in POLICIES
            )
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
