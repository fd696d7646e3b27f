"""``crnet export``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from crnet.cli.arguments import CheckpointPath, Command, Json, print_json
from crnet.cli.layering import open_checkpoint


def export(
    checkpoint: CheckpointPath,
    /,
    *,
    out: Path,
    to: Literal["hf", "hf-llama", "peft"] = "hf",
    as_json: Json = False,
) -> None:
    """Write a model to hand on: weights, tokenizer, configuration, card; no optimizer state.

    Parameters
    ----------
    out
        The new folder; empty, or not there.
    to
        hf: for transformers with crnet.hf, an adapter merged into the maps; hf-llama: for
        transformers alone, every map merged into a matrix, where a map is one; peft: an adapter
        apart from the weights under it.
    """
    from crnet.hub import export as exports

    saved = open_checkpoint(checkpoint)
    write = {
        "hf": exports.export,
        "hf-llama": exports.export_plain,
        "peft": exports.export_adapter,
    }
    write[to](saved, out)
    if as_json:
        print_json({"folder": str(out), "from": str(saved.folder), "to": to})
        return
    print(f"{out}: step {saved.progress.step} for {to}, from {saved.folder}")


COMMAND = Command(export)
