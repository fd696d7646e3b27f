"""Pictures of runs, from the rows of metrics.jsonl."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crnet.errors import ConfigError
from crnet.storage.metrics import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NEEDS = "pictures need the package matplotlib; pip install 'crnet[plot]'"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. Raises ``ConfigError`` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # pyplot would set the program's own backend
    except ImportError as error:
        raise ConfigError(NEEDS) from error

    return Figure(figsize=(width, height), layout="constrained")


def save_both(figure: Figure, path: Path, dpi: int = 120) -> list[Path]:
    """Write a figure to PATH.png and PATH.svg (whatever ending ``path`` has); return both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(ending) for ending in (".png", ".svg")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fonts of the user's machine
        for file in files:
            figure.savefig(file, dpi=dpi)
    return files


def loss_picture(curves: Mapping[str, Sequence[Row]], path: Path) -> Path | None:
    """``plot_losses``; None where matplotlib is missing: a run has ended, and only lacks it."""
    try:
        plot_losses(curves, path)
    except ConfigError:
        return None
    return path


def plot_losses(curves: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw training and validation loss against tokens, one colour a run, into a PNG."""
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    for index, (label, rows) in enumerate(curves.items()):
        color = f"C{index}"
        train = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
        tokens_at = {row["step"]: row["tokens"] for row in rows if "loss" in row} | {0: 0}
        valid = [
            (tokens_at[row["step"]], row["val_loss"])
            for row in rows
            if "val_loss" in row and row["step"] in tokens_at
        ]
        if train:
            axes.plot(*zip(*train, strict=True), color=color, alpha=0.3, linewidth=0.8)
        if valid:
            axes.plot(*zip(*valid, strict=True), color=color, marker="o", markersize=3, label=label)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token); points: validation")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fonts of the user's machine
        figure.savefig(path, dpi=120)
