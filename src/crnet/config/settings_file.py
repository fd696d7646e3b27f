"""Files of settings: YAML, TOML or JSON with sections of keys.

A file is checked as a whole before anything reads it: no key stands twice (the parsers would take
the last one without a word), nothing holds itself, and every value is one that a key can have.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from crnet.config.sections import SECTIONS
from crnet.config.serialize import without_doubles
from crnet.errors import ConfigError

_LARGEST_BYTES = 1 << 24
_MOST_NODES = 10_000
_DEEPEST = 4
"""section: {method: {option: [value]}}."""


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a YAML, TOML or JSON file of settings, by its ending.

    Raises:
        ConfigError: missing, of another kind, not well-formed (with the place, where known), or
            holding what no key can be.
    """
    import yaml

    try:
        values = _parse(path, _text(path))
    except RecursionError:
        raise ConfigError(f"--config {path}: goes too deep; wanted are sections of keys") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: is not UTF-8 text ({error})") from error
    except ConfigError:
        raise
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {path}: is not well-formed ({reason})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: holds no sections; wanted model, data, ... with keys")
    if problems := [*_section_problems(values)]:
        raise ConfigError(f"--config {path}: {problem}" for problem in problems)
    return values


def _text(path: Path) -> str:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
            raise ConfigError(f"--config {path}: is not a file; write the settings into one")
        if found.st_size > _LARGEST_BYTES:
            raise ConfigError(f"--config {path}: is {found.st_size:,} bytes; no settings are that")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from error


def _parse(path: Path, text: str) -> Any:
    if path.suffix in (".yaml", ".yml"):
        return _yaml(text)
    if path.suffix == ".toml":
        return tomllib.loads(text)
    if path.suffix == ".json":
        import json

        return json.loads(text, object_pairs_hook=without_doubles)
    raise ConfigError(f"--config {path}: end its name in .yaml, .toml or .json")


def _yaml(text: str) -> Any:
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # Counted with every alias written out: a few lines of them can stand for any number.
        for number, _ in enumerate(_nodes(node, 0)):
            if number > _MOST_NODES:
                raise ValueError("its aliases stand for too many values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _nodes(node: Any, depth: int) -> Iterator[Any]:
    """A node of YAML and all below it. Raises ``ValueError`` where a mapping has a key twice, or
    something holds itself."""
    import yaml

    if depth > 2 * _DEEPEST:
        raise ValueError(f"it goes too deep, or holds itself,{node.start_mark}")
    yield node
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            double = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {double} stands there twice,{node.start_mark}")
        for pair in node.value:
            for each in pair:
                yield from _nodes(each, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for each in node.value:
            yield from _nodes(each, depth + 1)


def _section_problems(values: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in values.items():
        if key not in SECTIONS:
            yield f"{key!r} is no section; known are {', '.join(SECTIONS)}"
        elif not isinstance(value, dict):
            yield (
                f"{key} is {_shown(value)}; it must be a section of keys, such as "
                "model: {rank: 96}"
            )
        else:
            yield from _value_problems(value, key, _DEEPEST - 1)


def _value_problems(value: Any, where: str, deeper: int) -> Iterator[str]:
    """What of a value no key can be."""
    if isinstance(value, dict) and deeper:
        for key, item in value.items():
            if isinstance(key, str):
                yield from _value_problems(item, f"{where}.{key}", deeper - 1)
            else:
                yield f"{where} has the key {key!r}; a key is a name"
    elif isinstance(value, list):
        for item in value:
            if not _is_plain(item):
                yield f"{where} lists {_shown(item)}; it can list words and numbers only"
                return
    elif not _is_plain(value):
        yield f"{where} is {_shown(value)}; it must be a word, a number, true or false (quote it?)"


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        try:
            os.fsencode(value)
        except UnicodeEncodeError:  # half of a surrogate pair
            return False
        return "\0" not in value
    return value is None or isinstance(value, (str, int, float, bool))


def _shown(value: Any) -> str:
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return f"a {type(value).__name__}"
    text = str(value) if not isinstance(value, str) else ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
