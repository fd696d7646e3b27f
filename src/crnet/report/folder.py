"""A run's folder, read for whoever looks at it: from files alone, while the run may go on. No
torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crnet.config.sections import RunConfig
from crnet.config.serialize import from_dict, read_json
from crnet.errors import ConfigError
from crnet.storage.metrics import Row

MANIFEST = "run.json"
"""``storage.manifest.MANIFEST``, whose module imports torch."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What is there."""

    folder: Path
    config: RunConfig
    rows: list[Row]
    problems: list[str]
    """What is damaged, one sentence each."""
    pid: int | None
    """Of the process on this machine that trains it."""

    @property
    def training(self) -> list[Row]:
        return [row for row in self.rows if "loss" in row]

    @property
    def validation(self) -> list[Row]:
        return [row for row in self.rows if "val_loss" in row]

    @property
    def step(self) -> int:
        """The last that anything is written of."""
        return max((row["step"] for row in self.rows), default=0)


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of the run in a folder. Raises ``ConfigError`` where there is none."""
    path = folder / MANIFEST
    if not path.exists():
        raise ConfigError(f"{folder}: is no run's folder, there is no {MANIFEST} in it; name one")
    return read_json(path)


def config_of(folder: Path, manifest: dict[str, Any]) -> RunConfig:
    """The configuration in a manifest. Raises ``ConfigError`` where it cannot be used."""
    try:
        return from_dict(manifest.get("config", {}))
    except ConfigError as error:
        raise named(folder, error) from error


def named(folder: Path, error: ConfigError) -> ConfigError:
    """The same problems, of the manifest in a folder."""
    return ConfigError([f"{folder / MANIFEST}: {problem}" for problem in error.problems])
