"""What the process needs around it for torch to be quick on few cores.

Two defaults cost a step much of its time there, and neither can be set once torch runs:

- Threads that wait by spinning. GNU's OpenMP lets a thread that waits for the others turn on its
  core. As soon as another program wants that core, the threads wait for each other's turns.
  ``OMP_WAIT_POLICY=PASSIVE`` lets them sleep.
- Memory that goes back to the system after every large tensor and comes again page by page.
  ``GLIBC_TUNABLES`` lets malloc keep it, in huge pages. It is read before a program's first line:
  the same command is executed once more in its place (``execve``), in the same process.

A variable that the user has set stays, and so does everything where cores are many: many sleepers
take long to wake, and there a spinning thread disturbs nobody. No number changes, only its time.
``--no-tune-process`` or ``CRNET_TUNE_PROCESS=0`` leaves the environment as it is; what was set is
in ``run.json``. Only programs do this, ``crnet`` and those that measure steps: nothing happens to
who imports the package.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from crnet.errors import ConfigError
from crnet.parallel.cores import num_cores

COMMANDS = {"train", "finetune", "demo", "profile", "evaluate", "generate"}
"""Those that compute for long, or measure."""
FLAG = "--no-tune-process"
SWITCH = "CRNET_TUNE_PROCESS"
MARK = "CRNET_TUNED"
"""Lists the variables that were set here, for ``run.json`` and for programs that are started."""

MOST_CORES = 8
MALLOC = (
    "glibc.malloc.hugetlb=1:"  # ask for huge pages, where the kernel gives them on request
    "glibc.malloc.mmap_max=0:"  # large blocks from the heap too, so that they are used again
    "glibc.malloc.trim_threshold=17179869184"  # 16 GiB free at its top before any goes back
)
FIRST_GLIBC = (2, 35)
"""The release that knows ``glibc.malloc.hugetlb``."""

_EXECUTED = "crnet_executed"
"""A -X option of the second execution. Whatever became of the environment, there is no third."""


def take_flag(words: Sequence[str]) -> list[str]:
    """The words without ``--no-tune-process``, where the command is one that it speaks to."""
    if _command(words) is None:
        return list(words)
    end = words.index("--") if "--" in words else len(words)
    return [word for idx, word in enumerate(words) if idx >= end or word != FLAG]


def tune(words: Sequence[str]) -> None:
    """Set what is missing in the environment, for the program that runs these words.

    Executes the program once more where malloc is among it; then this does not return.

    Raises:
        ConfigError: ``CRNET_TUNE_PROCESS`` is neither 0 nor 1.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ConfigError(f"{SWITCH} is {switch!r}; it must be 0 or 1")
    if switch == "0" or FLAG in words or _command(words) is None or not _is_program():
        return
    as_trained()


def as_trained() -> None:
    """The same for a program that measures what training takes; call it before torch is imported.

    Executes the program once more where malloc is among what is missing; then this does not return.
    """
    added = missing(os.environ, sys.platform, glibc(), num_cores())
    if "GLIBC_TUNABLES" in added:
        if _EXECUTED not in sys._xoptions:
            _execute_again(os.environ | _marked(added))
        del added["GLIBC_TUNABLES"]  # too late for malloc; OpenMP asks when torch is imported
    os.environ.update(_marked(added))


def _marked(added: Mapping[str, str]) -> dict[str, str]:
    """The variables, and their names beside those that were set before."""
    before = filter(None, os.environ.get(MARK, "").split(","))
    return {**added, MARK: ",".join([*before, *added])} if added else {}


def missing(
    environ: Mapping[str, str], platform: str, libc: tuple[int, ...], cores: int
) -> dict[str, str]:
    """The variables to set beside those that are set.

    Args:
        platform: ``sys.platform``.
        libc: release of glibc; empty: another C library.
        cores: what this process may use.
    """
    found: dict[str, str] = {}
    if cores > MOST_CORES:
        return found
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(environ):
        found["OMP_WAIT_POLICY"] = "PASSIVE"
    own = "GLIBC_TUNABLES" in environ or any(name.startswith("MALLOC_") for name in environ)
    # LD_PRELOAD is where another malloc comes from.
    if platform == "linux" and libc >= FIRST_GLIBC and not own and "LD_PRELOAD" not in environ:
        found["GLIBC_TUNABLES"] = MALLOC
    return found


def glibc() -> tuple[int, ...]:
    """Release of the C library, where it is glibc; else empty."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        name, _, release = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        if name == "glibc":
            return tuple(int(part) for part in release.split("."))
    return ()


def _command(words: Sequence[str]) -> str | None:
    """The command, if it is one of ``COMMANDS`` and is not only asked for its help."""
    if {"--help", "-h"} & set(words):
        return None
    left = iter(words)
    for word in left:
        if word == "--plugins":
            next(left, None)
        elif not word.startswith("-"):
            return word if word in COMMANDS else None
    return None


def _is_program() -> bool:
    """Whether this process was started as ``crnet`` or ``python -m crnet``."""
    program = Path(sys.argv[0])
    as_module = program.name == "__main__.py" and program.parent.name == "crnet"
    started = as_module or program.name == "crnet"
    return started and bool(sys.executable) and "torch" not in sys.modules


def _execute_again(environ: Mapping[str, str]) -> None:
    """The same command, with the interpreter's own options, in this process; returns where the
    system refuses: then the program runs as it is, slower, with the same numbers."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    # Not orig_argv[0]: from a bare "python" another interpreter could find its own libraries.
    words = [sys.executable, "-X", _EXECUTED, *sys.orig_argv[1:]]
    with contextlib.suppress(OSError):
        os.execve(sys.executable, words, environ)
