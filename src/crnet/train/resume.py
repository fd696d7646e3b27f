"""Going on with a run: what must be as it was, and the states that come back."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crnet import optimizers
from crnet.config.check import steps_of
from crnet.config.model_spec import ModelSpec, config_at
from crnet.config.resuming import Change, OnResume, changes
from crnet.config.sections import RunConfig
from crnet.config.serialize import read_json
from crnet.errors import ConfigError
from crnet.model.language_model import LanguageModel
from crnet.model.padding import cut, cut_state, pad_state
from crnet.model.tensor_parallel import part_state
from crnet.parallel.full_state import (
    full_optimizer_state,
    load_full_optimizer_state,
)
from crnet.parallel.stage_state import own_state, state_of_stages, weights_of_stages
from crnet.parallel.tensor_state import whole_state, whole_weights
from crnet.parallel.whole import is_split
from crnet.parallel.world import ALONE, World
from crnet.storage import checkpoint
from crnet.storage.checkpoint import Checkpoint
from crnet.storage.manifest import MANIFEST
from crnet.train.step import last_stable_step, learning_rate


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


def newest_of(run_dir: Path, config: RunConfig, world: World = ALONE) -> Checkpoint | None:
    """The newest whole checkpoint of a run that the schedule of ``config`` can go on from. The
    first process alone reads it all to verify it; the others take its word, and have the same one.

    Where a checkpoint's rate has begun to fall to the end of fewer steps, one before that fall is
    taken; if there is none, the newest all the same.

    Args:
        config: resolved, with which the run goes on.
    Raises:
        ConfigError: every checkpoint is damaged, or a process sees another one.
    """
    saved = world.on_first(lambda: _newest(run_dir, config))
    if saved is None:
        return None
    saved = dataclasses.replace(saved, folder=checkpoint.folder_of(run_dir, saved.progress.step))
    found, name = saved.folder, f"checkpoint {saved.folder.name}"
    world.check_same(lambda: {name: checkpoint.fingerprint(found) or "not there"})
    return saved


def _newest(run_dir: Path, config: RunConfig) -> Checkpoint | None:
    newest = saved = checkpoint.newest(run_dir)
    while saved is not None and _has_fallen(saved, config):
        try:
            saved = checkpoint.newest(run_dir, below=saved.progress.step)
        except ConfigError:  # every earlier one is damaged, and said
            saved = None
    return saved or newest


def _has_fallen(saved: Checkpoint, config: RunConfig) -> bool:
    """Whether a checkpoint lies in the fall of a run of fewer steps."""
    stable = last_stable_step(saved.config)
    is_longer = config.train.steps > saved.config.train.steps
    return is_longer and stable is not None and saved.progress.step > stable


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


def check_same_run(saved: Checkpoint, config: RunConfig, hashes: Mapping[str, str]) -> list[Change]:
    """What a resumed run has otherwise than it began and may (``config.resuming``).

    Args:
        config: resolved.
        hashes: of the inputs; those under tokenizer and corpus are compared.
    Raises:
        ConfigError: with every key, and every input, that it may not have otherwise; or fewer
            steps are wanted than are done.
    """
    is_same_linear = saved.config.model.linear == config.model.linear
    now = config_at(config, saved.progress.step) if is_same_linear else config
    found = list(changes(saved.config, now))
    problems = [
        f"{change.flag} was {change.was!r} and is now {change.now!r}; a resumed run keeps it"
        for change in found
        if change.rule is OnResume.REFUSED
    ]
    done = saved.progress.step
    if config.train.steps < done:
        problems.append(
            f"--train.steps {config.train.steps}: the run has done {done} steps; take {done} or "
            "more, or start a new run"
        )
    for what in ("tokenizer", "corpus"):
        if not problems and hashes[what] != saved.extra.get(what):
            problems.append(
                f"the {what} is not the one this run began with (was {saved.extra.get(what)}, is "
                f"now {hashes[what]}); restore it, or start a new run"
            )
    if problems:
        raise ConfigError(problems)
    return found


def say_changes(
    saved: Checkpoint | None, config: RunConfig, hashes: Mapping[str, str], *, say: bool = True
) -> list[str]:
    """Say on stderr with what a run goes on otherwise than it began; return the lines.

    Args, Raises: ``check_same_run``. ``say``: of several processes, one says it. ``saved`` is None
    where a run ended before it saved.
    """
    if saved is None:
        lines = ["no checkpoint was saved before; the run begins at step 0"]
    else:
        found = check_same_run(saved, config, hashes)
        lines = [f"resumed with {each.flag} {each.now} (was {each.was})" for each in found]
        lines += _jump(saved, config)
    for line in lines if say else ():
        print(f"crnet: {line}", file=sys.stderr)
    return lines


def _jump(saved: Checkpoint, config: RunConfig) -> Iterator[str]:
    """Where the learning rate of the next step is not the one that was planned."""
    step, old = saved.progress.step, saved.config
    if step == config.train.steps:
        return
    yield from _other_warmup(saved, config)
    before, after = learning_rate(step, old) if step else 0.0, learning_rate(step + 1, config)
    is_planned = step < old.train.steps and after == learning_rate(step + 1, old)
    if before != after and not is_planned:
        yield f"step {step} ran at learning rate {before:.4g}, step {step + 1} runs at {after:.4g}"


def _other_warmup(saved: Checkpoint, config: RunConfig) -> Iterator[str]:
    """Where a schedule with a fall goes on into more steps, and is not the run that had them from
    the start."""
    stable, was, now = last_stable_step(saved.config), steps_of(saved.config), steps_of(config)
    if stable is None or was.total == now.total or was.warmup == now.warmup:
        return
    yield (
        f"the warm-up had {was.warmup} steps, and that of {now.total} steps has {now.warmup}; "
        f"--optimizer.warmup-frac {was.warmup / now.total:.6g} keeps it"
    )


def all_weights(model: LanguageModel, world: World = ALONE) -> dict[str, Tensor]:
    """Every weight whole, by name, in its declared shape; a tied head is listed once, as the
    embedding. Beside an adapter none: they are as they were.

    Split over ranks, or in stages: on the CPU of rank 0, and on other ranks nothing that counts.
    """
    if model.spec.adapter is not None:
        return {}
    if model.spec.num_parts > 1 or _any_split(model.parameters()):
        found = whole_weights(model, world)
    else:
        found = dict(model.named_parameters())
    declared = model.spec.tensors
    found = {name: cut(tensor, declared[name].shape) for name, tensor in found.items()}
    return weights_of_stages(found, model.spec.whole(), world)


def snapshot(
    optimizer: torch.optim.Optimizer, spec: ModelSpec, world: World = ALONE
) -> dict[str, Any]:
    """Optimizer and random states, as tensors and numbers (``torch.load(weights_only=True)``).

    ``spec``: of the model as it is stored; its padding is left out. Random states are of the GPU
    that the parameters are on, and of no other: asking one makes a context there.
    """
    parameters = _parameters(optimizer)
    if spec.num_parts > 1:
        found = whole_state(optimizer.state_dict(), spec, world)
    elif _any_split(parameters):
        found = full_optimizer_state(optimizer, world)
    else:
        found = optimizer.state_dict()
    found = state_of_stages(cut_state(found, spec), spec.whole(), world)
    return {"optimizer": found, **random_states(parameters[0].device)}


def random_states(device: torch.device) -> dict[str, Tensor]:
    """torch's, of the CPU and of that device."""
    found = {"torch_rng": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda_rng"] = torch.cuda.get_rng_state(device)
    return found


def restore(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    device: torch.device,
    spec: ModelSpec,
) -> None:
    """Inverse of ``snapshot``. ``spec``: of the model's part on this process."""
    split = _any_split(_parameters(optimizer))
    load = load_full_optimizer_state if split else optimizers.load_state
    own = pad_state(own_state(optimizer, state["optimizer"]), spec)
    load(optimizer, part_state(own, spec))
    set_random_states(state, device)


def set_random_states(state: Mapping[str, Any], device: torch.device) -> None:
    """Inverse of ``random_states``."""
    torch.set_rng_state(state["torch_rng"])
    if device.type == "cuda" and "cuda_rng" in state:
        found = state["cuda_rng"]  # older checkpoints: a list, of every GPU
        found = found[device.index or 0] if isinstance(found, list) else found
        torch.cuda.set_rng_state(found, device)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]


def _any_split(parameters: Iterable[Tensor]) -> bool:
    return any(map(is_split, parameters))
