"""A study: which methods are compared, on what, tuned how, and what counts as better.

It is a TOML file, read and checked as a whole before anything is trained:

    title = "CR-Net beside plain low rank"
    preset = "tiny"
    seeds = [0, 1, 2]
    reference = "full"

    [base]                              # settings that all rows share
    train.steps = 1000

    [tuning]                            # left out: no row is tuned
    share = 0.1                         # of the steps, inside the whole schedule
    finalists = 2                       # points that go on to the end; left out: the best alone
    grid."optimizer.lr" = [1e-3, 2e-3, 4e-3]
    grow."optimizer.lr" = 2             # values more, at most, on a side where a row's best stands

    [rule]                              # left out: nothing is judged
    level = 0.01
    least_nats = 0.01

    [compat]                            # left out, as it should be: honest figures only
    batch_size = 64

    [rows.full]
    model.linear = "full"

    [rows.crnet]
    model = { linear = "crnet", rank = 48 }

    [rows.lowrank]
    model.linear = "lowrank"
    align = "parameters"                # as many as the row of align_to has, to 1%
    align_to = "crnet"

A row that is aligned and names no ``model.rank`` gets the rank that comes nearest.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from crnet.compare.align import Aligned, Kind, aligned, fitted
from crnet.compare.sweep import steps_at
from crnet.config import presets
from crnet.config.check import check
from crnet.config.keys import with_keys
from crnet.config.sections import SECTIONS, RunConfig
from crnet.config.serialize import build, flags, leaves, with_text
from crnet.errors import ConfigError

FOLDER = "studies"
"""Beside this file: the built-in studies."""


@dataclass(frozen=True)
class Tuning:
    """How every row is tuned."""

    grid: dict[str, tuple[Any, ...]]
    """Values by key; every combination is tried, by every row."""
    share: float = 0.1
    """Of its steps that a trial takes, inside the whole schedule."""
    seeds: int = 1
    """Of the study's, the first so many: a point is ranked by their mean."""
    finalists: int = 1
    """Of a row's points, so many of the best go on to the end; the best there is the row's."""
    grow: dict[str, int] = field(default_factory=dict)
    """By key: values that the grid can get on either side, for every row, while the best of any
    row stands there."""


@dataclass(frozen=True)
class Rule:
    """What is called better, fixed before anything is trained: Welch's t on the losses of the
    seeds, Holm's correction over all pairs, and a least difference."""

    level: float = 0.01
    """Of significance, of all pairs together."""
    least_nats: float = 0.0
    """A smaller difference of the means is a tie."""
    pairs: tuple[tuple[str, ...], ...] = ()
    """Rows beside each other; none: every row beside the reference."""


@dataclass(frozen=True)
class Compat:
    """Beside every figure the one that GaLore's script would print (``inference.compat``)."""

    batch_size: int
    """Rows of a batch of one process."""
    processes: int = 1


@dataclass(frozen=True)
class Row:
    """A method of a study."""

    name: str
    config: RunConfig
    """Before what is tuned."""
    grid: dict[str, tuple[Any, ...]]
    """Its own, as large as the study's; most rows have the study's."""
    published: float | None = None
    """The perplexity that a paper prints."""
    note: str = ""
    """For the reader: why the published figure differs, say."""
    alignment: Aligned | None = None


@dataclass(frozen=True)
class Study:
    """Everything that is fixed before the first step."""

    name: str
    title: str
    rows: dict[str, Row]
    seeds: tuple[int, ...]
    reference: str
    """The row that others are measured against."""
    tuning: Tuning | None
    rule: Rule | None
    compat: Compat | None
    """None: its figures are not wanted."""
    text: str
    """As the file has it."""

    def pairs(self) -> list[tuple[str, str]]:
        """What the rule judges: the first of a pair beside the second."""
        if self.rule and self.rule.pairs:
            return [(pair[0], pair[1]) for pair in self.rule.pairs]
        return [(name, self.reference) for name in self.rows if name != self.reference]


def names() -> list[str]:
    """Of the built-in studies."""
    folder = resources.files("crnet.compare") / FOLDER
    return sorted(each.name.removesuffix(".toml") for each in folder.iterdir())


def read(study: str) -> Study:
    """A built-in study by its name, or one in a file that ends in .toml.

    Raises:
        ConfigError: there is none, or anything in it is wrong: all of it.
    """
    if study in names():
        file = resources.files("crnet.compare") / FOLDER / f"{study}.toml"
        return parse(study, file.read_text(encoding="utf-8"))
    path = Path(study)
    if path.suffix != ".toml":
        raise ConfigError(f"{study}: is no study; there are {', '.join(names())}, and .toml files")
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file; built in are {', '.join(names())}")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error})") from error
    return parse(path.stem, text)


@dataclass(frozen=True)
class _File:
    """The keys of a study's file."""

    rows: dict[str, Any]
    title: str = ""
    preset: str = RunConfig.preset
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str | None = None
    base: dict[str, Any] = field(default_factory=dict)
    tuning: Tuning | None = None
    rule: Rule | None = None
    compat: Compat | None = None


@dataclass(frozen=True)
class _RowKeys:
    """What a row of the file has beside settings."""

    published: float | None = None
    note: str = ""
    align: Kind | None = None
    align_to: str | None = None
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)


def parse(name: str, text: str) -> Study:
    """Read a study. Raises ``ConfigError``: see ``read``."""
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: is not well-formed TOML ({error})") from error
    try:
        given = build(_File, values)
        base = _with(presets.get(given.preset), given.base)
        if problems := [*_problems(given)]:
            raise ConfigError(problems)
        rows = _rows(given, base)
    except ConfigError as error:
        raise ConfigError(f"{name}: {problem}" for problem in error.problems) from error
    reference = given.reference or next(iter(rows))
    study = Study(
        name=name,
        title=given.title or name,
        rows=rows,
        seeds=given.seeds,
        reference=reference,
        tuning=given.tuning,
        rule=given.rule,
        compat=given.compat,
        text=text,
    )
    if problems := [*_pair_problems(study)]:
        raise ConfigError(f"{name}: {problem}" for problem in problems)
    return study


def _problems(given: _File) -> Iterator[str]:
    """What is wrong with the keys that are not a row's."""
    seeds, tuning, rule = given.seeds, given.tuning, given.rule
    if not given.rows:
        yield 'it has no rows; write [rows.NAME] with settings, such as model.linear = "full"'
    if bad := [row for row in given.rows if not row or set(row) & set("/\\,=\0") or row[0] == "."]:
        yield f"the row {bad[0]!r} cannot be a folder; name it with letters, digits and -"
    if not seeds or len(set(seeds)) < len(seeds):
        yield f"seeds is {seeds}; it must list different numbers"
    if given.reference is not None and given.reference not in given.rows:
        yield f"reference is {given.reference!r}, which is no row; rows: {', '.join(given.rows)}"
    if tuning:
        if not 0 < tuning.share <= 1:
            yield f"tuning.share is {tuning.share}; it must be above 0 and at most 1"
        if not 1 <= tuning.seeds <= len(seeds):
            yield f"tuning.seeds is {tuning.seeds}; it must be 1 to {len(seeds)}"
        if not 1 <= tuning.finalists <= (most := math.prod(map(len, tuning.grid.values()))):
            yield f"tuning.finalists is {tuning.finalists}; it must be 1 to {most}"
        yield from _grid_problems("tuning.grid", tuning.grid)
        for key, count in tuning.grow.items():
            if key not in tuning.grid:
                yield f"tuning.grow names {key}, which the grid does not have"
            elif count < 0 or ratio(tuning.grid[key]) is None:
                yield f"tuning.grow.{key}: only a grid of two or more rising numbers can grow"
    if rule and not 0 < rule.level < 1:
        yield f"rule.level is {rule.level}; it must be between 0 and 1"
    if rule and not 0 <= rule.least_nats < math.inf:
        yield f"rule.least_nats is {rule.least_nats}; it must be 0 or more"
    if given.compat and min(given.compat.batch_size, given.compat.processes) < 1:
        yield f"compat is {vars(given.compat)}; both must be 1 or more"
    for pair in rule.pairs if rule else ():
        if len(pair) != 2 or not {*pair} <= {*given.rows} or len({*pair}) < 2:
            yield f"rule.pairs has {pair}; a pair is two rows"


def _grid_problems(where: str, grid: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    if not grid:
        yield f'{where} names nothing; write {where}."optimizer.lr" = [1e-3, 3e-3]'
    for key, values in grid.items():
        if not values or len({str(each) for each in values}) < len(values):
            yield f"{where}.{key} is {values}; it must list different values"
        if key == "train.seed":
            yield f"{where} has train.seed; a seed is no setting that is chosen, say seeds"


def _pair_problems(study: Study) -> Iterator[str]:
    if study.rule and len(study.seeds) < 2:
        yield "a rule needs two seeds or more; add some to seeds, or leave [rule] out"
    if study.rule and not study.pairs():
        yield "the rule has nothing to judge; add a second row"


def ratio(values: Sequence[Any]) -> float | None:
    """From the last but one number of a grid to the last; None: it cannot grow."""
    numbers = [each for each in values if isinstance(each, (int, float)) and each > 0]
    if len(numbers) < max(len(values), 2) or sorted(numbers) != numbers:
        return None
    return numbers[-1] / numbers[-2]


def _rows(given: _File, base: RunConfig) -> dict[str, Row]:
    """Every row, in the file's order; what is aligned after what it is aligned to."""
    found: dict[str, Row] = {}
    problems: list[str] = []
    keys = {name: _row_keys(name, values, problems) for name, values in given.rows.items()}
    if problems:
        raise ConfigError(problems)
    waiting = list(given.rows)
    while waiting:
        ready = [name for name in waiting if keys[name].align_to in (None, *found)]
        if not ready:
            raise ConfigError(
                f"rows.{name}: align_to is {keys[name].align_to!r}, which "
                + ("waits for it" if keys[name].align_to in given.rows else "is no row")
                for name in waiting
            )
        for name in ready:
            waiting.remove(name)
            try:
                found[name] = _row(name, given, base, keys[name], found)
            except ConfigError as error:
                problems += [f"rows.{name}: {problem}" for problem in error.problems]
        if problems:
            raise ConfigError(problems)
    return {name: found[name] for name in given.rows}


def _row_keys(name: str, values: Any, problems: list[str]) -> _RowKeys:
    try:
        if not isinstance(values, Mapping):
            raise ConfigError(f"is {values!r}, no table of settings")
        keys = build(_RowKeys, {key: each for key, each in values.items() if key not in SECTIONS})
        if (keys.align is None) != (keys.align_to is None):
            raise ConfigError("align and align_to go together")
    except ConfigError as error:
        problems += [f"rows.{name}: {problem}" for problem in error.problems]
        return _RowKeys()
    return keys


def _row(
    name: str, given: _File, base: RunConfig, keys: _RowKeys, others: Mapping[str, Row]
) -> Row:
    settings = {key: each for key, each in given.rows[name].items() if key in SECTIONS}
    config = _with(base, settings)
    alignment = None
    if keys.align and keys.align_to:
        other = others[keys.align_to].config
        if "rank" not in settings.get("model", {}):
            config = fitted(config, other, keys.align)
        alignment = aligned(config, other, keys.align, keys.align_to)
    check(config)
    if config.train.epochs is not None:
        raise ConfigError("a study trains for train.steps; leave train.epochs out")
    if given.tuning and last_step(config) < steps_at(config, given.tuning.share):
        raise ConfigError("train.stop_after_steps ends before tuning.share of the steps")
    grid = keys.grid or (dict(given.tuning.grid) if given.tuning else {})
    if given.tuning and math.prod(map(len, grid.values())) != math.prod(
        map(len, given.tuning.grid.values())
    ):
        raise ConfigError("its grid has another number of points than the study's: tuned unlike")
    if problems := [*_grid_problems("grid", keys.grid)] if keys.grid else []:
        raise ConfigError(problems)
    if given.tuning and (missing := [each for each in given.tuning.grow if each not in grid]):
        raise ConfigError(f"its grid has no {missing[0]}, which grows")
    for key, values in grid.items():
        for value in values:
            check(with_text(config, key, str(value)))
    return Row(name, config, grid, keys.published, keys.note, alignment)


def _with(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Raises ``ConfigError`` for a key that there is not."""
    if strange := [key for key in settings if key not in SECTIONS]:
        raise ConfigError(f"{strange[0]} is no section; known are {', '.join(SECTIONS)}")
    nones = [key for key, value in leaves(settings) if value == NONE]
    config = with_keys(config, _without_nones(settings))
    for key in nones:
        config = with_text(config, key, NONE)
    return config


NONE = "none"
"""TOML has no word for nothing; it is read as the command line reads it."""


def _without_nones(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nones(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value != NONE
    }


def last_step(config: RunConfig) -> int:
    """Where a run of the study ends: its last step, or the one that it is to stop at."""
    return min(config.train.steps, config.train.stop_after_steps or config.train.steps)


def differing(was: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Keys in which two runs would have other figures: what was, what is."""
    ours = settings(now)
    return {key: (value, ours[key]) for key, value in settings(was).items() if ours[key] != value}


def settings(config: RunConfig) -> dict[str, Any]:
    """What the figures of a run hang on; runs that are alike in it are one run."""
    return {key: value for key, value in flags(config) if key not in NO_FIGURE}


NO_FIGURE = {
    f"train.{key}"
    for key in (
        *("threads", "device", "stop_after_steps", "log_every_steps", "eval_every_steps"),
        *("save_every_steps", "keep_checkpoints", "trackers", "tensorboard"),
    )
} | {"data.cache_dir"}
"""Keys that change no loss: a run with other values of them is the same run."""
