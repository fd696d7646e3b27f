"""How a run stands, as a few lines for a terminal: ``crnet watch``.

Only files are read, and the list of locks that the system keeps; nothing of it disturbs the run,
which may be that of another process, ended, or not begun. No torch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crnet.report.folder import RunFolder, config_of, manifest_of
from crnet.storage import metrics
from crnet.storage.files import held_by
from crnet.storage.metrics import METRICS

SILENT_S = 120
"""A run that no process of this machine holds, and that has written nothing for so long, ended."""
LATEST = 10
"""Rows over whose rates the time that is left is estimated."""
NARROWEST, WIDEST = 20, 100
"""Columns of a frame."""
CURVE_LINES = 6

Paint = Callable[[str, str], str]
"""Words and a style's name -> the words, perhaps in colour."""
_STYLES = {"head": "1", "good": "32", "bad": "31", "soft": "2", "line": "36"}


@dataclass(frozen=True, kw_only=True)
class State(RunFolder):
    """A run as its folder shows it at a moment."""

    age_s: float | None
    """Since something was last written; None: nothing was."""
    checkpoints: list[tuple[int, float]]
    """Step and age in seconds of every whole one, the newest last."""

    @property
    def is_finished(self) -> bool:
        return any(row["step"] >= self.config.train.steps for row in self.validation)

    @property
    def has_ended(self) -> bool:
        """Whether nobody trains it, as far as can be seen from here."""
        if self.pid is not None:
            return False
        return self.is_finished or self.age_s is None or self.age_s > SILENT_S

    @property
    def left_s(self) -> float | None:
        """Seconds of training until its last step, at the rate of the latest rows."""
        training = self.training[-LATEST:]
        rates = [row["tokens_per_s"] for row in training if (row.get("tokens_per_s") or 0) > 0]
        if not rates or not training[-1]["step"]:
            return None
        tokens = training[-1]["tokens"] / training[-1]["step"]
        harmonic = len(rates) / sum(1 / rate for rate in rates)
        return max(0, self.config.train.steps - self.step) * tokens / harmonic


def look(folder: Path) -> State:
    """Read a run's folder.

    Raises:
        ConfigError: there is no run, or its ``run.json`` cannot be used.
    Cost: the figures once from the disk.
    """
    config = config_of(folder, manifest_of(folder))
    rows, problems = metrics.rows_and_damage(folder / METRICS)
    return State(
        folder=folder,
        config=config,
        rows=rows,
        problems=problems,
        pid=held_by(folder),
        age_s=_age(folder / METRICS, time.time()),
        checkpoints=_checkpoints(folder),
    )


def _age(path: Path, now: float) -> float | None:
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None


def _checkpoints(folder: Path) -> list[tuple[int, float]]:
    found = []
    with contextlib.suppress(OSError):
        for path in (folder / "checkpoints").iterdir():
            name = re.fullmatch(r"step_(\d+)", path.name)
            age = _age(path, time.time())
            if name and age is not None:
                found.append((int(name[1]), age))
    return sorted(found)


# The frame


def plain(words: str, style: str) -> str:
    """No colour."""
    return words


def coloured(words: str, style: str) -> str:
    """As terminals understand it."""
    return f"\033[{_STYLES[style]}m{words}\033[0m"


def frame(state: State, width: int = 80, paint: Paint = plain, *, ascii_only: bool = False) -> str:
    """The lines of a run's state, none longer than ``width`` columns (20 at least).

    Args:
        paint: ``plain`` or ``coloured``.
        ascii_only: of a terminal that has no other characters: no curve.
    """
    width = min(max(width, NARROWEST), WIDEST)
    steps, step = state.config.train.steps, state.step
    lines = [
        (_fit(str(state.folder), width), "head"),
        (_fit(_standing(state), width), "good" if _is_well(state) else "bad"),
        (_bar(step / steps, width, ascii_only), "line"),
        *((line, "soft") for line in _wrapped(_progress(state), width)),
        *((line, "head") for line in _wrapped(_losses(state), width)),
    ]
    if not ascii_only:
        losses = [row["loss"] for row in state.training]
        lines += [(line, "line") for line in curve(losses, width, CURVE_LINES)]
    lines += [(line, "soft") for line in _wrapped(_figures(state), width)]
    lines += [(line, "bad") for each in state.problems for line in _wrapped([each], width)]
    return "\n".join(paint(line, style) for line, style in lines)


def _is_well(state: State) -> bool:
    return state.is_finished or not state.has_ended


def _standing(state: State) -> str:
    """In a sentence."""
    written = "" if state.age_s is None else f", last figures {ago(state.age_s)}"
    if state.is_finished:
        return "finished" if state.pid is None else f"finished, process {state.pid} is ending"
    if state.pid is not None:
        return f"training, process {state.pid}{written}"
    if state.has_ended:
        return f"stopped: no process here trains it{written}"
    return f"training elsewhere: no process here{written}"


def _progress(state: State) -> list[str]:
    steps, step = state.config.train.steps, state.step
    found = [f"step {step:,} of {steps:,} ({step / steps:.0%})"]
    if state.training:
        found.append(f"{state.training[-1]['tokens']:,} tokens")
    if not state.has_ended and not state.is_finished and (left := state.left_s) is not None:
        found.append(f"about {duration(left)} left")
    return found


def _losses(state: State) -> list[str]:
    found = []
    if training := state.training:
        found.append(f"loss {training[-1]['loss']:.4f}")
    if validation := state.validation:
        last = validation[-1]
        found.append(f"validation {last['val_loss']:.4f} at step {last['step']:,}")
        found += [
            f"{name} {last[key]:,.{digits}f}"
            for key, name, digits in _OF_VALIDATION
            if isinstance(last.get(key), (int, float))
        ]
    return found


_OF_VALIDATION = (
    ("val_perplexity", "perplexity", 2),
    ("val_bits_per_byte", "bits per byte", 3),
    ("val_accuracy", "accuracy", 3),
)


def _figures(state: State) -> list[str]:
    found = []
    if training := state.training:
        last = training[-1]
        found = [f"{last.get('tokens_per_s') or 0:,.0f} tokens/s"]
        found += [f"rate {last[key]:.2e}" for key in ("lr",) if key in last]
        found += [f"gradient {last[key]:.3f}" for key in ("grad_norm",) if key in last]
        if "peak_bytes" in last:
            found.append(f"{last['peak_bytes'] / 2**30:.2f} GiB at most")
    if state.checkpoints:
        step, age = state.checkpoints[-1]
        found.append(f"checkpoint of step {step:,}, {ago(age)}")
    else:
        found.append("no checkpoint yet")
    return found


# Lines


def _fit(words: str, width: int) -> str:
    """Shortened in front: the end of a path says more."""
    return words if len(words) <= width else f"...{words[len(words) - width + 3 :]}"


def _wrapped(parts: Iterable[str], width: int) -> list[str]:
    """Parts side by side, as many as fit; one that is longer than a line goes on in the next."""
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]}  {part}" if lines[-1] else part
        if len(joined) <= width:
            lines[-1] = joined
        else:
            lines += textwrap.wrap(part, width)
    return [line for line in lines if line]


def _bar(share: float, width: int, ascii_only: bool) -> str:
    done = round(min(share, 1.0) * width)
    full, empty = ("#", "-") if ascii_only else ("█", "░")
    return full * done + empty * (width - done)


def curve(values: Sequence[float], width: int, lines: int) -> list[str]:
    """A curve in braille dots, two by four a character, and its highest and lowest value beside.

    Values that are not finite are left out. Each column of dots is the mean of its values.
    """
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return []
    columns = (width - 8) * 2
    count = min(columns, len(finite))
    bounds = [round(idx * len(finite) / count) for idx in range(count + 1)]
    means = [sum(finite[low:high]) / (high - low) for low, high in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    cells = [[0] * (width - 8) for _ in range(lines)]
    before = None
    for column in range(columns):
        value = means[min(column * count // columns, count - 1)]
        dot = round((high - value) / (high - low or 1.0) * (4 * lines - 1))
        for each in _between(dot, before):
            cells[each // 4][column // 2] |= _DOTS[column % 2][each % 4]
        before = dot
    names = [f"{high:7.3f}"[:7], *[" " * 7] * (lines - 2), f"{low:7.3f}"[:7]]
    return [
        f"{name} {''.join(chr(0x2800 + cell) for cell in row)}"
        for name, row in zip(names, cells, strict=True)
    ]


def _between(dot: int, before: int | None) -> range:
    """The dots of a column, from the top: its own, and those that join it to the one before."""
    if before is None or abs(dot - before) <= 1:
        return range(dot, dot + 1)
    return range(before + 1, dot + 1) if dot > before else range(dot, before)


_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of a braille character's dots: left and right column, from the top."""


def duration(seconds: float) -> str:
    """Two units at most: 2 h 5 min."""
    whole = round(seconds)
    for unit, size, name, part in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {name}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def ago(seconds: float) -> str:
    """Since when."""
    return f"{duration(seconds)} ago"
