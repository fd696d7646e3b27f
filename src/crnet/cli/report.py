"""``crnet report``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from crnet.cli.arguments import Command, Json, Switch, print_json
from crnet.errors import ConfigError


def report(
    *runs: Annotated[Path, Parameter(help="Run folders; several are shown side by side.")],
    out: Path = Path("report.html"),
    open_it: Annotated[Switch, Parameter(name="--open")] = False,
    samples: Annotated[bool, Parameter(negative="--no-samples")] = True,
    as_json: Json = False,
) -> None:
    """Show runs on one HTML page that needs no network: curves, tables, gains, a sample.

    Parameters
    ----------
    out
        The page's file.
    open_it
        Open the page in a browser.
    samples
        Let each run write a short text.
    """
    if not runs:
        raise ConfigError("no run is named; say crnet report RUN, with the folder of a run")
    from crnet.report.gather import gather

    found = gather(runs, samples=samples)
    if as_json:
        print_json(found)
        return
    from crnet.report.page import page

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot be written ({error.strerror}); name another file"
        ) from error
    for run in found["runs"]:
        for problem in run["problems"]:
            print(f"crnet: warning: {problem}", file=sys.stderr)
    print(f"report {out}")
    if open_it:
        import webbrowser

        webbrowser.open(out.absolute().as_uri())


COMMAND = Command(report)
