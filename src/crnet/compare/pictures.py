"""A study's pictures: curves with the band of their seeds, loss against cost, loss against rate."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crnet.errors import ConfigError
from crnet.report.plots import new_figure, save_both

COSTS = {
    "parameters": "parameters, M",
    "memory": "memory at the peak, MiB",
    "flops_a_token": "training FLOPs a token, M",
}
MARKERS = "osD^v<>pPX*h"


def draw(found: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw what there is, as PNG and SVG; empty: matplotlib is missing.

    Args:
        found: what ``results.results`` made.
    """
    try:
        figures = {"curves": _curves(found), "costs": _costs(found), "tuning": _tuning(found)}
    except ConfigError:
        return []
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    return [path for name, figure in drawn.items() for path in save_both(figure, out / name)]


def _style(idx: int) -> dict[str, Any]:
    """Ten colours, then the same with other markers and broken lines."""
    return {
        "color": f"C{idx % 10}",
        "linestyle": ("-", "--", ":")[idx // 10 % 3],
        "marker": MARKERS[idx % len(MARKERS)],
        "markersize": 4,
    }


def _curves(found: Mapping[str, Any]) -> Any:
    """Validation loss against tokens: the mean, and the band from the least to the largest."""
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    lows = []
    for idx, (name, row) in enumerate(found["rows"].items()):
        curves = [dict(run["curve"]) for run in row["runs"] if run["curve"]]
        if not curves:
            continue
        common = [each for each in curves[0] if all(each in curve for curve in curves) and each]
        losses = [[curve[tokens] for curve in curves] for tokens in common]
        if not common:
            continue
        axes.plot(common, [statistics.mean(each) for each in losses], label=name, **_style(idx))
        least, most = [min(each) for each in losses], [max(each) for each in losses]
        axes.fill_between(common, least, most, color=f"C{idx % 10}", alpha=0.15, linewidth=0)
        lows += [min(least), sorted(most)[len(most) // 2]]
    if not lows:
        return None
    axes.set_ylim(min(lows) - 0.05, 1.25 * max(lows) - 0.25 * min(lows) + 0.1)
    axes.set_xlabel("tokens")
    axes.set_ylabel("validation loss (nats per token)")
    return _finished(figure, axes)


def _costs(found: Mapping[str, Any]) -> Any:
    """Final loss against what a row costs; the line joins what nothing beats on both."""
    rows = {name: row for name, row in found["rows"].items() if row["val_loss"] is not None}
    if not rows:
        return None
    figure = new_figure(12, 4.4)
    panels = list(figure.subplots(1, len(COSTS)))
    for axes, (key, label) in zip(panels, COSTS.items(), strict=True):
        points = {name: (cost_of(row, key), row["val_loss"]) for name, row in rows.items()}
        front = pareto(list(points.values()))
        axes.plot(*zip(*front, strict=True), color="0.6", linewidth=1, zorder=1)
        for idx, (name, (cost, loss)) in enumerate(points.items()):
            error = rows[name]["val_loss_sd"] or 0
            axes.errorbar(cost, loss, yerr=error, label=name, capsize=2, **_style(idx))
        axes.set_xlabel(label)
        axes.set_ylabel("validation loss (nats per token)")
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=8)
    return figure


def cost_of(row: Mapping[str, Any], key: str) -> float:
    """In the unit of ``COSTS``."""
    if key == "memory":
        parts = ("weight", "gradient", "optimizer", "activation")
        return sum(row[f"{part}_bytes"] for part in parts) / 2**20
    return row[key] / 1e6


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other one beats on one figure without losing on the other, cheapest first."""
    found: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not found or loss < found[-1][1]:
            found.append((cost, loss))
    return found


def _tuning(found: Mapping[str, Any]) -> Any:
    """Loss at the trials' end against the first key that is numbers, a line a row and a
    combination of the other keys."""
    lines: dict[str, list[tuple[float, float]]] = {}
    style: dict[str, dict[str, Any]] = {}
    label = ""
    for idx, (name, row) in enumerate(found["rows"].items()):
        points = row["tuning"]["points"] if row["tuning"] else []
        numbers = [key for key in (points[0]["values"] if points else ()) if _rises(points, key)]
        if not numbers:
            continue
        label = numbers[0]
        for each in points:
            if each["val_loss"] is None:
                continue
            others = ", ".join(
                f"{key.rpartition('.')[2]} {value}"
                for key, value in each["values"].items()
                if key != label
            )
            line = ", ".join(filter(None, [name, others]))
            if line not in lines:
                number = sum(known["color"] == f"C{idx % 10}" for known in style.values())
                style[line] = _style(idx) | {"linestyle": ("-", "--", ":", "-.")[number % 4]}
            lines.setdefault(line, []).append((each["values"][label], each["val_loss"]))
    if not lines:
        return None
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    for line, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), label=line, **style[line])
    losses = sorted(loss for _, loss in itertools.chain.from_iterable(lines.values()))
    axes.set_ylim(losses[0] - 0.05, losses[len(losses) * 3 // 4] + 0.3)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel(f"validation loss at {100 * found['tuning']['share']:g}% of the steps")
    return _finished(figure, axes)


def _rises(points: Sequence[Mapping[str, Any]], key: str) -> bool:
    values = {each["values"][key] for each in points}
    return len(values) > 1 and all(isinstance(each, (int, float)) for each in values)


def _finished(figure: Any, axes: Any) -> Any:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    return figure
