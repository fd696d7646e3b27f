"""``crnet compare``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from crnet.cli.arguments import Command, Json, Switch, print_json
from crnet.errors import ConfigError
from crnet.train.folders import new_run

if TYPE_CHECKING:
    from crnet.compare.comparison import Comparison

Only = Annotated[tuple[str, ...], Parameter(negative=())]
Reuse = Annotated[tuple[Path, ...], Parameter(negative=())]


def compare(
    study: str,
    /,
    *,
    out: Path | None = None,
    jobs: int | None = None,
    only: Only = (),
    retry: Switch = False,
    reuse: Reuse = (),
    dry_run: Switch = False,
    report: Switch = False,
    as_json: Json = False,
) -> None:
    """Compare methods: tune each alike, train each with every seed, say what is better.

    Parameters
    ----------
    study
        A built-in study (small, smoke, paper-60m, ...; docs/compare.md) or a .toml file.
    out
        Folder of the study; the same one goes on where it stopped. None: a new one under
        crnet-runs.
    jobs
        Runs at a time; none: one a core, or one on a GPU.
    only
        Run this row alone; repeatable.
    retry
        Run once more what failed.
    reuse
        Folder of another study: a run of it with the same settings and seed is copied and not
        made again; repeatable.
    dry_run
        Say what would be run, what it costs and how long it takes here; nothing is trained.
    report
        Write the results of what is finished; nothing is trained.
    """
    if dry_run and report:
        raise ConfigError("--dry-run and --report do not go together; say one of them")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs is {jobs}; it must be 1 or more")
    found = _opened(study, out, only, retry, reuse)
    if dry_run or report:
        found.grow_as_known()
    if dry_run:
        _foresee(found, jobs, as_json)
        return
    if report and not found.out.is_dir():
        raise ConfigError(f"--out {out}: there is no such study; name its folder")
    try:
        for row in () if report else found.run(jobs):
            _say(row)
    except ConfigError:
        if found.begun:
            _write(found)  # what is finished
        raise
    made = _write(found)
    if as_json:
        print_json(made)
    else:
        _show(made, found.out)


def _opened(
    study: str, out: Path | None, only: Sequence[str], retry: bool, reuse: Sequence[Path]
) -> Comparison:
    from crnet.compare import comparison, verdicts
    from crnet.compare.study import read

    wanted = read(study)
    if wanted.rule:
        verdicts.check_installed()
    out = out or new_run(f"compare-{wanted.name}")
    return comparison.Comparison(wanted, out, tuple(only), retry, tuple(reuse))


def _show(made: dict[str, Any], out: Path) -> None:
    from crnet.compare import results

    print(results.table(made))
    if made["verdicts"]:
        print(f"\n{results.verdicts(made)}")
    print(f"study folder {out} (results.json, results.md, report.html)")


def _say(row: dict[str, Any]) -> None:
    """One line on stderr a run."""
    if "grown" in row:
        line = (
            f"a best value stands at the edge of {row['grown']}: every grid gets one {row['side']}"
        )
    elif row.get("problem"):
        line = f"{row['row']}/{row['run']}, step {row['step']}: failed: {row['problem']}"
    else:
        line = f"{row['row']}/{row['run']}, step {row['step']}: loss {row['val_loss']:.4f}"
    print(line + (f" (from {row['from']})" if "from" in row else ""), file=sys.stderr)


def _foresee(study: Comparison, jobs: int | None, as_json: bool) -> None:
    from crnet.compare import foresight

    found = foresight.foreseen(study, jobs)
    if as_json:
        print_json(found)
        return
    print("\n".join(foresight.lines(found)))


def _write(study: Comparison) -> dict[str, Any]:
    """Write results.json, results.md, the pictures and report.html; returns the results."""
    from crnet.compare import pictures, results
    from crnet.compare.page import begun, page
    from crnet.storage.files import write_atomically, write_json

    found = results.results(study)
    drawn = pictures.draw(found, study.out)
    found["pictures"] = [path.name for path in drawn]
    write_json(study.out / "results.json", found)
    write_atomically(study.out / "results.md", results.markdown(found))
    if begun(found, study.out):
        write_atomically(study.out / "report.html", page(found, study.out))
    return found


COMMAND = Command(compare)
