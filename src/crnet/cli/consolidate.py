"""``crnet consolidate``."""

from __future__ import annotations

from pathlib import Path

from crnet.cli.arguments import CheckpointPath, Command, Json, print_json
from crnet.cli.layering import open_checkpoint


def consolidate(checkpoint: CheckpointPath, /, *, out: Path, as_json: Json = False) -> None:
    """Write a checkpoint in parts as one process would have: whole weights, state and tokenizer.

    Parameters
    ----------
    out
        The new checkpoint's folder; empty, or not there.
    """
    from crnet.storage.checkpoint import consolidate as write_whole

    saved = open_checkpoint(checkpoint)
    write_whole(saved, out)
    if as_json:
        print_json({"checkpoint": str(out), "from": str(saved.folder), "step": saved.progress.step})
        return
    print(f"{out}: step {saved.progress.step}, whole, from {saved.folder}")


COMMAND = Command(consolidate)
