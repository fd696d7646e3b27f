"""SIGINT, SIGTERM and SIGHUP ask a run to save and stop."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any


class Stop:
    """Set by the first signal; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.requested: str | None = None


@contextlib.contextmanager
def signals(*, say: bool = True) -> Iterator[Stop]:
    """The first SIGINT or SIGTERM asks the loop to save and stop; the second ends at once.

    SIGHUP, a terminal that is gone, is one of them unless it is ignored, as under nohup.
    ``say``: that it came, on stderr; of several processes, one does.
    """
    stop = Stop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous: dict[int, Any] = {}

    def handle(number: int, frame: object) -> None:
        for each in numbers:  # first of all: a second signal may come while the first is answered
            signal.signal(each, signal.SIG_DFL)
        stop.requested = signal.Signals(number).name
        if not say:
            return
        message = f"\n{stop.requested}: saving after this step; once more ends at once"
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of another message
            print(message, file=sys.stderr)

    try:
        for number in numbers:
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: whoever runs us there handles signals
        pass
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
