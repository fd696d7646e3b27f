"""What several commands share: the kinds of their arguments, and what a command declares.

Nothing here imports the configuration: a command that needs none of it starts without.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from crnet.registry import FILE_PREFIX, plugins

DEFAULT_PRESET = "tiny"

Preset = Annotated[str, Parameter(help="A recipe; crnet list names them.")]
ConfigFiles = Annotated[
    tuple[Path, ...],
    Parameter(
        name="--config",
        negative=(),
        help="YAML, TOML or JSON file with sections model, data, optimizer, train; several: the "
        "last wins.",
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
CheckpointPath = Annotated[
    Path, Parameter(help="A checkpoint, or a run folder (its newest whole checkpoint).")
]
Device = Annotated[str, Parameter(help="cpu, cuda, ...; auto: the GPU where there is one.")]


@dataclass(frozen=True)
class Command:
    """A command: every module of a command has one, ``COMMAND``."""

    function: Callable[..., None]
    layers: Literal["run", "data", "checkpoint"] | None = None
    """What stands behind its command line. run: files, then the preset or the resumed run; data:
    files; checkpoint: files, then the data of the checkpoint's run; none: nothing."""


def print_json(value: Any) -> None:
    """Print a result as one JSON document; a number that JSON has none for becomes null."""

    def strict(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: strict(each) for key, each in item.items()}
        if isinstance(item, (list, tuple)):
            return [strict(each) for each in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    print(json.dumps(strict(value), indent=1, allow_nan=False))


def plugin_words() -> list[str]:
    """The ``--plugins FILE`` that a printed command needs to know what this one knows."""
    files = [plugin.path for plugin in plugins() if plugin.name.startswith(FILE_PREFIX)]
    return [word for file in files for word in ("--plugins", str(file))]
