"""Picture of a pipeline's step: a row a process, a bar a pass."""

from __future__ import annotations

from pathlib import Path

from crnet.cost.timeline import Timeline
from crnet.report.plots import new_figure, save_both

COLORS = ("tab:blue", "tab:green", "tab:purple", "tab:olive")
"""Of a process's stages, the lowest first; a backward pass is paler."""
FEW = 150
"""Passes of a process up to which each gets the number of its micro-batch."""


def plot(line: Timeline, title: str, path: Path) -> list[Path]:
    """Draw a timeline into PATH.png and PATH.svg (whatever ending ``path`` has); return both."""
    figure = new_figure(12, 0.45 * line.num_processes + 1.6)
    axes = figure.subplots()
    for process in range(line.num_processes):
        row = line.of_process(process)
        for span in row:
            chunk, is_forward = span.stage // line.num_processes, span.direction == "forward"
            color, length = COLORS[chunk % len(COLORS)], span.end_s - span.start_s
            pale = 1.0 if is_forward else 0.45
            label = f"stage {chunk + 1} of a process, {span.direction}"
            axes.barh(
                process, length, 0.9, span.start_s, color=color, alpha=pale, edgecolor="white",
                linewidth=0.4, label=label,
            )  # fmt: skip
            if len(row) <= FEW:
                at, ink = span.start_s + length / 2, "white" if is_forward else "black"
                number = str(span.micro_batch)
                axes.text(at, process, number, ha="center", va="center", fontsize=5, color=ink)
    handles, labels = axes.get_legend_handles_labels()
    named = dict(sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0]))
    figure.legend(named.values(), named.keys(), fontsize=7, ncols=4, loc="outside lower center")
    axes.set_yticks(range(line.num_processes))
    axes.set_ylim(line.num_processes - 0.5, -0.5)
    axes.set_xlim(0, line.seconds)
    axes.set_ylabel("process")
    axes.set_xlabel("seconds")
    axes.set_title(f"{title}: bubble {line.bubble:.3f}", fontsize=10)
    return save_both(figure, path)
