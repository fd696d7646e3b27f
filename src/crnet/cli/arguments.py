"""What several commands share: the kinds of their arguments, and what a command declares.

Nothing here imports the configuration: a command that needs none of it starts without.
"""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from crnet.errors import ConfigError
from crnet.registry import FILE_PREFIX, plugins

DEFAULT_PRESET = "tiny"

Preset = Annotated[str, Parameter(help="A recipe; crnet list names them.")]
ConfigFiles = Annotated[
    tuple[Path, ...],
    Parameter(
        name="--config",
        negative=(),
        help="YAML, TOML or JSON file with sections model, data, optimizer, train, parallel; "
        "several: the last wins.",
    ),
]
DataFiles = Annotated[
    tuple[Path, ...],
    Parameter(
        name="--config",
        negative=(),
        help="YAML, TOML or JSON file with a section data; several: the last wins.",
    ),
]
Json = Annotated[bool, Parameter(name="--json", negative=(), help="Print the result as JSON.")]
Switch = Annotated[bool, Parameter(negative=())]
Resume = Annotated[bool | Literal["auto"], Parameter(show_default=False)]
CheckpointPath = Annotated[
    Path, Parameter(help="A checkpoint, or a run folder (its newest whole checkpoint).")
]
Device = Annotated[str, Parameter(help="cpu, cuda, ...; auto: the GPU where there is one.")]


def whole_numbers(_app: Any, _commands: tuple[str, ...], arguments: Iterable[Any]) -> None:
    """Refuse a fraction for every whole number, of the command line or a file.

    cyclopts calls it once every source has given its values. By itself it would round 2.5 steps to
    2 without a word.
    """
    for argument in arguments:
        kinds = {argument.hint, *typing.get_args(argument.hint)}
        if int in kinds and kinds <= {int, int | None, type(None)}:
            converter = _whole_or_none if type(None) in kinds else _whole
            argument.parameter = Parameter.combine(
                argument.parameter, Parameter(converter=converter)
            )


def _whole(_: Any, tokens: Any) -> int:
    word, source = tokens[0].value, tokens[0].source
    if not re.fullmatch(r"[+-]?\d+", word.strip()):
        at = "" if source == "cli" else f" from {source}"
        raise ValueError(f"{word!r}{at} is not a whole number (int)")
    return int(word)


def _whole_or_none(hint: Any, tokens: Any) -> int | None:
    return None if tokens[0].value.lower() in ("none", "null") else _whole(hint, tokens)


@dataclass(frozen=True)
class Command:
    """A command: every module of a command has one, ``COMMAND``."""

    function: Callable[..., None]
    layers: Literal["run", "data", "checkpoint", "tuned"] | None = None
    """What stands behind its command line. run: files, then the preset or the resumed run; data:
    files; checkpoint: files, then the data of the checkpoint's run; tuned: files, then all of that
    run but its corpus; none: nothing."""


def print_json(value: Any) -> None:
    """Print a result as one JSON document."""
    from crnet.config.serialize import to_json

    print(to_json(value, indent=1))


def say_pictures(plot: Path, draw: Callable[[], Iterable[Path]]) -> None:
    """Draw what ``--plot`` asks for, and name the files.

    Raises:
        ConfigError: they cannot be written.
    """
    try:
        drawn = draw()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"--plot {plot}: cannot be written ({reason}); make room, or name another file"
        ) from error
    for file in drawn:
        print(f"picture {file}", file=sys.stderr)


def plugin_words() -> list[str]:
    """The ``--plugins FILE`` that a printed command needs to know what this one knows."""
    files = [plugin.path for plugin in plugins() if plugin.name.startswith(FILE_PREFIX)]
    return [word for file in files for word in ("--plugins", str(file))]
