"""A configuration to and from plain dicts."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from crnet.config import presets
from crnet.config.sections import RunConfig
from crnet.errors import ConfigError


def override(config: RunConfig, **sections: Mapping[str, Any]) -> RunConfig:
    """Return ``config`` with some keys of its sections replaced.

    >>> override(RunConfig(), model={"rank": "96"}, train={"steps": 3}).train.steps
    3
    """
    return dataclasses.replace(
        config, **{name: _replace(getattr(config, name), keys) for name, keys in sections.items()}
    )


def _replace(section: Any, keys: Mapping[str, Any]) -> Any:
    known = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    changed: dict[str, Any] = {}
    for key, value in keys.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"unknown key {key!r} of {type(section).__name__}{hint}")
        nested = dataclasses.is_dataclass(known[key]) and isinstance(value, Mapping)
        changed[key] = _replace(known[key], value) if nested else value
    return dataclasses.replace(section, **changed)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists, strings and numbers: what JSON and YAML can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def to_json(value: Any, *, indent: int | None = None) -> str:
    """One JSON document; a number that JSON has none for (nan, inf) becomes null."""

    def strict(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: strict(each) for key, each in item.items()}
        if isinstance(item, (list, tuple)):
            return [strict(each) for each in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(strict(value), indent=indent, allow_nan=False)


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Inverse of ``to_dict``. Raises ``ConfigError`` on an unknown key or a wrong type."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"the configuration is a {type(values).__name__}, not an object of keys")
    return build(RunConfig, values)


def build(cls: Any, values: Mapping[str, Any], where: str = "") -> Any:
    """A dataclass, and those inside it, from what ``to_dict`` made of it; a field with a default
    may be missing.

    Raises:
        ConfigError: every unknown key, missing key and wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    known = {field.name for field in fields}
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    problems = [f"unknown key {where}{key}" for key in sorted(set(values) - known)]
    problems += [f"missing key {where}{key}" for key in sorted(needed - set(values))]
    built = {}
    for key in sorted(set(values) & known):
        try:
            built[key] = _coerce(hints[key], values[key], where + key)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return cls(**built)


def with_text(config: RunConfig, key: str, text: str) -> RunConfig:
    """The configuration with another value, as a command line would give it.

    >>> with_text(RunConfig(), "optimizer.lr", "3e-3").optimizer.lr
    0.003

    Args:
        key: with its section, as ``optimizer.lr`` or ``model.crnet.beta-init``.
    Raises:
        ConfigError: there is no such key, or the text is no value of its type.
    """

    def changed(section: Any, path: list[str]) -> Any:
        name, *rest = path
        known = {field.name for field in dataclasses.fields(section)}
        if name not in known or bool(rest) != dataclasses.is_dataclass(getattr(section, name)):
            near = difflib.get_close_matches(key, [each for each, _ in flags(config)], n=1)
            hint = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
            raise ConfigError(f"there is no key {key}{hint}")
        if rest:
            return dataclasses.replace(section, **{name: changed(getattr(section, name), rest)})
        hint = typing.get_type_hints(type(section))[name]
        return dataclasses.replace(section, **{name: _from_text(hint, text, key)})

    return changed(config, key.replace("-", "_").split("."))


def _from_text(hint: Any, text: str, where: str) -> Any:
    """The first of a text's readings that is of the type."""
    readings: list[Any] = [{"none": None, "true": True, "false": False}.get(text.lower(), text)]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            readings.append(number(text))
    for reading in [*readings, text]:
        with contextlib.suppress(ConfigError):
            return _coerce(hint, reading, where)
    return _coerce(hint, text, where)  # says what is wrong


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, where + ".")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerce(args[0], item, where) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return {key: _coerce(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
    raise ConfigError(f"{where} is {shown}, which is not a {getattr(hint, '__name__', hint)}")


def command_line(config: RunConfig) -> list[str]:
    """The words after the program that train a configuration: what differs from its preset."""
    base = dict(_flags(presets.get(config.preset)))
    words = ["train", config.preset]
    for flag, value in _flags(config):
        if isinstance(value, bool) and value != base[flag]:
            words.append(flag if value else re.sub(r"\.(?=[^.]*$)", ".no-", flag))
        elif value != base[flag]:
            items = value if isinstance(value, list) else [value]
            words += [word for item in items for word in (flag, str(item))]
    return words


def flags(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every key with its section, as ``train.batch_size``, and its value as JSON has it."""
    return leaves(to_dict(config))


def leaves(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """What is no mapping in nested ones, each with its keys, joined by dots behind ``before``."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{before}{key}.")
        else:
            yield before + key, value


def _flags(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """As the command line spells them."""
    return (("--" + key.replace("_", "-"), value) for key, value in flags(config))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or broken file is a ``ConfigError`` that names it."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ConfigError(f"{path}: is not a file")
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: altered (it holds no JSON object)")
    return value


def parse_json(text: str | bytes) -> Any:
    """As ``json.loads``. Raises ``ValueError`` also for a key that stands twice, or too deep."""
    try:
        return json.loads(text, object_pairs_hook=without_doubles)
    except RecursionError:
        raise ValueError("it goes too deep") from None


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dict. Raises ``ValueError`` where a key stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {double!r} stands there twice")
    return found
