"""``crnet paper``."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from crnet.cli.arguments import Command, Json, Switch, print_json
from crnet.errors import ConfigError

RANKS = "10"
"""The table of published ranks: the planner's answer beside it, not figures of equations."""
TITLE = "Table 10: ranks, and what plan finds for the same target; the difference of what they take"


def paper(
    table: Literal["1", "2", "3", "4", "10", "19", "22", "all"] = "all",
    /,
    *,
    markdown: Switch = False,
    as_json: Json = False,
) -> None:
    """Recompute tables of the CR-Net paper from its equations, beside what is printed there.

    Parameters
    ----------
    table
        Its number. 10: the ranks, beside those that plan finds for the same targets.
    markdown
        Print the page of every table of equations, and of the paper's errata.
    """
    from crnet.paper import render, tables

    if markdown and table != "all":
        raise ConfigError(f"--markdown prints all tables; leave out {table}")
    if markdown and as_json:
        raise ConfigError("--markdown and --json are two forms; leave one out")
    if markdown:
        print(render.markdown(), end="")
        return
    known = sorted([*map(str, tables.TABLES), RANKS], key=int)
    wanted = known if table == "all" else [table]
    if as_json:
        print_json([_values(each) for each in wanted])
        return
    print("\n\n".join(_text(each) for each in wanted))


def _values(number: str) -> dict[str, Any]:
    from crnet.paper import tables

    if number == RANKS:
        return {"title": TITLE, "rows": [vars(row) for row in _ranks()]}
    return dataclasses.asdict(tables.table(int(number)))


def _text(number: str) -> str:
    from crnet.paper import render, tables

    if number != RANKS:
        return render.text(tables.table(int(number)))
    lines = [
        f"{row.preset:11}{row.alignment:20}{row.reading:11}{row.published:16}"
        f"{row.found:18}{row.difference:>+8.2%}"
        for row in _ranks()
    ]
    return "\n".join([TITLE, *lines])


def _ranks() -> list[Any]:
    from crnet.paper.table_10 import table_10

    return table_10()


COMMAND = Command(paper)
