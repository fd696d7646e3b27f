"""``crnet check-plugin``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from crnet.cli.arguments import Command, Json, print_json
from crnet.registry import load_plugins, plugin_methods


def check_plugin(file: Path, /, *, as_json: Json = False) -> None:
    """Hold the methods of a Python file against the contract of their seam.

    Exit code 1 if one fails.

    Parameters
    ----------
    file
        As for --plugins: a Python file with METHODS, a list of instances.
    """
    load_plugins([file])  # before the import below, which makes the configuration's classes

    from crnet.measure.contract import check  # pyright: ignore[reportMissingImports]

    rows = [
        {"method": method.name, **dataclasses.asdict(finding)}
        for method in plugin_methods(file)
        for finding in check(method)
    ]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            verdict = "ok" if row["ok"] else "failed"
            print(f"{verdict:8}{row['method']}, {row['name']}: {row['detail']}")
    if not all(row["ok"] for row in rows):
        sys.exit(1)


COMMAND = Command(check_plugin)
