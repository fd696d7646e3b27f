"""A search over keys of the configuration: every combination of values is a trial, a run.

A trial is stopped at a share of its schedule, never given a shorter one: a rate that wins a short
schedule is not the one that wins a long one. Under successive halving (Jamieson and Talwalkar 2016)
the better part of the trials goes on to a share so many times larger, from where they stand, until
one is left or the schedule ends.

Trials that differ in ``train.seed`` alone are one point, ranked by the mean of their losses: a seed
is no setting that could be chosen. What failed or diverged is ranked last and shown.

What the search cost stands beside what it found, and so does a winner at the edge of what was
tried: more values beyond it can be added, and what is finished is not run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crnet.compare.processes import Ended, ended, here
from crnet.config.check import check
from crnet.config.sections import RunConfig
from crnet.config.serialize import flags, from_dict, override, read_json, to_dict, with_text
from crnet.cost.step import step_flops
from crnet.cost.workload import workload
from crnet.errors import ConfigError
from crnet.markdown import markdown_table
from crnet.report.plots import new_figure, save_both
from crnet.storage import metrics
from crnet.storage.checkpoint import folder_of
from crnet.storage.files import write_json
from crnet.storage.manifest import describe_code

SWEEP = "sweep.json"
SEED = "train.seed"
MEND = "the same command goes on"

Values = tuple[tuple[str, Any], ...]
"""Key and value of each thing that is searched over, in the order in which it was asked for."""


@dataclass(frozen=True)
class Trial:
    """One combination."""

    values: Values
    config: RunConfig

    @property
    def name(self) -> str:
        """Of its folder."""
        last = [key.rpartition(".")[2] for key, _ in self.values]
        keys = last if len({*last}) == len(last) else [key for key, _ in self.values]
        words = (f"{key}={value}" for key, (_, value) in zip(keys, self.values, strict=True))
        return ",".join(words).replace("/", "_").replace(" ", "")

    @property
    def point(self) -> Values:
        """What it shares with those that differ in their seed."""
        return tuple(each for each in self.values if each[0] != SEED)

    def stopped(self, share: float) -> RunConfig:
        """The run up to a share of its steps, and evaluated there."""
        steps = steps_at(self.config, share)
        told = {"stop_after_steps": steps, "eval_every_steps": steps, "keep_checkpoints": 1}
        return override(self.config, train=told)


@dataclass(frozen=True)
class Search:
    """How the trials are gone through."""

    share: float = 1.0
    """Of its steps that a trial takes at first."""
    halving: int | None = None
    """So many times as far goes one of so many points; None: all go as far."""

    def rungs(self, num_points: int) -> list[tuple[float, int]]:
        """Share of the steps, and how many points go so far."""
        found = [(self.share, num_points)]
        while self.halving and found[-1][0] < 1 and found[-1][1] > 1:
            share, points = found[-1]
            found.append((min(share * self.halving, 1.0), math.ceil(points / self.halving)))
        return found


def steps_at(config: RunConfig, share: float) -> int:
    """Steps of a run that are a share of its own."""
    return max(1, round(share * config.train.steps))


def trials(base: RunConfig, over: Mapping[str, Sequence[str]]) -> list[Trial]:
    """Every combination.

    Args:
        over: values by key, as a command line gives them (``serialize.with_text``).
    Raises:
        ConfigError: a key or a value is unknown, or a combination cannot be trained.
    """
    found: dict[str, Trial] = {}
    problems: list[str] = []
    for texts in itertools.product(*over.values()):
        config, values = base, []
        for key, text in zip(over, texts, strict=True):
            config = with_text(config, key, text)
            values.append((key, dict(flags(config))[key.replace("-", "_")]))
        trial = Trial(tuple(values), config)
        try:
            check(config)
        except ConfigError as error:
            problems += [f"{trial.name}: {problem}" for problem in error.problems]
        found[trial.name] = trial
    if problems:
        raise ConfigError(problems)
    return list(found.values())


def check_search(base: RunConfig, over: Mapping[str, Sequence[str]], search: Search) -> None:
    """Raise ``ConfigError`` for what cannot be searched."""
    problems = []
    if not over:
        problems.append("--over names nothing to search; say --over optimizer.lr=1e-3,3e-3,1e-2")
    if not 0 < search.share <= 1:
        problems.append(f"--share is {search.share}; it must be above 0 and at most 1")
    if search.halving is not None and search.halving < 2:
        problems.append(f"--halving is {search.halving}; it must be 2 or more")
    if search.halving and search.share == 1:
        problems.append("--halving begins at a share of the schedule; say --share 0.1")
    if base.train.epochs is not None:
        problems.append("a share of --train.epochs is not known beforehand; say --train.steps")
    if base.train.stop_after_steps is not None:
        problems.append("--train.stop-after-steps: a sweep stops its trials itself; say --share")
    if problems:
        raise ConfigError(problems)


@dataclass
class Sweep:
    """A search in a folder: ``sweep.json`` and a run folder a trial."""

    base: RunConfig
    trials: list[Trial]
    search: Search
    out: Path
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """A row a trial and rung, in the order in which they ended."""

    def run(self, jobs: int | None) -> Iterator[dict[str, Any]]:
        """Run what is not finished; a row as soon as it is known.

        Args:
            jobs: trials at a time; None: ``processes.jobs_of``; 0: one after the other, in this
                process.
        Raises:
            ConfigError: the folder holds another search; or a signal stopped it.
        """
        self._begin()
        going = self.points
        for share, num_points in self.search.rungs(len(going)):
            going = going[:num_points]
            yield from self._rung(share, going, jobs)
            going = [row["point"] for row in self.rung(share) if row["val_loss"] is not None]

    @property
    def points(self) -> list[Values]:
        """What is ranked."""
        return list(dict.fromkeys(trial.point for trial in self.trials))

    def _begin(self) -> None:
        """Refuse a folder that was begun with another base."""
        file = self.out / SWEEP
        if file.exists():
            begun = from_dict(read_json(file)["base"])
            ours = dict(flags(self.base))
            other = {
                key: value
                for key, value in flags(begun)
                if ours[key] != value and key not in ("train.threads", "train.device")
            }
            if other:
                words = ", ".join(f"{key} {was} (now {ours[key]})" for key, was in other.items())
                raise ConfigError(f"{self.out}: was begun with {words}; name another --out")
        self._write()

    def _rung(
        self, share: float, points: Sequence[Values], jobs: int | None
    ) -> Iterator[dict[str, Any]]:
        """The trials of some points up to a share."""
        chosen = {trial.name: trial for trial in self.trials if trial.point in points}
        left: dict[str, RunConfig] = {}
        for name, trial in chosen.items():
            found = finished(self.out / name, steps_at(trial.config, share))
            if found is None:
                left[name] = trial.stopped(share)
            else:
                yield self._note(trial, share, found)
        if not left:
            return
        if jobs == 0:
            runs = here(left, self.out, mend=MEND)
        else:
            runs = ended(left, self.out, jobs=jobs, mend=MEND, goes_on=True)
        with contextlib.closing(runs):
            for name, each in runs:
                steps = steps_at(chosen[name].config, share)
                figures = finished(self.out / name, steps) or {"problem": _problem(each)}
                yield self._note(chosen[name], share, figures)

    def _note(self, trial: Trial, share: float, figures: Mapping[str, Any]) -> dict[str, Any]:
        row = {
            "trial": trial.name,
            "values": dict(trial.values),
            "share": share,
            "step": steps_at(trial.config, share),
            "tokens": None,
            "val_loss": None,
            "val_bits_per_byte": None,
            "val_perplexity": None,
            "problem": None,
            **figures,
        }
        self.rows.append(row)
        self._write()
        return row

    def ranked(self) -> list[dict[str, Any]]:
        """The points, those that went farthest first, then by their mean loss; a point whose
        trials did not all end has none and comes last."""
        shares = sorted({row["share"] for row in self.rows}, reverse=True)
        found: dict[Values, dict[str, Any]] = {}
        for share in shares:
            for row in self.rung(share):
                found.setdefault(row["point"], row)
        return sorted(found.values(), key=lambda row: row["val_loss"] is None)

    def rung(self, share: float) -> list[dict[str, Any]]:
        """The points of a rung, the best first."""
        found = []
        row_of = {row["trial"]: row for row in self.rows if row["share"] == share}
        for point in self.points:
            names = [trial.name for trial in self.trials if trial.point == point]
            mine = [row_of[name] for name in names if name in row_of]
            if not mine:
                continue
            losses = [row["val_loss"] for row in mine]
            whole = None not in losses
            found.append(
                {
                    "point": point,
                    "values": dict(point),
                    "share": share,
                    "step": mine[0]["step"],
                    "trials": [row["trial"] for row in mine],
                    "losses": losses,
                    "val_loss": statistics.mean(losses) if whole else None,
                    "val_bits_per_byte": _mean(mine, "val_bits_per_byte") if whole else None,
                    "problems": [row["problem"] for row in mine if row["problem"]],
                }
            )
        return sorted(found, key=lambda row: (row["val_loss"] is None, row["val_loss"] or 0))

    def budget(self) -> dict[str, Any]:
        """What the search took, beside one whole run of the base: tokens and FLOPs of training.

        A trial that went on counts once, as far as it went; one that failed, as it was meant to go.
        """
        steps = dict[str, int]()
        for row in self.rows:
            steps[row["trial"]] = max(steps.get(row["trial"], 0), row["step"])
        return self._cost([(each, steps.get(each.name, 0)) for each in self.trials])

    def foreseen(self) -> dict[str, Any]:
        """The same before anything is trained, were the first points of each rung its best."""
        steps = dict[Trial, int]()
        for share, num_points in self.search.rungs(len(self.points)):
            chosen = self.points[:num_points]
            some = [each for each in self.trials if each.point in chosen]
            steps |= {each: steps_at(each.config, share) for each in some}
        return self._cost(list(steps.items()))

    def _cost(self, steps: Sequence[tuple[Trial, int]]) -> dict[str, Any]:
        flops = sum(count * _step_flops(trial.config) for trial, count in steps)
        tokens = sum(count * _step_tokens(trial.config) for trial, count in steps)
        whole = self.base.train.steps * _step_flops(self.base)
        begun = sum(count > 0 for _, count in steps)
        return {"trials": begun, "tokens": tokens, "flops": flops, "whole_runs": flops / whole}

    def edges(self) -> list[str]:
        """Where the best point has the least or the largest of the numbers that were tried."""
        ranked = self.ranked()
        if not ranked or ranked[0]["val_loss"] is None:
            return []
        found = []
        for key, best in ranked[0]["point"]:
            tried = sorted({dict(trial.values)[key] for trial in self.trials}, key=_order)
            if len(tried) < 2 or not _is_number(best) or best not in (tried[0], tried[-1]):
                continue
            side, more = ("least", "smaller") if best == tried[0] else ("largest", "larger")
            found.append(
                f"{key} {best} is the {side} that was tried: the best may lie beyond; "
                f"add {more} ones to --over"
            )
        return found

    def report(self) -> dict[str, Any]:
        """All of it, as ``sweep.json`` has it."""
        ranked = [{k: v for k, v in row.items() if k != "point"} for row in self.ranked()]
        return {
            "base": to_dict(self.base),
            "over": {
                key: list(dict.fromkeys(dict(trial.values)[key] for trial in self.trials))
                for key, _ in self.trials[0].values
            },
            "search": dataclasses.asdict(self.search),
            "code": describe_code(),
            "ranked": ranked,
            "edges": self.edges(),
            "budget": self.budget(),
            "rows": self.rows,
        }

    def _write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / SWEEP, self.report())


def finished(folder: Path, step: int) -> dict[str, Any] | None:
    """The evaluation of a run at a step that it has reached and saved, or passed; None: not yet."""
    file = folder / metrics.METRICS
    if not file.exists():
        return None
    rows = metrics.read(file)
    found = [row for row in rows if row["step"] == step and "val_loss" in row]
    saved = [row["step"] for row in rows if "loss" in row]
    if not found or not (folder_of(folder, step).exists() or max(saved, default=0) > step):
        return None
    keys = ("val_loss", "val_bits_per_byte", "val_perplexity")
    figures = {key: found[-1][key] for key in keys}
    tokens = [row["tokens"] for row in rows if row["step"] == step and "loss" in row]
    if not math.isfinite(figures["val_loss"]):
        return {"problem": f"the validation loss at step {step} is {figures['val_loss']}"}
    return figures | {"tokens": tokens[-1] if tokens else None}


def _problem(each: Ended) -> str:
    return each.problem or "it ended without an evaluation"


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows]
    return None if None in values else statistics.mean(values)


def _step_flops(config: RunConfig) -> int:
    work = workload(config)
    return step_flops(work, work.plan)["total"]


def _step_tokens(config: RunConfig) -> int:
    return config.train.batch_size * config.data.sequence_length


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _order(value: Any) -> tuple[bool, Any]:
    return (False, value) if _is_number(value) else (True, str(value))


def table(study: Sweep) -> str:
    """The points as Markdown, the best first."""
    keys = [key for key, _ in study.points[0]]
    seeds = max((len(row["losses"]) for row in study.ranked()), default=1)
    loss = "validation loss" + (f" (mean of {seeds} seeds)" if seeds > 1 else "")
    lines = []
    for row in study.ranked():
        bits = row["val_bits_per_byte"]
        spread = [each for each in row["losses"] if each is not None]
        note = "; ".join(row["problems"])
        if not note and len(spread) > 1:
            note = " / ".join(f"{each:.4f}" for each in spread)
        cells = [
            *(str(value) for value in row["values"].values()),
            str(row["step"]),
            "-" if row["val_loss"] is None else f"{row['val_loss']:.4f}",
            "-" if bits is None else f"{bits:.4f}",
            note,
        ]
        lines.append(cells)
    return markdown_table([*keys, "steps", loss, "bits per byte", ""], lines)


def picture(study: Sweep) -> Path | None:
    """Draw loss against the first key that is numbers, a line for each combination of the others
    and rung, into sweep.png and sweep.svg; None: there is nothing to draw, or no matplotlib."""
    numeric = [key for key, value in study.points[0] if _is_number(value)]
    if not numeric:
        return None
    key = numeric[0]
    lines: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for share in sorted({row["share"] for row in study.rows}):
        for row in study.rung(share):
            if row["val_loss"] is None:
                continue
            others = ", ".join(f"{k}={v}" for k, v in row["point"] if k != key)
            lines.setdefault((others, share), []).append((row["values"][key], row["val_loss"]))
    if not lines:
        return None
    try:
        figure = new_figure(7, 4.2)
    except ConfigError:
        return None
    axes = figure.subplots()
    for (others, share), points in lines.items():
        label = ", ".join([*filter(None, [others]), f"{share:.0%} of the steps"])
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=label)
    if min((x for points in lines.values() for x, _ in points), default=0) > 0:
        axes.set_xscale("log")
    axes.set_xlabel(key)
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return save_both(figure, study.out / "sweep.png")[0]
