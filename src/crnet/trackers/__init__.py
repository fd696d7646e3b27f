"""Trackers: where the figures of a run go beside ``metrics.jsonl`` (``--train.trackers``).

One file is one tracker. It declares ``PACKAGE``, what has to be installed, and ``start``, which
begins its run, or goes on with the one of before. What is written in the run's folder is whole
without any: a tracker that fails is named once and left out from then on, and training goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from crnet.errors import ConfigError

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
PROJECT = __name__.partition(".")[0]
"""To which a run belongs where the user names no other."""
IDENTITY = "tracker-id"
"""File in a run's folder: by what every tracker knows the run again."""


class Tracker(Protocol):
    """The run of one tracker."""

    def config(self, values: Mapping[str, Any]) -> None:
        """Take the run's configuration, before the first row; the latest one, where it goes on."""

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Take figures of a step. Steps grow; one whose figures came before a crash comes twice."""

    def close(self) -> None:
        """Bring what is left to where it belongs."""


@dataclass(frozen=True)
class Place:
    """The run, as a tracker has to know it."""

    run_dir: Path
    identity: str
    """Of this run and no other; the same when it goes on."""
    first_step: int
    """The first whose figures are to come. Above 0: the run goes on."""

    @property
    def name(self) -> str:
        """What a person recognises it by."""
        return f"{self.run_dir.absolute().name}-{self.identity}"


def parse(text: str | None) -> list[str]:
    """Names of trackers, ``tensorboard,wandb``. Raises ``ValueError`` where one is not known."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in NAMES]
    if unknown or len(set(names)) < len(names):
        problem = f"{unknown[0]!r} is no tracker" if unknown else "one stands there twice"
        raise ValueError(
            f"--train.trackers {text!r}: {problem}; write one or more of {', '.join(NAMES)}, with "
            "commas between them"
        )
    return names


def check_installed(names: Sequence[str]) -> None:
    """Raise ``ConfigError`` with every package that these trackers miss. None is imported."""
    packages = {name: _module(name).PACKAGE for name in names}
    missing = [name for name, package in packages.items() if not _is_there(package)]
    if missing:
        raise ConfigError(
            [
                f"--train.trackers {name} needs the {packages[name]} package: "
                "pip install 'crnet[track]'"
                for name in missing
            ]
        )


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


class Trackers:
    """The trackers of a run, none of which can stop it."""

    def __init__(self, names: Sequence[str], place: Place, config: Mapping[str, Any]):
        """Start them. ``config``: the run's, as plain values."""
        self._running: dict[str, Tracker] = {}
        for name in names:
            self._try(name, lambda name=name: self._start(name, place, config))

    def _start(self, name: str, place: Place, config: Mapping[str, Any]) -> None:
        tracker = _module(name).start(place)
        self._running[name] = tracker
        tracker.config(config)

    def log(self, row: Mapping[str, Any]) -> None:
        """Hand on the figures of a row of ``metrics.jsonl``."""
        figures = {
            key: value
            for key, value in row.items()
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if figures:
            for name, tracker in list(self._running.items()):
                self._try(name, lambda tracker=tracker: tracker.log(figures, row["step"]))

    def close(self) -> None:
        for name, tracker in list(self._running.items()):
            self._try(name, tracker.close)
        self._running.clear()

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001  whatever a tracker raises, the run is worth more
            self._running.pop(name, None)
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            print(
                f"crnet: warning: tracker {name} failed and is left out from here on ({reason}); "
                "metrics.jsonl has every figure",
                file=sys.stderr,
            )


def identity_of(run_dir: Path) -> str:
    """That of the run in a folder; made when it is first asked for."""
    file = run_dir / IDENTITY
    if not file.exists():
        file.write_text(secrets.token_hex(4) + "\n", encoding="ascii")
    return file.read_text(encoding="utf-8").strip()
