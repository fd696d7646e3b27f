"""A study, run: every row tuned on its grid, then its best point trained to the end with each seed.

A trial of the tuning is the run itself, stopped at a share of its schedule: the best one goes on
from there, or the best few, and the best of these at the end is the row's. Where any row's best
trial stands at the edge of a grid that may grow, the grid grows by one value on that side, for
every row, and the new trials are run. Everything is in one folder:

    OUT/ROW/lr=0.003,seed=0/   an ordinary run (crnet report, crnet train --resume)
    OUT/graveyard/             runs that another version of the study began, with the reason
    OUT/study.toml             the study as it was run
    OUT/asked.json             the configuration of every run, as the study had it
    OUT/results.json, ...      what came out (``compare.results``)

Nothing that is finished is run again, whenever the command is killed and repeated, and what another
study has can be taken (``compare.reuse``). What failed or diverged stays, with its reason, until it
is asked to be tried again.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crnet.compare.processes import ended
from crnet.compare.reuse import ASKED, key_of, runs_of, take
from crnet.compare.study import Row, Study, Tuning, differing, last_step, ratio
from crnet.compare.sweep import SEED, Trial, Values, finished, steps_at
from crnet.config.check import check
from crnet.config.sections import RunConfig
from crnet.config.serialize import (
    flags,
    from_dict,
    override,
    read_json,
    to_dict,
    to_json,
    with_text,
)
from crnet.errors import ConfigError
from crnet.storage.files import alone, held_by, write_atomically, write_json

GRAVEYARD = "graveyard"
STUDY = "study.toml"
FAILED = "failed.json"
"""In a run's folder: why it failed."""
EVALUATIONS = 20
"""About so many of a whole run: the points of its curve."""
MEND = "the same command goes on"


@dataclass
class Comparison:
    """A study in a folder."""

    study: Study
    out: Path
    only: tuple[str, ...] = ()
    """Rows that are run; none: all."""
    retry: bool = False
    """Run once more what failed."""
    reuse: tuple[Path, ...] = ()
    """Folders of other studies, whose runs are taken where they are the same."""
    grown: dict[str, list[int]] = field(default_factory=dict)
    """Values by which each key's grid has grown, below and above."""

    def __post_init__(self) -> None:
        if strange := [name for name in self.only if name not in self.study.rows]:
            known = ", ".join(self.study.rows)
            raise ConfigError(f"--only {strange[0]}: the study has no such row; it has {known}")
        self.begun = False
        """Whether the folder is this study's."""
        self._asked: dict[str, Any] = {}
        self._trials: dict[tuple[str, Values, int], Trial] = {}
        self._elsewhere = runs_of(self.reuse)

    @property
    def rows(self) -> list[Row]:
        """Those that are run."""
        chosen = self.only or self.study.rows
        return [row for name, row in self.study.rows.items() if name in chosen]

    def run(self, jobs: int | None) -> Iterator[dict[str, Any]]:
        """Run what is not finished; yields what each run came to, as soon as it has ended.

        Raises:
            ConfigError: the folder is another program's or cannot be used, or a signal stopped it.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with alone(self.out):
            self._begin()
            self.begun = True
            if self.study.tuning:
                yield from self._tune(self.study.tuning, jobs)
                yield from self._train(self.finalists(), None, jobs)
            for seed in self.study.seeds:  # each row once, before any has its second seed
                yield from self._train(self.finals([seed]), None, jobs)

    # What is run

    def grid(self, row: Row) -> dict[str, list[Any]]:
        """The row's grid as it has grown."""
        found = {key: list(values) for key, values in row.grid.items()}
        for key, (below, above) in self.grown.items():
            for _ in range(below):
                found[key].insert(0, _rounded(found[key][0] ** 2 / found[key][1]))
            for _ in range(above):
                found[key].append(_rounded(found[key][-1] * (ratio(found[key]) or 1)))
        return found

    def points(self, row: Row) -> list[Values]:
        """What the row is tried at; one point without values where nothing is tuned."""
        grid = self.grid(row) if self.study.tuning else {}
        return [
            tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]

    def trial(self, row: Row, point: Values, seed: int) -> Trial:
        """A run of a row; made once, for a study asks for each a dozen times."""
        if (row.name, point, seed) not in self._trials:
            self._trials[row.name, point, seed] = self._trial(row, point, seed)
        return self._trials[row.name, point, seed]

    def _trial(self, row: Row, point: Values, seed: int) -> Trial:
        config = row.config
        for key, value in point:
            config = with_text(config, key, str(value))
        known = dict(flags(config))
        values = tuple((key, known[key.replace("-", "_")]) for key, _ in point)
        return Trial((*values, (SEED, seed)), override(config, train={"seed": seed}))

    def tuned(self, row: Row) -> list[Trial]:
        """The row's trials, of the seeds that choose."""
        return [each for point in self.points(row) for each in self.trials(row, point)]

    def trials(self, row: Row, point: Values) -> list[Trial]:
        """Those of one point."""
        seeds = self.study.seeds[: self.study.tuning.seeds if self.study.tuning else 0]
        return [self.trial(row, point, seed) for seed in seeds]

    def finals(self, seeds: Sequence[int]) -> dict[str, list[Trial]]:
        """By row: its best point with these seeds; a row without one is left out."""
        found = {}
        for row in self.rows:
            best = self.best(row) if self.study.tuning else ()
            if best is not None:
                found[row.name] = [self.trial(row, best, seed) for seed in seeds]
        return found

    def finalists(self) -> dict[str, list[Trial]]:
        """By row: the trials that go on to the end so that its point can be chosen there; none
        where the best trial chooses it."""
        assert self.study.tuning
        if self.study.tuning.finalists == 1:
            return {}
        return {
            row.name: [each for point in self.front(row) for each in self.trials(row, point)]
            for row in self.rows
        }

    # Tuning

    def losses(self, row: Row, point: Values, share: float | None) -> list[float | None]:
        """What a point of the grid gave, by seed, at a share of the steps (None: at the end)."""
        figures = [self.figures(row, each, share) for each in self.trials(row, point)]
        return [each.get("val_loss") if each else None for each in figures]

    def ranked(
        self, row: Row, points: Sequence[Values], share: float | None
    ) -> list[tuple[Values, float]]:
        """Those points that have ended well, the best first, and their mean losses."""
        found = []
        for point in points:
            losses = self.losses(row, point, share)
            known = [loss for loss in losses if loss is not None]
            if len(known) == len(losses):
                found.append((point, statistics.mean(known)))
        return sorted(found, key=lambda each: each[1])

    def front(self, row: Row) -> list[Values]:
        """The points whose trials were best, as many as go on to the end, the best first."""
        assert self.study.tuning
        ranked = self.ranked(row, self.points(row), self.study.tuning.share)
        return [point for point, _ in ranked[: self.study.tuning.finalists]]

    def best(self, row: Row) -> Values | None:
        """The best point; None: no trial has ended well. Until all that go on have ended it is the
        one whose trial was best."""
        front = self.front(row)
        ended = [self._has_ended(row, point) for point in front]
        ranked = self.ranked(row, front, None) if len(front) > 1 and all(ended) else []
        return ranked[0][0] if ranked else next(iter(front), None)

    def _has_ended(self, row: Row, point: Values) -> bool:
        """Whether a point has been trained to the end with every seed that chooses, or failed."""
        trials = self.trials(row, point)
        return all(self.figures(row, each, None) is not None for each in trials)

    def edges(self, row: Row, point: Values | None) -> list[tuple[str, int]]:
        """Keys on whose edge a point stands, 0: below, 1: above."""
        grid = self.grid(row)
        found = []
        for key, value in point or ():
            if ratio(grid[key]) is not None and value in (grid[key][0], grid[key][-1]):
                found.append((key, int(value == grid[key][-1])))
        return found

    def _tune(self, tuning: Tuning, jobs: int | None) -> Iterator[dict[str, Any]]:
        while True:
            trials = {row.name: self.tuned(row) for row in self.rows}
            yield from self._train(trials, tuning.share, jobs)
            wider = self._wider(tuning)
            if wider is None:
                return
            key, side = wider
            self.grown.setdefault(key, [0, 0])[side] += 1
            yield {"grown": key, "side": ("below", "above")[side]}

    def _wider(self, tuning: Tuning) -> tuple[str, int] | None:
        """The next key and side on which the grid grows; None: it need not, or may not."""
        for row in self.study.rows.values():
            for key, side in self.edges(row, next(iter(self.front(row)), None)):
                if self.grown.get(key, [0, 0])[side] < tuning.grow.get(key, 0):
                    return key, side
        return None

    def grow_as_known(self) -> None:
        """Let the grids be as the finished trials had them: for a reader that runs nothing."""
        tuning = self.study.tuning
        while tuning and (wider := self._wider(tuning)):
            key, side = wider
            self.grown.setdefault(key, [0, 0])[side] += 1
            rows = self.study.rows.values()
            if not any(self.folder(row, each).exists() for row in rows for each in self.tuned(row)):
                return

    # Runs

    def folder(self, row: Row, trial: Trial) -> Path:
        """Of a run."""
        return self.out / row.name / trial.name

    def figures(self, row: Row, trial: Trial, share: float | None) -> dict[str, Any] | None:
        """What a run had at a share of its steps (None: at the end); None: it is not there yet. A
        failed one has a ``problem``."""
        folder = self.folder(row, trial)
        found = finished(folder, until(trial.config, share))
        if found is None and (folder / FAILED).exists():
            found = {"problem": read_json(folder / FAILED)["problem"]}
        return found

    def elsewhere(self, row: Row, trial: Trial, share: float | None) -> Path | None:
        """The folder of a run of another study that is this one and has come so far; None: there
        is none, or this one has begun here."""
        if self.folder(row, trial).exists():
            return None
        known = self._elsewhere.get(key_of(trial.config), []) if self._elsewhere else []
        step = until(trial.config, share)
        ended = [folder for folder in known if finished(folder, step) is not None]
        return next((folder for folder in ended if held_by(folder) is None), None)

    def is_left(self, row: Row, trial: Trial, share: float | None) -> bool:
        """Whether a run is still to be made up to a share of its steps."""
        here = self.figures(row, trial, share) is not None
        return not here and self.elsewhere(row, trial, share) is None

    def _train(
        self, trials: Mapping[str, Sequence[Trial]], share: float | None, jobs: int | None
    ) -> Iterator[dict[str, Any]]:
        """Train some runs of some rows up to a share of their steps (None: all)."""
        waiting: dict[str, tuple[Row, Trial]] = {}
        taken: dict[str, tuple[Row, Trial, Path]] = {}
        for name, some in trials.items():
            row = self.study.rows[name]
            for trial in some:
                if run := self.elsewhere(row, trial, share):
                    taken[f"{name}/{trial.name}"] = row, trial, run
                elif self.figures(row, trial, share) is None:
                    waiting[f"{name}/{trial.name}"] = row, trial
        if not waiting and not taken:
            return
        for name in waiting:
            if (self.out / name).is_dir() and (pid := held_by(self.out / name)):
                raise ConfigError(
                    f"{self.out / name}: process {pid}, of an earlier start, still trains there; "
                    "wait until it has ended, or stop it"
                )
        asked = itertools.chain(waiting.items(), taken.items())
        self._asked |= {name: to_dict(each[1].config) for name, each in asked}
        write_atomically(self.out / ASKED, to_json(self._asked))
        for row, trial, run in taken.values():
            take(run, self.folder(row, trial))
            figures, step = self.figures(row, trial, share) or {}, until(trial.config, share)
            yield {"row": row.name, "run": trial.name, "step": step, "from": str(run), **figures}
        if not waiting:
            return
        configs = {name: stopped(trial.config, self, share) for name, (_, trial) in waiting.items()}
        runs = ended(configs, self.out, jobs=jobs, mend=MEND, goes_on=True)
        with contextlib.closing(runs):
            for name, each in runs:
                row, trial = waiting[name]
                figures = self.figures(row, trial, share)
                if figures is None:
                    problem = each.problem or "it ended without an evaluation"
                    figures = {"problem": problem}
                    folder = self.folder(row, trial)
                    folder.mkdir(parents=True, exist_ok=True)
                    write_json(folder / FAILED, figures | {"time": _now()})
                step = until(trial.config, share)
                yield {"row": row.name, "run": trial.name, "step": step, **figures}

    # The folder

    def _begin(self) -> None:
        """Write the study down; what an earlier version of it began and this one would not, goes
        to the graveyard."""
        file = self.out / STUDY
        if file.exists() and (was := file.read_text(encoding="utf-8")) != self.study.text:
            grave = self.out / GRAVEYARD
            grave.mkdir(exist_ok=True)
            _free(grave / STUDY).write_text(was, encoding="utf-8")
        elif not file.exists() and any(each.name[0] != "." for each in self.out.iterdir()):
            raise ConfigError(f"{self.out}: holds something else than a study; name another --out")
        file.write_text(self.study.text, encoding="utf-8")
        if (self.out / ASKED).exists():
            self._asked = read_json(self.out / ASKED)
        for name in list(self._asked):
            self._bury_if_superseded(name)
            if self.retry:
                (self.out / name / FAILED).unlink(missing_ok=True)

    def _bury_if_superseded(self, name: str) -> None:
        """``name``: of a run's folder."""
        row = self.study.rows.get(name.partition("/")[0])
        if row is None:
            return
        begun = from_dict(self._asked[name])
        wanted, known = row.config, dict(flags(begun))
        for key in (*row.grid, SEED):  # what the folder's name says
            wanted = with_text(wanted, key, str(known[key.replace("-", "_")]))
        if not (other := differing(begun, wanted)):
            return
        del self._asked[name]
        if (self.out / name).exists():
            grave = _free(self.out / GRAVEYARD / name)
            grave.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self.out / name, grave)
            reason = {key: {"was": was, "is": now} for key, (was, now) in other.items()}
            write_json(grave / "superseded.json", {"time": _now(), "differs": reason})


def stopped(config: RunConfig, within: Comparison, share: float | None) -> RunConfig:
    """A run up to a share of its steps, evaluated on the way and there."""
    tuning = within.study.tuning
    last = last_step(config)
    first = steps_at(config, tuning.share) if tuning else last
    told = {
        "stop_after_steps": until(config, share),
        "eval_every_steps": evaluation_steps(first, last),
        "keep_checkpoints": 1,
    }
    found = override(config, train=told)
    check(found)
    return found


def until(config: RunConfig, share: float | None) -> int:
    """The step at a share of the schedule; None: where the study's runs end."""
    return last_step(config) if share is None else steps_at(config, share)


def evaluation_steps(stop: int, steps: int) -> int:
    """Steps between two evaluations: a divisor of where trials stop, near a share of the run.

    Args:
        stop: where trials stop.
        steps: where runs end.
    """
    wanted = max(1.0, steps / EVALUATIONS)
    divisors = [each for each in range(1, stop + 1) if stop % each == 0]
    return min(divisors, key=lambda each: max(each / wanted, wanted / each))


def _rounded(value: float) -> float:
    """Three digits: 3e-3 and not 0.0030000000000000005."""
    return float(f"{value:.3g}")


def _free(path: Path) -> Path:
    """The path, or one like it that there is not."""
    names = (f"{path.name}-{number}" for number in itertools.count(2))
    paths = itertools.chain([path], map(path.with_name, names))
    return next(each for each in paths if not each.exists())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
