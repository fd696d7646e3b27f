"""Checkpoints: whole or not at all, also after kill -9, a power cut or a full disk.

    run/checkpoints/step_N/
      model.safetensors     weights by name
      state.pt              optimizer and random states (torch.load with weights_only=True)
      checkpoint.json       step, position in the data, tokens, configuration, hashes
      tokenizer.json|.model what the caller adds, here the tokenizer
      adapter_*             in the place of the weights, where an adapter trained (``adapters``)
      .metadata, *.distcp   in the place of the weights and of the state's tensors, where processes
                            wrote the parts that they have (``parts``)
      checksums.json        size and sha256 of every file above; written last
      config.json, ...      for other programs (``Contents.beside``); in no checksum: one may edit
                            them

It is written under another name, synced to the disk file by file, and renamed; the folder is then
synced too, so that a power cut leaves the old state or the new one. Older checkpoints are removed
only afterwards. Nothing here knows a model, a tokenizer or an optimizer: names, tensors and
dictionaries come in and go out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from crnet.config.sections import RunConfig
from crnet.config.serialize import from_dict, read_json, to_dict
from crnet.errors import ConfigError
from crnet.storage import parts
from crnet.storage.files import UNFINISHED, is_name, sha256, sync, write_json

FORMAT = 1
WEIGHTS, STATE, DESCRIPTION, CHECKSUMS = (
    "model.safetensors",
    "state.pt",
    "checkpoint.json",
    "checksums.json",
)
ADAPTER = "adapter_model.safetensors"
"""In the place of the weights: the caller writes and reads it."""
IN_WEIGHTS, IN_STATE = "weights/", "state/"
"""What the names of parts begin with."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int
    """Optimizer steps done."""
    position: int
    """Sequences consumed: the data's whole state."""
    tokens: int
    """Target tokens trained on."""


@dataclass(frozen=True)
class Contents:
    """What is saved."""

    weights: Mapping[str, Tensor]
    """By name, on any device; no two share memory. None where an adapter is among ``files``."""
    state: Mapping[str, Any]
    """Tensors and numbers, in dicts and lists."""
    config: RunConfig
    progress: Progress
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else JSON can hold."""
    files: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    """By what it is, a function that writes it into an existing folder."""
    parts: Callable[[Path], None] | None = None
    """Where several processes hold the tensors: waits until all have written their parts into that
    folder. ``weights`` are empty then, and ``state`` names its tensors (``parts.PART``)."""
    beside: Callable[[Path], None] | None = None
    """Writes files that follow from the others into that folder; no checksum speaks of them."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been verified, its state perhaps apart (``load``)."""

    folder: Path
    config_dict: Mapping[str, Any]
    progress: Progress
    extra: Mapping[str, Any]
    """What the run noted beside (hashes of tokenizer, corpus and validation set)."""
    state_verified: bool = True

    @cached_property
    def config(self) -> RunConfig:
        """That of the run. Raises ``ConfigError`` where this version has not all of the keys."""
        try:
            return from_dict(self.config_dict)
        except ConfigError as error:
            raise ConfigError(
                [f"{self.folder / DESCRIPTION}: {problem}" for problem in error.problems]
            ) from error

    @property
    def in_parts(self) -> bool:
        """Whether several processes wrote the tensors, each its own."""
        return not (self.is_adapter or os.path.exists(self.folder / WEIGHTS))

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter trained, and the weights are those that the run began with."""
        return os.path.exists(self.folder / ADAPTER)

    def other_files(self) -> list[str]:
        """Names of what the run added (``Contents.files``)."""
        own = {WEIGHTS, STATE, DESCRIPTION, parts.INDEX}
        sums = read_json(self.folder / CHECKSUMS)
        return [name for name in sums if name not in own and not name.endswith(parts.PART_FILE)]

    def beside(self, folder: Path) -> None:
        """Copy the files of which no checksum speaks into a folder (``Contents.beside``)."""
        known = {CHECKSUMS, *read_json(self.folder / CHECKSUMS)}
        for path in sorted(self.folder.iterdir()):
            if path.name not in known and path.is_file():
                shutil.copy(path, folder)

    def weights(self) -> dict[str, Tensor]:
        """Every weight by name, whole, on the CPU, as it was saved; of an adapter's run none."""
        if self.is_adapter:
            return {}
        if self.in_parts:
            names = [name for name in parts.declared(self.folder) if name.startswith(IN_WEIGHTS)]
            found = parts.read(self.folder, names)
            return {name.removeprefix(IN_WEIGHTS): weight for name, weight in found.items()}
        path = self.folder / WEIGHTS
        try:
            os.fspath(path).encode()
        except UnicodeEncodeError:  # a name that is no UTF-8, which the library cannot map
            return _loaded(lambda: safetensors.torch.load(path.read_bytes()), path)
        return _loaded(lambda: safetensors.torch.load_file(path), path)

    def state(self) -> dict[str, Any]:
        """Optimizer and random states, whole, on the CPU.

        Raises:
            ConfigError: it is damaged.
        """
        found = self.state_without_parts()
        names = list(parts.named(found))
        return parts.put_in(found, parts.read(self.folder, names)) if names else found

    def state_without_parts(self) -> dict[str, Any]:
        """The same with the names of tensors that are in parts (``parts.named``)."""
        path = self.folder / STATE
        if not self.state_verified:
            _verify_file(path, read_json(self.folder / CHECKSUMS).get(STATE))
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{path}: cannot be read ({reason})") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{path}: altered (it holds a {type(found).__name__})")
        return found


def _loaded(load: Callable[[], dict[str, Tensor]], path: Path) -> dict[str, Tensor]:
    try:
        return load()
    except SafetensorError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def save(run_dir: Path, contents: Contents, keep: int, spared: int | None = None) -> Path:
    """Write ``run_dir/checkpoints/step_N`` and drop the oldest beyond ``keep`` (0: keep all), of
    which that of the step ``spared`` is none.

    Raises:
        ConfigError: the disk is full or the folder cannot be written; earlier checkpoints are
            untouched and nothing half-written stays.
    Cost: weights and state once to the disk, and once more to hash them.
    """
    target, unfinished = _places(run_dir, contents.progress.step)
    mend = (
        "Earlier checkpoints are untouched; free space or make the folder writable, then go on "
        "with --resume"
    )
    with _writing(target, unfinished, mend):
        if contents.parts is None:
            begin(run_dir, contents.progress.step)
        _write(contents, unfinished)
        _publish(unfinished, target)
    _prune(run_dir, contents.progress.step, keep, spared)
    return target


def consolidate(saved: Checkpoint, target: Path) -> None:
    """Write a checkpoint, in parts or not, as the folder that one process would have written.

    Args:
        target: a folder that is empty or not there; until all is on the disk it has another name.
    Raises:
        ConfigError: ``target`` holds something or cannot be written, or a file of ``saved`` is
            damaged. ``saved`` is only read.
    Cost: weights and state whole in memory; no other process takes part.
    """
    contents = Contents(
        weights=saved.weights(),
        state=saved.state(),
        config=saved.config,
        progress=saved.progress,
        extra=saved.extra,
        files={name: partial(_copy, saved.folder / name) for name in saved.other_files()},
        beside=saved.beside,
    )
    with new_folder(target, saved) as folder:
        _write(contents, folder)


@contextlib.contextmanager
def new_folder(target: Path, saved: Checkpoint) -> Iterator[Path]:
    """A folder to write what is made of a checkpoint in; it gets its name when all is on the disk.

    Raises:
        ConfigError: ``target`` holds something or cannot be written.
    """
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: is there already, and not an empty folder; choose another")
    target = Path(os.path.abspath(target))  # so that it has a name
    unfinished = target.with_name(UNFINISHED + target.name)
    mend = f"{saved.folder} is untouched; free space, or choose a folder that can be written"
    with _writing(target, unfinished, mend):
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        unfinished.mkdir()
        yield unfinished
        _to_disk(unfinished)
        unfinished.rename(target)  # an empty folder gives way
        sync(target.parent)


def _copy(path: Path, folder: Path) -> None:
    shutil.copy(path, folder)


@contextlib.contextmanager
def _writing(target: Path, unfinished: Path, mend: str) -> Iterator[None]:
    """Turn a failure to write a checkpoint into a ``ConfigError``; nothing half-written stays."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ConfigError(
            f"{target}: the checkpoint could not be written ({reason}). {mend}"
        ) from error


def folder_of(run_dir: Path, step: int) -> Path:
    """Where a run's checkpoint of a step is, once it is finished."""
    return run_dir / "checkpoints" / f"step_{step}"


def _places(run_dir: Path, step: int) -> tuple[Path, Path]:
    """A checkpoint's folder, and its name while it is written."""
    target = folder_of(run_dir, step)
    return target, target.with_name(f"{UNFINISHED}{target.name}")


def begin(run_dir: Path, step: int) -> Path:
    """Make the folder that a checkpoint is written in; those of killed processes are removed.

    Raises:
        OSError: it cannot be made.
    """
    _, unfinished = _places(run_dir, step)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    for leftover in unfinished.parent.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir()
    return unfinished


def _write(contents: Contents, folder: Path) -> None:
    """Every file of a checkpoint, its checksums last."""
    if contents.parts is not None:
        contents.parts(folder)
    elif contents.weights:
        write_weights(folder, contents.weights)
    _write_state(contents.state, folder / STATE)
    description = {
        "format": FORMAT,
        "step": contents.progress.step,
        "position": contents.progress.position,
        "tokens": contents.progress.tokens,
        "config": to_dict(contents.config),
        "extra": dict(contents.extra),
    }
    write_json(folder / DESCRIPTION, description)
    for name, write in contents.files.items():
        before = {*folder.iterdir()}
        write(folder)
        assert {*folder.iterdir()} > before, f"no file was written for {name}"
    sums = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
    }
    if contents.beside is not None:
        contents.beside(folder)
    write_json(folder / CHECKSUMS, sums)


def write_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights by name, as transformers reads them too."""
    whole = {name: each.detach().cpu().contiguous() for name, each in weights.items()}
    safetensors.torch.save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})


def _write_state(state: Mapping[str, Any], path: Path) -> None:
    # torch.save reports a failed write by a position in its archive; the system's reason is better.
    reason: list[OSError] = []
    with path.open("wb") as file:

        def write(content: Any) -> int:
            try:
                return file.write(content)
            except OSError as error:
                reason.append(error)
                raise

        try:
            torch.save(
                dict(state),
                SimpleNamespace(write=write, flush=file.flush),  # type: ignore[arg-type]
            )
        except RuntimeError:
            if reason:
                raise reason[0] from None
            raise


def _publish(unfinished: Path, target: Path) -> None:
    """Bring a written folder to the disk, then give it the name by which it is found."""
    _to_disk(unfinished)
    if target.exists():  # the same step saved twice: the newer copy replaces the older one
        _remove(target)
    unfinished.rename(target)
    sync(target.parent)


def _to_disk(folder: Path) -> None:
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def _prune(run_dir: Path, step: int, keep: int, spared: int | None) -> None:
    """Drop the oldest beyond ``keep``; what is newer than ``step`` was damaged and passed over on
    resume, and is not counted."""
    if keep:
        counted = (path for path in found(run_dir) if spared != _step(path) <= step)
        for old in list(counted)[keep:]:
            _remove(old)


def found(run_dir: Path) -> list[Path]:
    """Every finished checkpoint of a run, newest first, unverified."""
    root = run_dir / "checkpoints"
    if not os.path.isdir(root):
        return []
    folders = [path for path in root.iterdir() if re.fullmatch(r"step_\d+", path.name)]
    return sorted(folders, key=_step, reverse=True)


def newest(run_dir: Path, *, with_state: bool = True, below: float = inf) -> Checkpoint | None:
    """The newest whole checkpoint of a run; a damaged one is named in a warning and passed over.

    Args, with_state: ``load``. Only checkpoints of steps before ``below`` count.
    Raises:
        ConfigError: there are checkpoints and every one is damaged.
    """
    folders = [folder for folder in found(run_dir) if _step(folder) < below]
    damage = []
    for folder in folders:
        try:
            return load(folder, with_state=with_state)
        except ConfigError as error:
            damage.append(str(error))
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    if damage:
        raise ConfigError([f"{run_dir}: no whole checkpoint is left", *damage])
    return None


def resolve(path: Path) -> Checkpoint:
    """The checkpoint a user means: its folder, or a run folder (its newest whole one).

    For its weights: the optimizer's state, twice their size, is verified where it is asked for.
    """
    if os.path.exists(path / DESCRIPTION) or os.path.exists(path / CHECKSUMS):
        return load(path, with_state=False)
    checkpoint = newest(path, with_state=False)
    if checkpoint is None:
        near = "it is not there" if not os.path.exists(path) else "it holds no checkpoints/step_N"
        raise ConfigError(f"{path}: no checkpoint ({near}); name a run folder or one of its steps")
    return checkpoint


def load(folder: Path, *, with_state: bool = True) -> Checkpoint:
    """Verify a checkpoint's files against their checksums and read its description.

    Args:
        with_state: also the optimizer's state; else it may be damaged or missing, and is verified
            when it is read.
    Raises:
        ConfigError: a file is missing, truncated or altered (which, and how it differs).
    Cost: reads every file once to hash it; the only time that it is verified.
    """
    _verify(folder, with_state)
    description = read_json(folder / DESCRIPTION)
    if description.get("format") != FORMAT:
        raise ConfigError(
            f"{folder}: checkpoint format {description.get('format')}; this version reads {FORMAT}"
        )
    wanted_keys = {"config", "step", "position", "tokens", "extra"}
    if missing := sorted(wanted_keys - description.keys()):
        raise ConfigError(f"{folder / DESCRIPTION}: altered ({', '.join(missing)} missing)")
    for key in ("step", "position", "tokens"):
        if type(description[key]) is not int or not 0 <= description[key] < 2**63:
            raise ConfigError(f"{folder / DESCRIPTION}: altered ({key} is {description[key]!r})")
    if not isinstance(description["extra"], dict):
        raise ConfigError(f"{folder / DESCRIPTION}: altered (extra is {description['extra']!r})")
    return Checkpoint(
        folder=folder,
        config_dict=description["config"],
        progress=Progress(description["step"], description["position"], description["tokens"]),
        extra=description["extra"],
        state_verified=with_state,
    )


def fingerprint(folder: Path) -> str | None:
    """What tells a finished checkpoint from another one, and from one that misses a file or the
    end of one; None: it is not there. Cost: nothing is read but the checksums."""
    if not os.path.isfile(folder / CHECKSUMS):
        return None
    sizes = sorted((path.name, path.stat().st_size) for path in folder.iterdir())
    return hashlib.sha256(f"{sha256(folder / CHECKSUMS)} {sizes}".encode()).hexdigest()


def _verify(folder: Path, with_state: bool) -> None:
    sums = read_json(folder / CHECKSUMS)
    for name, wanted in sums.items():
        if not is_name(name):
            raise ConfigError(
                f"{folder / CHECKSUMS}: altered ({name!r} is not the name of a file beside it)"
            )
        if name != STATE or with_state:
            _verify_file(folder / name, wanted)
    weights = next((name for name in (parts.INDEX, ADAPTER) if name in sums), WEIGHTS)
    for name in (weights, STATE, DESCRIPTION):
        if name not in sums:
            raise ConfigError(f"{folder / CHECKSUMS}: does not speak of {name}")


def _verify_file(path: Path, wanted: Any) -> None:
    """``wanted``: what the checksums say of it."""
    if not isinstance(wanted, dict) or {"bytes", "sha256"} - wanted.keys():
        sums = path.with_name(CHECKSUMS)
        raise ConfigError(f"{sums}: altered (its entry {path.name!r} is not whole)")
    if not path.is_file():
        raise ConfigError(f"{path}: missing; the checkpoint is not whole")
    if (size := path.stat().st_size) != wanted["bytes"]:
        raise ConfigError(f"{path}: truncated ({size} bytes of {wanted['bytes']})")
    if sha256(path) != wanted["sha256"]:
        raise ConfigError(f"{path}: altered (its sha256 is not the one in {CHECKSUMS})")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _remove(folder: Path) -> None:
    # Renamed first: a removal cut short must not leave something that looks like a checkpoint.
    doomed = folder.with_name(f"{UNFINISHED}{folder.name}-old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
