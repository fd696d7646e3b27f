"""What a command's settings are when the command line does not give them.

Values come, in this order of precedence, from the command line, from ``--config`` files (a later
file wins), and from the preset (or, with ``--resume``, from the run itself).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from crnet.cli.arguments import DEFAULT_PRESET, Resume
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
from crnet.config.serialize import from_dict, read_json, to_dict
from crnet.config.settings_file import read_config_file
from crnet.errors import ConfigError

if TYPE_CHECKING:
    from crnet.storage.checkpoint import Checkpoint

RUNS = Path("crnet-runs")
"""Where runs go that were given no ``--out``."""

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
    layers: Literal["run", "data", "checkpoint"], arguments: Mapping[str, Any]
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
    elif layers == "checkpoint" and "checkpoint" in arguments:
        data = to_dict(open_checkpoint(arguments["checkpoint"]).config.data)
        found.append(("checkpoint", {"data": data}))
    return found


def _run_values(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the run that goes on, else of the preset."""
    run_dir = resumed_run(arguments.get("resume", False), arguments.get("out"))
    begun = begun_config(run_dir) if run_dir else None
    if begun is not None:
        values = to_dict(begun)
        values["model"].pop("vocab_size")  # resolved again, from the same tokenizer
    elif run_dir is None:
        values = to_dict(presets.get(arguments.get("preset") or DEFAULT_PRESET))
    else:
        return {}
    values.pop("preset")
    return values


def resumed_run(resume: Resume, out: Path | None) -> Path | None:
    """The folder of the run that goes on; None where a new one begins.

    Args:
        resume: what ``--resume`` says. True: a run goes on; auto: if there is one.
        out: ``--out``; None: the newest run.
    Raises:
        ConfigError: a run is to go on, none is named, and there is none.
    """
    if not resume:
        return None
    if out is None:
        found = newest_run()
        if found is None and resume != "auto":
            raise ConfigError(f"--resume: there is no run under {RUNS}; name one with --out")
        return found
    return out if resume != "auto" or os.path.exists(out / "run.json") else None


@functools.cache
def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint, or the newest whole one of a run folder; once a command line.

    It is wanted for its settings and for its weights, and each proof that it is whole reads it all.
    """
    from crnet.storage.checkpoint import resolve

    return resolve(path)


def begun_config(run_dir: Path) -> RunConfig | None:
    """The configuration of a run that was begun in a folder; None where none was.

    Raises:
        ConfigError: its ``run.json`` cannot be used.
    """
    path = run_dir / "run.json"
    if not os.path.exists(path):
        return None
    manifest = read_json(path)
    if not isinstance(manifest.get("config"), dict):
        raise ConfigError(f"{path}: altered (it holds no configuration); start a new run")
    try:
        return from_dict(manifest["config"])
    except ConfigError as error:
        made_by = manifest.get("crnet", "unknown")
        problems = [f"{path}: {problem}" for problem in error.problems]
        mend = (
            f"{path}: was written by crnet {made_by}; go on with that version, or start a new run"
        )
        raise ConfigError([*problems, mend]) from error


def newest_run() -> Path | None:
    """The run under ``RUNS`` that was begun last."""
    begun = sorted(RUNS.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    return begun[-1].parent if begun else None


def new_run(name: str) -> Path:
    """A free run folder under ``RUNS``; it is not made. Raises ``ConfigError`` if none is free."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1000):
        folder = RUNS / (f"{stem}-{number}" if number else stem)
        if not folder.exists():
            return folder
    raise ConfigError(f"{RUNS}: no free name for a new run; give --out")
