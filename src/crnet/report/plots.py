"""Pictures of runs, from the rows of metrics.jsonl."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from crnet.storage.metrics import Row


def plot_losses(curves: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw training and validation loss against tokens, one colour a run, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
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
    pyplot.close(figure)
