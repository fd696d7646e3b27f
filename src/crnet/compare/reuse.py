"""Runs of other studies that are this one's too: the same settings and seed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from crnet.compare.study import settings
from crnet.config.sections import RunConfig
from crnet.config.serialize import from_dict, read_json
from crnet.errors import ConfigError

ASKED = "asked.json"
"""In a study's folder: the configuration of every run, as the study had it."""


def key_of(config: RunConfig) -> str:
    """The same for runs that are one run, and for no others."""
    return repr(settings(config))


def runs_of(studies: Iterable[Path]) -> Mapping[str, list[Path]]:
    """The folders of every run that some studies asked for, by ``key_of``.

    Raises:
        ConfigError: a folder is no study's.
    """
    found: dict[str, list[Path]] = {}
    for folder in studies:
        if not (folder / ASKED).is_file():
            raise ConfigError(f"--reuse {folder}: is no folder of a study; name the --out of one")
        for name, asked in read_json(folder / ASKED).items():
            found.setdefault(key_of(from_dict(asked)), []).append(folder / name)
    return found


def take(run: Path, target: Path) -> None:
    """Copy a run's folder; whole or not at all, whenever the program is killed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    begun = target.parent / f".{target.name}"
    shutil.rmtree(begun, ignore_errors=True)
    shutil.copytree(run, begun)
    os.replace(begun, target)
