"""How a process ends that was one of several when an error came.

No torch, and no configuration: the command line asks it before either is read.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

_left_alone = False


def leave_alone() -> None:
    """Note that this process was in a group of processes when an error came, and did not end it:
    the others may be gone."""
    global _left_alone
    _left_alone = True


def end_process(code: int) -> NoReturn:
    """End this process with ``code``.

    After an error in a group of processes the interpreter does not end by itself: gloo's threads
    abort then now and then, and the code would be that of a signal. Open files are not written out;
    standard output and error are.
    """
    if _left_alone:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
