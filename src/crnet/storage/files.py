"""Files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crnet.errors import ConfigError

UNFINISHED = ".unfinished-"
"""What the name of a file or folder begins with until it is whole."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write ``path`` into a ``ConfigError`` that names it and the mend."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror or error}); free space or make it "
            "writable, then go on with --resume"
        ) from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep every other process that asks for the same out of a folder, until this one is done or
    dead; nothing is left behind. Where a file system has no locks, nobody is kept out.

    Raises:
        ConfigError: another process is there.
        OSError: there is no such folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder}: another process is training there; wait until it has ended, or choose "
                "another --out"
            ) from error
        except OSError:  # some network file systems
            pass
        yield
    finally:
        os.close(handle)


def held_by(folder: Path) -> int | None:
    """The process on this machine that keeps others out of a folder (``alone``); None: none does,
    or the system does not say. Only read: nobody is kept out by looking."""
    try:
        node = folder.stat().st_ino
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    for words in map(str.split, locks):
        # "1: FLOCK  ADVISORY  WRITE 30720 fe:00:2163749 0 EOF"; devices may go by another number.
        if len(words) > 5 and words[1] == "FLOCK" and words[5].endswith(f":{node}"):
            pid = int(words[4])
            if _has_open(pid, folder):
                return pid
    return None


def _has_open(pid: int, folder: Path) -> bool:
    """Whether a process has a folder open; where that cannot be seen, whether there is one."""
    handles = Path(f"/proc/{pid}/fd")
    try:
        return any(os.path.samefile(each, folder) for each in handles.iterdir() if each.exists())
    except PermissionError:
        return True
    except OSError:
        return False


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all, also after a power cut."""
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        unfinished.write_text(text, encoding="utf-8")
        sync(unfinished)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def is_name(word: str) -> bool:
    """Whether a word names a file of a folder, and nothing above or below it."""
    return word not in ("", ".", "..") and not {"/", "\0"} & set(word)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
