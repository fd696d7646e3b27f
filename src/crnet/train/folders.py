"""Which folder a run goes into, and what was begun in one. No torch."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from crnet.config.sections import DataConfig, ParallelConfig, RunConfig, TrainConfig
from crnet.config.serialize import from_dict, read_json
from crnet.errors import ConfigError

if TYPE_CHECKING:
    from crnet.storage.checkpoint import Checkpoint

RUNS = Path("crnet-runs")
"""Where runs go that were given no folder."""


def resumed_run(resume: bool | Literal["auto"], out: Path | None) -> Path | None:
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


def as_given(config: RunConfig) -> RunConfig:
    """A run's configuration without what was worked out for it, from its tokenizer and its data: it
    is worked out again where the run goes on."""
    model = dataclasses.replace(config.model, vocab_size=None)
    train = config.train
    if train.epochs is not None:
        train = dataclasses.replace(train, steps=type(train).steps)
    return dataclasses.replace(config, model=model, train=train)


def preset_of(run_dir: Path, given: str | None) -> str:
    """The preset of a run that goes on. Raises ``ConfigError`` where another one is given."""
    begun = begun_config(run_dir)
    if begun is None:  # training says so
        return given or RunConfig.preset
    if given not in (None, begun.preset):
        raise ConfigError(
            f"{run_dir}: the run began from the preset {begun.preset}, not {given}; leave the "
            "preset out, or choose another --out for a new run"
        )
    return begun.preset


def refuse_adapter(saved: Checkpoint) -> None:
    """Raise ``ConfigError`` where a run would begin with an adapter's checkpoint."""
    if saved.is_adapter:
        raise ConfigError(
            f"{saved.folder}: is an adapter, and a run begins with a whole model; go on with the "
            "adapter by crnet train --resume, or begin with the checkpoint under it"
        )


def tuned_from(saved: Checkpoint) -> RunConfig:
    """What stands behind the settings of a run that goes on from a checkpoint on another corpus.

    The checkpoint's model, optimizer and step; its tokenizer and the shape of its rows; one epoch.
    No corpus: it has to be named.

    Raises:
        ConfigError: the checkpoint is an adapter's.
    """
    refuse_adapter(saved)
    was, folder = saved.config, Path(os.path.abspath(saved.folder))
    data = DataConfig(
        source=(),
        tokenizer=str(folder),
        sequence_length=was.data.sequence_length,
        rows=was.data.rows,
        cache_dir=was.data.cache_dir,
    )
    usual = TrainConfig()
    train = dataclasses.replace(
        was.train,
        steps=usual.steps,
        epochs=1,
        stop_after_steps=None,
        init_from=folder,
        eval_every_steps=usual.eval_every_steps,
        save_every_steps=usual.save_every_steps,
    )
    return dataclasses.replace(was, data=data, train=train, parallel=ParallelConfig())


def newest_run() -> Path | None:
    """The run under ``RUNS`` that was begun last."""
    begun = sorted(RUNS.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    return begun[-1].parent if begun else None


def new_run(name: str) -> Path:
    """A free run folder under ``RUNS``; it is not made. Raises ``ConfigError`` if none is free."""
    stem = f"{name.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1000):
        folder = RUNS / (f"{stem}-{number}" if number else stem)
        if not folder.exists():
            return folder
    raise ConfigError(f"{RUNS}: no free name for a new run; give --out")
