"""Going on with a run: what must be as it was, and the states that come back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crnet import optimizers
from crnet.config.sections import SECTIONS, RunConfig, stays_on_resume
from crnet.config.serialize import read_json, to_dict
from crnet.errors import ConfigError
from crnet.model.language_model import LanguageModel
from crnet.storage.checkpoint import Checkpoint
from crnet.storage.manifest import MANIFEST
from crnet.train.full_state import (
    full_optimizer_state,
    full_weights,
    is_distributed,
    load_full_optimizer_state,
)


def check_folder(run_dir: Path, resume: bool) -> None:
    """Raise ``ConfigError`` where a run cannot begin, or not go on, in a folder."""
    begun = os.path.exists(run_dir / MANIFEST)  # no where a folder may not be entered
    if begun and not resume:
        raise ConfigError(
            f"{run_dir}: a run is there already; go on with --resume, or choose another --out"
        )
    if resume and not begun:
        raise ConfigError(f"{run_dir}: nothing to resume, there is no {MANIFEST} in it")
    # Nothing is made before the corpus is known to be good; but learn now what would fail then.
    above = (run_dir, *run_dir.absolute().parents)
    nearest = next(path for path in above if os.path.exists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "is not a folder" if not nearest.is_dir() else "cannot be written"
        raise ConfigError(f"{run_dir}: {nearest} {reason}; choose another --out")


def check_plugins(run_dir: Path) -> None:
    """Raise ``ConfigError`` where a plugin of the run is missing or another than it was.

    One that the run did not have is no matter: the methods in use are those of before.
    """
    from crnet.registry import plugins

    loaded = {plugin.name: plugin for plugin in plugins()}
    problems = []
    begun_with = read_json(run_dir / MANIFEST).get("plugins", [])
    if not isinstance(begun_with, list) or not all(
        isinstance(each, dict) and {"name", "sha256"} <= each.keys() for each in begun_with
    ):
        raise ConfigError(f"{run_dir / MANIFEST}: altered (plugins is no list of names and hashes)")
    for was in begun_with:
        now = loaded.get(was["name"])
        if now is None:
            problems.append(
                f"the plugin {was['name']} (sha256 {was['sha256']}), with which this run began, is "
                "not loaded; give its file with --plugins"
            )
        elif now.sha256 != was["sha256"]:
            problems.append(
                f"{now.path}: the plugin {now.name} is not the one this run began with (sha256 was "
                f"{was['sha256']}, is now {now.sha256}); restore it, or start a new run"
            )
    if problems:
        raise ConfigError(problems)


def check_same_run(saved: Checkpoint, config: RunConfig, hashes: Mapping[str, str]) -> None:
    """Raise ``ConfigError`` with every key, and every input, that a resumed run has otherwise than
    it began.

    Args:
        config: resolved.
        hashes: of the inputs; those under tokenizer and corpus are compared.
    """
    problems = []
    old, new = to_dict(saved.config), to_dict(config)
    for section in SECTIONS:
        for key in old[section]:
            if stays_on_resume(section, key):
                for flag, was, now in _changes(key, old[section][key], new[section][key]):
                    problems.append(
                        f"--{section}.{flag} was {was!r} and is now {now!r}; a resumed run keeps it"
                    )
    for what in ("tokenizer", "corpus"):
        if not problems and hashes[what] != saved.extra.get(what):
            problems.append(
                f"the {what} is not the one this run began with (was {saved.extra.get(what)}, is "
                f"now {hashes[what]}); restore it, or start a new run"
            )
    if problems:
        raise ConfigError(problems)


def _changes(key: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """(words of the flag, old value, new value) of a key; of a method's options, one by one."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in was:
            for flag, *values in _changes(name, was[name], now[name]):
                yield f"{key.replace('_', '-')}.{flag}", *values
    elif was != now:
        yield key.replace("_", "-"), was, now


def all_weights(model: LanguageModel) -> dict[str, Tensor]:
    """Every weight whole, by name; a tied head is listed once, as the embedding.

    Split over ranks: on the CPU of rank 0, and nothing on other ranks.
    """
    return full_weights(model) if is_distributed() else dict(model.named_parameters())


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Optimizer and random states, as tensors and numbers (``torch.load(weights_only=True)``)."""
    found = full_optimizer_state(optimizer) if is_distributed() else optimizer.state_dict()
    state: dict[str, Any] = {"optimizer": found, "torch_rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state_all()
    return state


def restore(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], device: torch.device
) -> None:
    """Inverse of ``snapshot``."""
    load = load_full_optimizer_state if is_distributed() else optimizers.load_state
    load(optimizer, state["optimizer"])
    torch.set_rng_state(state["torch_rng"])
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
