"""``crnet sweep``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from crnet.cli.arguments import (
    DEFAULT_PRESET,
    Command,
    ConfigFiles,
    Json,
    Preset,
    Switch,
    plugin_words,
    print_json,
)
from crnet.cli.layering import DEFAULTS, Settings
from crnet.errors import ConfigError
from crnet.train.folders import new_run

if TYPE_CHECKING:
    from crnet.compare.sweep import Sweep

Over = Annotated[tuple[str, ...], Parameter(negative=())]


def sweep(
    preset: Preset = DEFAULT_PRESET,
    /,
    *,
    over: Over = (),
    share: float = 1.0,
    halving: int | None = None,
    jobs: int | None = None,
    out: Path | None = None,
    dry_run: Switch = False,
    config: ConfigFiles = (),
    as_json: Json = False,
    settings: Settings = DEFAULTS,
) -> None:
    """Search over keys: train every combination of values, and rank them.

    Parameters
    ----------
    over
        KEY=VALUE,VALUE,... as optimizer.lr=1e-3,3e-3; repeatable, and every combination is a trial.
        Where values hold commas, semicolons stand between them. Seeds (train.seed) are averaged.
    share
        Of its schedule that a trial is trained for; its schedule stays the whole one.
    halving
        One of so many goes on, so many times as far, and so on, until one is left; none: all stop
        at --share.
    jobs
        Trials at a time; none: one a core, or one on a GPU.
    out
        Folder of the trials; the same one goes on where it stopped. None: a new one under
        crnet-runs.
    dry_run
        Say what would be trained, and what it costs.
    """
    from crnet.compare import sweep as searching

    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs is {jobs}; it must be 1 or more")
    base, search = settings.of(preset), searching.Search(share, halving)
    wanted = values_of(over)
    searching.check_search(base, wanted, search)
    found = searching.trials(base, wanted)
    study = searching.Sweep(base, found, search, out or new_run(f"sweep-{base.model.linear}"))
    if dry_run:
        _foresee(study, as_json)
        return
    for row in study.run(jobs):
        _say(row)
    picture = searching.picture(study)
    if as_json:
        print_json(study.report() | {"picture": None if picture is None else str(picture)})
        return
    print(searching.table(study))
    _advise(study)
    print(f"sweep folder {study.out} (sweep.json{', sweep.png' if picture else ''})")


def values_of(over: Sequence[str]) -> dict[str, list[str]]:
    """Values by key. Raises ``ConfigError`` for what is not KEY=VALUE,VALUE."""
    found: dict[str, list[str]] = {}
    for word in over:
        key, equals, text = word.partition("=")
        values = [each.strip() for each in text.split(";" if ";" in text else ",")]
        if not equals or not all(values):
            raise ConfigError(f"--over {word!r}: say KEY=VALUE,VALUE, as optimizer.lr=1e-3,3e-3")
        known = found.setdefault(key.replace("-", "_"), [])
        known += [value for value in values if value not in known]
    return found


def _say(row: dict[str, Any]) -> None:
    """One line on stderr a trial."""
    ended = f"loss {row['val_loss']:.4f}" if row["problem"] is None else f"failed: {row['problem']}"
    print(f"{row['trial']}, step {row['step']}: {ended}", file=sys.stderr)


def _foresee(study: Sweep, as_json: bool) -> None:
    cost = study.foreseen()
    if as_json:
        print_json({"trials": [trial.name for trial in study.trials], **cost})
        return
    for trial in study.trials:
        print(trial.name)
    for share, points in study.search.rungs(len(study.points)):
        print(f"{points} of {len(study.points)} points up to {share:.0%} of their steps")
    print(
        f"{cost['tokens']:,} tokens, {cost['flops']:.2e} FLOPs, "
        f"{cost['whole_runs']:.2f} x one whole run"
    )


def _advise(study: Sweep) -> None:
    """What the search cost, whether its winner can be trusted, and how to train it whole."""
    cost = study.budget()
    print(
        f"\nThe search cost {cost['tokens']:,} tokens, "
        f"{cost['whole_runs']:.2f} x the FLOPs of one whole run. Trials: {cost['trials']}."
    )
    for line in study.edges():
        print(line)
    best = study.ranked()[0]
    if best["val_loss"] is None:
        print("every trial failed")
        return
    if best["share"] < 1:
        folder = study.out / best["trials"][0]
        words = ["crnet", "train", "--resume", "--out", str(folder), *plugin_words()]
        words += ["--train.stop-after-steps", str(study.base.train.steps)]
        print(f"train the best one to its end: {shlex.join(words)}")


COMMAND = Command(sweep, layers="run")
