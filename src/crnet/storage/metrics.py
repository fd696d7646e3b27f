"""metrics.jsonl, and its rows on their way to trackers.

A row is one JSON object: a training row has ``step``, ``tokens``, ``loss``, ``lr``, ``grad_norm``,
``tokens_per_s`` and ``peak_bytes``, the most that a process has held so far; an evaluation row has
``step``, ``val_precision`` and the figures of ``inference.evaluate.Evaluation.figures``;
``invert_also_keeps`` is what the guard of recompute invert keeps from that step on.
A figure that is not finite is null, and nan where it is read again.
The file is the only source of plots and reports; nothing is read back from a log.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from crnet.config.serialize import parse_json, to_json
from crnet.errors import ConfigError
from crnet.storage.files import write_atomically
from crnet.trackers import Trackers

Row = dict[str, Any]

METRICS = "metrics.jsonl"


class Metrics:
    """Appends rows to ``metrics.jsonl``; ``sync`` makes them durable before a checkpoint."""

    def __init__(
        self,
        run_dir: Path,
        *,
        upto_step: int | None = None,
        trackers: Callable[[], Trackers | None] | None = None,
        writes: bool = True,
    ):
        """Open the file for appending.

        Args:
            run_dir: the run's folder.
            upto_step: resuming: rows of later steps, and a half-written last line, are dropped.
                None: a new file.
            trackers: starts those that get every row too; None: there are none.
            writes: False: nothing is written, of several processes another one does.
        """
        self.path = run_dir / METRICS
        kept = [] if upto_step is None else [r for r in read(self.path) if r["step"] <= upto_step]
        self.rows_before = kept
        self._file: IO[str] | None = None
        self._trackers: Trackers | None = None
        if not writes:
            return
        write_atomically(self.path, "".join(to_json(row) + "\n" for row in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._trackers = trackers() if trackers is not None else None

    def write(self, row: Row) -> None:
        """Append one row."""
        if self._file is None:
            return
        self._file.write(to_json(row) + "\n")
        self._file.flush()
        if self._trackers is not None:
            self._trackers.log(row)

    def sync(self) -> None:
        """Bring every row to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written was reported by write
                self._file.close()
        if self._trackers is not None:
            self._trackers.close()


def read(path: Path) -> list[Row]:
    """Every whole row of a metrics file, without a cut-off last line; none without a file.

    Raises:
        ConfigError: another line is no row (which one).
    """
    rows, problems = rows_and_damage(path)
    if problems:
        raise ConfigError(f"{problems[0]}; take the line out")
    return rows


def rows_and_damage(path: Path) -> tuple[list[Row], list[str]]:
    """The same of a file that may be damaged: its rows, and a sentence for every other line.

    Raises:
        ConfigError: it cannot be read.
    """
    if not os.path.exists(path):
        return [], []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    rows, problems = [], []
    *whole, cut_off = content.split(b"\n")
    lines = [*whole, cut_off] if cut_off else whole
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(line))
        except ValueError as error:
            if number <= len(whole):
                problems.append(f"{path}, line {number}: is no row of figures ({error})")
    return rows, problems


def _row(line: bytes) -> Row:
    """A line's row. Raises ``ValueError`` where it is none."""
    row = parse_json(line)
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError("it has no step")
    if "val_loss" in row and "val_tokens" not in row:
        raise ValueError("it has a val_loss and no val_tokens")
    row = {key: math.nan if value is None else value for key, value in row.items()}
    for key in ("loss", "val_loss", "val_tokens", "val_bytes", "val_accuracy", "tokens"):
        if not isinstance(row.get(key, 0), (int, float)):
            raise ValueError(f"{key} is {row[key]!r}")
    return row
