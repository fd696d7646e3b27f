"""TensorBoard: event files in the run's folder, ``tensorboard --logdir RUN/tensorboard``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from crnet.trackers import Place

PACKAGE = "tensorboard"


class Board:
    """Event files. Figures of steps that are done once more hide those of before."""

    def __init__(self, place: Place):
        from torch.utils.tensorboard import SummaryWriter

        purged = place.first_step or None
        self._writer = SummaryWriter(str(place.run_dir / "tensorboard"), purge_step=purged)

    def config(self, values: Mapping[str, Any]) -> None:
        self._writer.add_text("config", f"```json\n{json.dumps(values, indent=1)}\n```")

    def log(self, row: Mapping[str, float], step: int) -> None:
        for key, value in row.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


start = Board
