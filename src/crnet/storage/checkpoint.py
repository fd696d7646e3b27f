"""Checkpoints: a folder that is there whole or not at all, and is proved whole before it is used.

    checkpoints/step_400/
      model.safetensors     weights under Hugging Face style names
      state.pt              optimizer and random states, loadable with weights_only=True
      checkpoint.json       step, position in the data, tokens, configuration, hashes
      tokenizer.json|.model the tokenizer itself
      checksums.json        size and sha256 of every file above; written last

It is written under another name, synced to the disk file by file, and renamed; the folder is then
synced too, so that a power cut leaves the old state or the new one. Older checkpoints are removed
only afterwards.
"""

from __future__ import annotations

import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from crnet.config.sections import RunConfig
from crnet.config.serialize import from_dict, read_json, to_dict
from crnet.data.tokenizer import Tokenizer, load_saved
from crnet.errors import ConfigError
from crnet.model.backbone import LanguageModel, build
from crnet.storage.files import UNFINISHED, sha256, sync, write_json

FORMAT = 1
WEIGHTS, STATE, DESCRIPTION, CHECKSUMS = (
    "model.safetensors",
    "state.pt",
    "checkpoint.json",
    "checksums.json",
)


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
class Checkpoint:
    """A checkpoint that has been verified."""

    folder: Path
    config: RunConfig
    progress: Progress
    extra: dict[str, Any]
    """What the run noted beside (hashes of tokenizer and validation set)."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the run was trained with."""
        return load_saved(self.folder)

    def weights(self) -> dict[str, Tensor]:
        """Every weight by name, on the CPU, in the dtype it was saved in."""
        try:
            return safetensors.torch.load_file(self.folder / WEIGHTS)
        except SafetensorError as error:
            raise ConfigError(f"{self.folder / WEIGHTS}: cannot be read ({error})") from error

    def state(self) -> dict[str, Any]:
        """Optimizer and random states."""
        return torch.load(self.folder / STATE, map_location="cpu", weights_only=True)

    def model(self, device: torch.device | str = "cpu") -> LanguageModel:
        """Build the model with its weights, in the dtype they were saved in."""
        weights = self.weights()
        model = build(self.config.model, self.config.train.seed, device)
        model.to(next(iter(weights.values())).dtype)
        load_weights(model, weights)
        return model


def load_weights(model: LanguageModel, weights: dict[str, Tensor]) -> None:
    """Copy weights into a model by name; a missing or unknown name is an error that lists them."""
    weights = dict(weights)
    if model.config.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)


def save(
    run_dir: Path,
    *,
    model: LanguageModel,
    state: dict[str, Any],
    config: RunConfig,
    progress: Progress,
    tokenizer: Tokenizer,
    extra: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``run_dir/checkpoints/step_N`` and drop the oldest beyond ``keep`` (0: keep all).

    Raises:
        ConfigError: the disk is full or the folder cannot be written; earlier checkpoints are
            untouched and nothing half-written stays.
    Cost: weights and state once to the disk, and once more to hash them.
    """
    root = run_dir / "checkpoints"
    target = root / f"step_{progress.step}"
    unfinished = root / f"{UNFINISHED}{target.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{UNFINISHED}*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir()
        weights = {  # a tied head is listed once, as the embedding
            name: tensor.detach().cpu().contiguous() for name, tensor in model.named_parameters()
        }
        safetensors.torch.save_file(weights, unfinished / WEIGHTS, metadata={"format": "pt"})
        _save_state(state, unfinished / STATE)
        description = {
            "format": FORMAT,
            "step": progress.step,
            "position": progress.position,
            "tokens": progress.tokens,
            "config": to_dict(config),
            "extra": extra,
        }
        write_json(unfinished / DESCRIPTION, description)
        tokenizer.save(unfinished)
        sums = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(unfinished.iterdir())
        }
        write_json(unfinished / CHECKSUMS, sums)
        for path in unfinished.iterdir():
            sync(path)
        sync(unfinished)
        if target.exists():  # the same step saved twice: the newer copy replaces the older one
            _remove(target)
        unfinished.rename(target)
        sync(root)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ConfigError(
            f"{target}: the checkpoint could not be written ({reason}). Earlier checkpoints are "
            "untouched; free space or make the folder writable, then go on with --resume"
        ) from error
    if keep:
        # What is newer than this one was damaged and passed over on resume; it is not counted.
        older = [path for path in found(run_dir) if _step(path) <= progress.step]
        for old in older[keep:]:
            _remove(old)
    return target


def _save_state(state: dict[str, Any], path: Path) -> None:
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
            torch.save(state, SimpleNamespace(write=write, flush=file.flush))  # type: ignore[arg-type]
        except RuntimeError:
            if reason:
                raise reason[0] from None
            raise


def found(run_dir: Path) -> list[Path]:
    """Every finished checkpoint of a run, newest first, unverified."""
    root = run_dir / "checkpoints"
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if re.fullmatch(r"step_\d+", path.name)]
    return sorted(folders, key=_step, reverse=True)


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run; a damaged one is named in a warning and passed over.

    Raises:
        ConfigError: there are checkpoints and every one is damaged.
    """
    folders = found(run_dir)
    damage = []
    for folder in folders:
        try:
            return load(folder)
        except ConfigError as error:
            damage.append(str(error))
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    if damage:
        raise ConfigError([f"{run_dir}: no whole checkpoint is left", *damage])
    return None


def resolve(path: Path) -> Checkpoint:
    """The checkpoint a user means: its folder, or a run folder (its newest whole one)."""
    if (path / DESCRIPTION).exists() or (path / CHECKSUMS).exists():
        return load(path)
    checkpoint = newest(path)
    if checkpoint is None:
        near = "it is not there" if not path.exists() else "it holds no checkpoints/step_N"
        raise ConfigError(f"{path}: no checkpoint ({near}); name a run folder or one of its steps")
    return checkpoint


def load(folder: Path) -> Checkpoint:
    """Verify a checkpoint's files against their checksums and read its description.

    Raises:
        ConfigError: a file is missing, truncated or altered (which, and how it differs).
    """
    sums = read_json(folder / CHECKSUMS)
    for name, wanted in sums.items():
        if not isinstance(wanted, dict) or {"bytes", "sha256"} - wanted.keys():
            raise ConfigError(f"{folder / CHECKSUMS}: altered (its entry {name!r} is not whole)")
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"{path}: missing; the checkpoint is not whole")
        if (size := path.stat().st_size) != wanted["bytes"]:
            raise ConfigError(f"{path}: truncated ({size} bytes of {wanted['bytes']})")
        if sha256(path) != wanted["sha256"]:
            raise ConfigError(f"{path}: altered (its sha256 is not the one in {CHECKSUMS})")
    for name in (WEIGHTS, STATE, DESCRIPTION):
        if name not in sums:
            raise ConfigError(f"{folder / CHECKSUMS}: does not speak of {name}")
    description = read_json(folder / DESCRIPTION)
    if description.get("format") != FORMAT:
        raise ConfigError(
            f"{folder}: checkpoint format {description.get('format')}; this version reads {FORMAT}"
        )
    wanted_keys = {"config", "step", "position", "tokens", "extra"}
    if missing := sorted(wanted_keys - description.keys()):
        raise ConfigError(f"{folder / DESCRIPTION}: altered ({', '.join(missing)} missing)")
    return Checkpoint(
        folder=folder,
        config=from_dict(description["config"]),
        progress=Progress(description["step"], description["position"], description["tokens"]),
        extra=description["extra"],
    )


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _remove(folder: Path) -> None:
    # Renamed first: a removal cut short must not leave something that looks like a checkpoint.
    doomed = folder.with_name(f"{UNFINISHED}{folder.name}-old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
