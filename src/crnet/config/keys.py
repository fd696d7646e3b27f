"""Settings by the names of the command line's keys: ``steps=3`` is ``--train.steps 3``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crnet.config.sections import SECTIONS, RunConfig
from crnet.config.serialize import from_dict, override, to_dict
from crnet.errors import ConfigError


def with_keys(config: RunConfig, keys: Mapping[str, Any]) -> RunConfig:
    """Return ``config`` with other values for some keys, each read as the command line reads it.

    >>> with_keys(RunConfig(), {"rank": 96, "train": {"steps": 3}}).model.rank
    '96'

    Args:
        keys: a key of any section by its bare name, or a section with a mapping of its keys (where
            two sections have the name); options of a method: ``crnet={"beta_init": 0.5}``.
    Raises:
        ConfigError: every key that is unknown or in two sections, or every value of a wrong type.
    """
    sections: dict[str, dict[str, Any]] = {}
    problems = []
    for key, value in keys.items():
        if key in SECTIONS and isinstance(value, Mapping):
            sections.setdefault(key, {}).update(value)
            continue
        homes = [name for name in SECTIONS if key in _names(getattr(config, name))]
        if len(homes) == 1:
            sections.setdefault(homes[0], {})[key] = value
        else:
            problems.append(_homeless(key, homes, config))
    if problems:
        raise ConfigError(problems)
    read = {name: _as_read(getattr(config, name), given) for name, given in sections.items()}
    return from_dict(to_dict(override(config, **read)))


def _names(section: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(section)]


def _homeless(key: str, homes: list[str], config: RunConfig) -> str:
    if homes:
        return (
            f"{key!r} is a key of {' and '.join(homes)}; say which, as in "
            f"{homes[0]}={{{key!r}: ...}}"
        )
    known = [*SECTIONS, *(each for name in SECTIONS for each in _names(getattr(config, name)))]
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _as_read(section: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers where words are wanted, and one word where several may stand, as typed."""
    found = {}
    for key, value in values.items():
        usual = getattr(section, key, None)
        if isinstance(usual, str) and type(value) in (int, float):
            value = str(value)
        elif isinstance(usual, tuple) and isinstance(value, str | Path):
            value = (str(value),)
        found[key] = value
    return found
