"""``crnet train``."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crnet.cli.arguments import (
    DEFAULT_PRESET,
    Command,
    ConfigFiles,
    Json,
    Resume,
    plugin_words,
    print_json,
)
from crnet.cli.layering import DEFAULTS, Settings, begun_config, new_run, resumed_run
from crnet.config.check import check
from crnet.errors import ConfigError
from crnet.parallel import launch

if TYPE_CHECKING:
    from crnet.train.run import Result


def train(
    preset: str | None = None,
    /,
    *,
    out: Path | None = None,
    resume: Resume = False,
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
        Go on from the newest whole checkpoint of --out (none: of the newest run). auto: if a run
        was begun there; else begin one.
    """
    run_dir = resumed_run(resume, out)
    goes_on = run_dir is not None
    if run_dir is not None:
        preset = _preset_of(run_dir, preset)
    else:
        preset = preset or DEFAULT_PRESET
        run_dir = out or new_run(f"{preset}-{settings.model.linear}")
    run_config = settings.of(preset)
    check(run_config)  # before torch is imported: a slip is answered at once
    if launch.starts_processes(run_config.parallel):
        named = [] if out is not None else ["--out", str(run_dir)]
        sys.exit(launch.launch([*sys.argv[1:], *named], run_config.parallel))
    if out is None and "WORLD_SIZE" in os.environ:
        raise ConfigError("--out is needed: every process would name a run folder of its own")

    from crnet.train import run as training

    result = training.run(run_config, run_dir, resume=goes_on)
    launch.note_end()
    if os.environ.get("RANK", "0") == "0":
        _show(result, as_json)


def _preset_of(run_dir: Path, given: str | None) -> str:
    """The preset of a run that goes on. Raises ``ConfigError`` where another one is given."""
    begun = begun_config(run_dir)
    if begun is None:  # training says so
        return given or DEFAULT_PRESET
    if given not in (None, begun.preset):
        raise ConfigError(
            f"{run_dir}: the run began from the preset {begun.preset}, not {given}; leave the "
            "preset out, or choose another --out for a new run"
        )
    return begun.preset


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
