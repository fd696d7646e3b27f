"""``crnet protocol``."""

from __future__ import annotations

import textwrap
from typing import Any

from crnet.cli.arguments import Command, Json, print_json


def protocol(name: str, /, *, as_json: Json = False) -> None:
    """Say what a run of the paper differs in from the package's own preset, and why.

    Parameters
    ----------
    name
        A run of the paper, as paper/llama-60m; crnet list names them.
    """
    from crnet.config import presets
    from crnet.paper import protocol as published

    base, found = published.base_of(name), published.differences(name)
    beside = published.beside(presets.get(name))
    figures: dict[str, Any] = {
        "run": name,
        "preset": base,
        "differences": [vars(each) for each in found],
        "left_open": dict(published.left_open()),
        "published": beside["rows"] if beside else [],
    }
    if as_json:
        print_json(figures)
        return
    print(f"{name}: {presets.PAPER[name][0]}; beside the preset {base}")
    for each in found:
        print(f"  --{_flag(each.key)}  {_shown(each.paper)}  (preset: {_shown(each.preset)})")
        print(_wrapped(each.why))
    print("left open by the paper")
    for key, text in published.left_open():
        print(f"  --{_flag(key)}\n{_wrapped(text)}")
    for line in published.lines(presets.get(name)):
        print(textwrap.fill(line, 100, subsequent_indent="  "))


def _flag(key: str) -> str:
    return key.replace("_", "-")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="      ", subsequent_indent="      ")


COMMAND = Command(protocol)
