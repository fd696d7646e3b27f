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
from crnet.cli.layering import DEFAULTS, Settings
from crnet.config.check import check
from crnet.errors import ConfigError
from crnet.parallel import launch
from crnet.train.folders import new_run, preset_of, resumed_run

if TYPE_CHECKING:
    from crnet.config.sections import RunConfig
    from crnet.inference.evaluate import Evaluation
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
        preset = preset_of(run_dir, preset)
    else:
        preset = preset or DEFAULT_PRESET
        run_dir = out or new_run(f"{preset}-{settings.model.linear}")
    run_config = settings.of(preset)
    begin(run_config, run_dir, goes_on, as_json, is_named=out is not None)


def begin(
    run_config: RunConfig, run_dir: Path, goes_on: bool, as_json: bool, *, is_named: bool
) -> None:
    """Train in this process, or start the processes that do; print how it ended.

    ``is_named``: whether the command line names the folder.
    """
    check(run_config)  # before torch is imported: a slip is answered at once
    if launch.starts_processes(run_config.parallel):
        named = [] if is_named else ["--out", str(run_dir)]
        sys.exit(launch.launch([*sys.argv[1:], *named], run_config.parallel))
    if not is_named and "WORLD_SIZE" in os.environ:
        raise ConfigError("--out is needed: every process would name a run folder of its own")

    from crnet import api

    result = api.train(run_config, out=run_dir, resume=goes_on)
    launch.note_end()
    if os.environ.get("RANK", "0") == "0":
        _show(result, run_config, as_json)


def _evaluated(found: Evaluation | None) -> dict[str, Any]:
    """The last evaluation's figures; None, where a signal came first, in their places."""
    keys = ("val_loss", "val_perplexity", "val_bits_per_byte", "val_accuracy")
    figures = found.figures() if found else {}
    return {key: figures.get(key) for key in keys}


def _show(result: Result, config: RunConfig, as_json: bool) -> None:
    from crnet.paper import protocol
    from crnet.report.plots import NEEDS

    figures: dict[str, Any] = {
        "run": str(result.run_dir),
        "finished": result.finished,
        "step": result.step,
        "tokens": result.tokens,
        "parameters": result.num_parameters,
        "tokens_per_s": result.tokens_per_s,
        "checkpoint": str(result.checkpoint),
        **_evaluated(result.after),
        **protocol.published(config),
    }
    if as_json:
        print_json(figures)
        return
    if not result.finished:
        words = ["crnet", "train", "--resume", "--out", str(result.run_dir), *plugin_words()]
        if config.train.stop_after_steps is not None:
            words += ["--train.stop-after-steps", str(config.train.steps)]
        print(f"stopped at step {result.step}; go on with: {shlex.join(words)}")
    else:
        assert result.after is not None
        print(f"step {result.step}, {result.tokens:,} tokens, validation {result.after.words()}")
    for line in protocol.lines(config):
        print(line)
    files = [name for name in ("metrics.jsonl", "loss.png") if (result.run_dir / name).exists()]
    print(f"run folder {result.run_dir} ({', '.join(files)}), checkpoint {result.checkpoint}")
    if "loss.png" not in files:
        print(NEEDS)


COMMAND = Command(train, layers="run")
