"""What a command's settings are when the command line does not give them.

Values come, in this order of precedence, from the command line, from ``--config`` files (a later
file wins), and from the preset (or, with ``--resume``, from the run itself).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from crnet.cli.arguments import DEFAULT_PRESET
from crnet.config import presets
from crnet.config.sections import (
    SECTIONS,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from crnet.config.serialize import to_dict
from crnet.config.settings_file import read_config_file
from crnet.errors import ConfigError
from crnet.train.folders import as_given, begun_config, resumed_run, tuned_from

if TYPE_CHECKING:
    from crnet.storage.checkpoint import Checkpoint

Layer = tuple[str, dict[str, Any]]
"""Where values come from, and the values by section."""


@dataclass(frozen=True, kw_only=True)
class Sections:
    """The sections of a run's configuration, each a group of flags."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()

    def of(self, preset: str) -> RunConfig:
        """The configuration of a run that starts from a preset."""
        return RunConfig(preset=preset, **{name: getattr(self, name) for name in SECTIONS})


Settings = Annotated[Sections, Parameter(name="*")]
DEFAULTS = Sections()


def refuse_sections(words: Sequence[str]) -> None:
    """Raise ``ConfigError`` for a section that is given a value, as in ``--train 5``."""
    for word in words:
        flag = word.partition("=")[0]
        if flag in [f"--{section}" for section in SECTIONS]:
            raise ConfigError(f"{flag} is a section; name one of its keys, as {flag}.KEY VALUE")


def behind(
    layers: Literal["run", "data", "checkpoint", "tuned"], arguments: Mapping[str, Any]
) -> list[Layer]:
    """What stands behind the command line, the strongest first.

    Args:
        layers: what the command declares (``arguments.Command``).
        arguments: those of the command line alone.
    Raises:
        ConfigError: a file, a preset, a run or a checkpoint cannot be used.
    """
    open_checkpoint.cache_clear()
    found = [(str(path), read_config_file(path)) for path in reversed(arguments.get("config", ()))]
    if layers == "run":
        found.append(("preset", _run_values(arguments)))
    elif "checkpoint" in arguments:
        saved = open_checkpoint(arguments["checkpoint"])
        if layers == "checkpoint":
            values = {"data": to_dict(saved.config.data)}
        else:
            values = to_dict(tuned_from(saved))
            values.pop("preset")
        found.append(("checkpoint", values))
    return found


def _run_values(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the run that goes on, else of the preset."""
    run_dir = resumed_run(arguments.get("resume", False), arguments.get("out"))
    begun = begun_config(run_dir) if run_dir else None
    if begun is not None:
        values = to_dict(as_given(begun))
    elif run_dir is None:
        values = to_dict(presets.get(arguments.get("preset") or DEFAULT_PRESET))
    else:
        return {}
    values.pop("preset")
    return values


@functools.cache
def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint, or the newest whole one of a run folder; once a command line.

    It is wanted for its settings and for its weights, and each proof that it is whole reads it all.
    """
    from crnet.storage.checkpoint import resolve

    return resolve(path)
