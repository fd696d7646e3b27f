"""Weights & Biases. Project, mode and account are its own settings: WANDB_PROJECT, WANDB_MODE."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from crnet.trackers import PROJECT, Place

PACKAGE = "wandb"


class Run:
    """A run in its project, ``crnet`` unless WANDB_PROJECT names another.

    Curves are drawn against ``step``, which is a figure like the others: its own counter refuses to
    go back, and after a crash a resumed run does.
    """

    def __init__(self, place: Place):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=place.identity,
            name=place.name,
            dir=place.run_dir,
            resume="allow",
        )
        self._run.define_metric("*", step_metric="step")

    def config(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log({**row, "step": step})

    def close(self) -> None:
        self._run.finish()


start = Run
