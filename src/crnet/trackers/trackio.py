"""Trackio: a local database, ``trackio show``; TRACKIO_DIR and TRACKIO_SPACE_ID are its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from crnet.trackers import PROJECT, Place

PACKAGE = "trackio"


class Run:
    """A run of the project ``crnet``, or of the one that TRACKIO_PROJECT names."""

    def __init__(self, place: Place):
        self._place = place
        self._run: Any = None

    def config(self, values: Mapping[str, Any]) -> None:
        import trackio

        self._run = trackio.init(  # it takes the configuration here alone
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self._place.name,
            config=dict(values),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        self._run.finish()


start = Run
