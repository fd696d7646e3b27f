"""``crnet finetune``."""

from __future__ import annotations

from pathlib import Path

from crnet.cli.arguments import CheckpointPath, Command, ConfigFiles, Json
from crnet.cli.layering import DEFAULTS, Settings, open_checkpoint
from crnet.cli.train import begin
from crnet.train.folders import new_run


def finetune(
    checkpoint: CheckpointPath,
    /,
    *,
    out: Path | None = None,
    config: ConfigFiles = (),
    as_json: Json = False,
    settings: Settings = DEFAULTS,
) -> None:
    """Go on from a checkpoint on another corpus: its model and tokenizer, a new optimizer.

    What is not said is as in the checkpoint's run, but for one epoch. A run that was interrupted
    goes on by crnet train --resume --out.

    Parameters
    ----------
    out
        Run folder; none: a new one under crnet-runs.
    """
    was = open_checkpoint(checkpoint).config
    run_config = settings.of(was.preset)
    run_dir = out or new_run(f"{was.preset}-{run_config.model.linear}-finetuned")
    begin(run_config, run_dir, False, as_json, is_named=out is not None)


COMMAND = Command(finetune, layers="tuned")
