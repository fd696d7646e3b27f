"""Hostile attempts on the command line: ``python tests/hostile.py [--only GROUP] [--out F]``.

Each attempt says how its commands must end: exit code 2 and a message that names the mend, or
exit code 0 and a result that is checked. A traceback, a hung command or a lost file is a failure
always. The table is made by the modules ``hostile_*``; ``tests/test_hostile.py`` runs it by groups.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile_files  # noqa: F401  enters its attempts
import hostile_runs  # noqa: F401
import hostile_words  # noqa: F401
from hostile_bench import TABLE, Bench, result_of

GROUPS = tuple(dict.fromkeys(each.group for each in TABLE))


def results(group: str, folder: Path, name: str | None = None) -> Iterator[dict[str, Any]]:
    """Make the attempts of a group, and say of each how it went.

    Args:
        group: one of ``GROUPS``.
        folder: for the corpus, the runs and what goes wrong.
        name: only attempts whose name holds it.
    Cost: seconds to a minute.
    """
    bench = Bench(folder)
    try:
        for each in TABLE:
            if each.group == group and (name is None or name in each.name):
                yield result_of(bench, each)
    finally:
        bench.close()


def table(rows: list[dict[str, Any]]) -> str:
    """Counts by group."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["group"]].append(row)
    groups["all"] = rows
    lines = [f"{'group':24}{'attempts':>10}{'commands':>10}{'failed':>8}{'seconds':>9}"]
    for name, found in groups.items():
        failed = sum(bool(row["wrong"]) for row in found)
        commands = sum(row["commands"] for row in found)
        seconds = sum(row["seconds"] for row in found)
        lines.append(f"{name:24}{len(found):>10}{commands:>10}{failed:>8}{seconds:>9.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON of every attempt")
    parser.add_argument("--only", action="append", choices=GROUPS, help="a group; several")
    parser.add_argument("--name", help="only attempts whose name holds this")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        for group in arguments.only or GROUPS:
            for row in results(group, Path(folder), arguments.name):
                rows.append(row)
                said = "failed" if row["wrong"] else "ok"
                print(f"{said:8}{row['seconds']:>7.1f} s  {group}: {row['name']}", file=sys.stderr)
                for wrong in row["wrong"]:
                    print(f"{group}: {row['name']}: {wrong}\n", file=sys.stderr, flush=True)
    print(table(rows))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{used.ru_utime + used.ru_stime:.0f} s of processor time")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    main()
