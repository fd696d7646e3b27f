"""Standard streams that bear whatever stands behind them.

Progress and messages are never worth a run: standard error that is closed, full or a terminal that
is gone swallows them. A result that cannot be written is told, and ends with an exit code. Text
that the terminal's encoding cannot hold is escaped, names of files keep their bytes.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Within it the streams are there and take any text; standard error never raises, standard
    output ``Unwritable``, or ``BrokenPipeError`` where its reader has seen enough."""
    _open_missing()
    was = sys.stdout, sys.stderr
    _take_any_text(sys.stdout)  # standard error does by itself
    sys.stdout, sys.stderr = _Told(was[0]), _Steady(was[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a problem has been told already
            sys.stdout.flush()
        sys.stdout, sys.stderr = was


class Unwritable(OSError):
    """Standard output cannot be written."""


def _open_missing() -> None:
    """Occupy the numbers of closed streams, or the next file that is opened would be written to."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    while nowhere <= 2:
        nowhere = os.open(os.devnull, os.O_RDWR)
    os.close(nowhere)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _take_any_text(stream: Any) -> None:
    if isinstance(stream, io.TextIOWrapper):
        # The bytes of a name that is no UTF-8 come out as they went in.
        utf8 = stream.encoding.lower().replace("-", "").replace("_", "") == "utf8"
        stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def _to_nowhere(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Stream:
    """A stream in front of another."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Told(_Stream):
    """A stream whose failures can be told from those of files; what it still holds is dropped."""

    has_no_reader = False
    """Whether ``BrokenPipeError`` was raised; some libraries make an exit code of it."""

    def write(self, text: str) -> int:
        with self._telling():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._telling():
            self._stream.flush()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _to_nowhere(self._stream)
            if isinstance(error, BrokenPipeError):
                self.has_no_reader = True
                raise
            raise Unwritable(error.strerror or str(error)) from error


class _Steady(_Stream):
    """A stream to which a failed write is no error."""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            _to_nowhere(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            _to_nowhere(self._stream)
