"""``crnet train``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crnet.cli.arguments import (
    DEFAULT_PRESET,
    Command,
    ConfigFiles,
    Json,
    Switch,
    plugin_words,
    print_json,
)
from crnet.cli.layering import DEFAULTS, Settings, begun_config, new_run, newest_run
from crnet.config.check import check

if TYPE_CHECKING:
    from crnet.train.run import Result


def train(
    preset: str | None = None,
    /,
    *,
    out: Path | None = None,
    resume: Switch = False,
    config: ConfigFiles = (),
    as_json: Json = False,
    settings: Settings = DEFAULTS,
) -> None:
    """Train a model.

    Parameters
    ----------
    preset
        A recipe; crnet list names them. None: tiny, or with --resume that of the run.
    out
        Run folder; none: a new one under crnet-runs.
    resume
        Go on from the newest whole checkpoint of --out (none: of the newest run).
    """
    if resume:
        run_dir = out or newest_run()
        begun = begun_config(run_dir)  # None: training says so
        preset = preset or (begun.preset if begun else DEFAULT_PRESET)
    else:
        preset = preset or DEFAULT_PRESET
        run_dir = out or new_run(f"{preset}-{settings.model.linear}")
    run_config = settings.of(preset)
    check(run_config)  # before torch is imported: a slip is answered at once

    from crnet.train import run as training

    _show(training.run(run_config, run_dir, resume=resume), as_json)


def _show(result: Result, as_json: bool) -> None:
    figures: dict[str, Any] = {
        "run": str(result.run_dir),
        "finished": result.finished,
        "step": result.step,
        "tokens": result.tokens,
        "parameters": result.num_parameters,
        "tokens_per_s": result.tokens_per_s,
        "checkpoint": str(result.checkpoint),
        "val_loss": result.after.loss if result.after else None,
        "val_perplexity": result.after.perplexity if result.after else None,
    }
    if as_json:
        print_json(figures)
        return
    if not result.finished:
        words = ["crnet", "train", "--resume", "--out", str(result.run_dir), *plugin_words()]
        print(f"stopped at step {result.step}; go on with: {shlex.join(words)}")
    else:
        perplexity = f", validation perplexity {figures['val_perplexity']:.2f}"
        print(f"step {result.step}, {result.tokens:,} tokens{perplexity}")
    print(f"run folder {result.run_dir} (metrics.jsonl, loss.png), checkpoint {result.checkpoint}")


COMMAND = Command(train, layers="run")
