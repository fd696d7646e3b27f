"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A line of heads, and a line each of as many cells. Bars within a cell are kept as text."""
    rows = [[each.replace("|", "\\|") for each in row] for row in (heads, *lines)]
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(heads), *body])
