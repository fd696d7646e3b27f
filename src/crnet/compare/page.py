"""A study as one HTML page: its tables and pictures above the curves and facts of its runs."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crnet.compare import results
from crnet.compare.rates import warning
from crnet.report import page as report
from crnet.report.gather import gather

CAPTIONS = {
    "curves": "Validation loss; bands: from the least to the largest of the seeds",
    "costs": "Loss against cost; the line joins what no other row beats",
    "tuning": "What each row was tuned on",
}


def page(found: Mapping[str, Any], out: Path) -> str:
    """The page.

    Args:
        found: ``results.results``, of which a run has begun.
        out: the study's folder; below the tables stands the first run of each row.
    Cost: a checkpoint a row once from the disk, and the singular values of its maps.
    """
    unlike = warning(found["rows"], found["tuning"])
    below = f"<p>{html.escape(unlike)}</p>" if unlike else ""
    above = [("results", "Results", _html(results.table(found)) + below)]
    if found["verdicts"]:
        above.append(("verdicts", "What is called better", _html(results.verdicts(found))))
    above += [(f"picture-{name}", CAPTIONS[name], _image(out, name)) for name in _drawn(found)]
    if found["tuning"]:
        above.append(("tuning", "Tuning", _html(results.tuning_table(found))))
    if failed := results.failures(found):
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in failed)
        above.append(("failures", "What failed or diverged", f"<ul>{lines}</ul>"))
    above.append(("every-run", "Every run", _html(results.runs_table(found))))
    runs = gather(begun(found, out), samples=False)
    return report.page(runs, heading=found["title"], above=above)


def begun(found: Mapping[str, Any], out: Path) -> list[Path]:
    """The first run of each row, where there is one."""
    first = [next(iter(row["runs"]), None) for row in found["rows"].values()]
    return [out / run["folder"] for run in first if run and "crnet" in run]


def _drawn(found: Mapping[str, Any]) -> list[str]:
    return [name.removesuffix(".svg") for name in found["pictures"] if name.endswith(".svg")]


def _image(out: Path, name: str) -> str:
    data = base64.b64encode((out / f"{name}.svg").read_bytes()).decode()
    return f'<img alt="{CAPTIONS[name]}" src="data:image/svg+xml;base64,{data}" width="100%">'


def _html(markdown: str) -> str:
    """A table of ``results`` as HTML that can be sorted."""
    head, _, *lines = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in markdown.splitlines()
    ]
    rows = []
    for first, *cells in lines:
        cells_html = "".join(f"<td>{_words(cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{_words(first)}</th>{cells_html}</tr>')
    return report.table_of(((name, idx > 0) for idx, name in enumerate(head)), rows)


def _words(cell: str) -> str:
    text = html.escape(cell)
    return f"<b>{text[2:-2]}</b>" if text.startswith("**") else text
