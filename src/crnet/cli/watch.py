"""``crnet watch``."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from crnet.cli.arguments import Command, Switch
from crnet.errors import ConfigError


def watch(
    run: Annotated[Path, Parameter(help="A run's folder.")],
    /,
    *,
    every_s: float = 2.0,
    once: Switch = False,
) -> None:
    """Show how a run stands, again and again until it ends. Its files are only read.

    Parameters
    ----------
    every_s
        Seconds between two looks.
    once
        Show it once; so it is where standard output is no terminal.
    """
    if not 0.1 <= every_s <= 3600:
        raise ConfigError(f"--every-s is {every_s}; it must be between 0.1 and 3600")
    from crnet.report.watch import coloured, frame, look, plain

    is_terminal = sys.stdout.isatty()
    paint = coloured if is_terminal and not os.environ.get("NO_COLOR") else plain
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    shown, pid = 0, None
    while True:
        state = look(run)
        width = shutil.get_terminal_size().columns
        text = frame(state, width, paint, ascii_only=ascii_only)
        if shown:
            print(f"\033[{shown}F\033[J", end="")  # over the one before
        print(text, flush=True)
        shown = text.count("\n") + 1
        was_here, pid = pid is not None, state.pid
        if once or not is_terminal or state.has_ended or (was_here and pid is None):
            return
        time.sleep(every_s)


COMMAND = Command(watch)
