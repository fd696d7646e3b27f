"""Pictures of the cost model: memory and FLOPs of the parameterizations side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from crnet import linears
from crnet.config.sections import RunConfig, precision_of
from crnet.config.units import GIB
from crnet.cost.kept import kept_bytes
from crnet.cost.peak import peak_bytes
from crnet.cost.step import step_flops
from crnet.cost.table import plans
from crnet.cost.workload import PLAIN, with_linear, workload
from crnet.report.plots import new_figure, save_both

STATES = ("weights", "gradients", "optimizer state")
FLOPS = ("blocks forward", "blocks backward", "recomputation", "head forward", "head backward")

Bars = dict[str, dict[str, float]]
"""By name, the parts of a bar from the bottom up."""


def bars(config: RunConfig) -> tuple[Bars, Bars]:
    """What the picture shows: memory and FLOPs.

    One bar for every parameterization and recompute policy that go together, all of the
    configuration's shape. ``--model.rank`` is kept where the parameterization can read it, else its
    ``aligned-parameters``, else a quarter of the hidden size.
    """
    memory: Bars = {}
    flops: Bars = {}
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, **PLAIN))
    for linear in linears.names():
        work = workload(with_linear(plain, linear, config.model.rank))
        for policy, plan in plans(work).items():
            peak = peak_bytes(work.micro_batch, plan)
            kept = sum(kept_bytes(work.micro_batch, plan).values())
            bar = f"{linear}, {policy}"
            memory[bar] = {term: work.state_bytes[term] / GIB for term in STATES} | {
                "activations kept": min(kept, peak) / GIB,
                "more at the peak": max(peak - kept, 0) / GIB,
            }
            counted = step_flops(work, plan)
            flops[bar] = {term: counted[term] for term in FLOPS}
    return memory, flops


def plot(config: RunConfig, path: Path) -> list[Path]:
    """Draw ``bars`` into PATH.png and PATH.svg (whatever ending ``path`` has); return both."""
    memory, flops = bars(config)
    micro_batch = workload(config).micro_batch
    batch = f"micro-batch {micro_batch.sequences} x {micro_batch.length}"
    figure = new_figure(12, 0.36 * len(memory) + 1.6)
    panes = figure.subplots(1, 2, sharey=True)
    for pane, parts, label in (
        (panes[0], memory, f"GiB at the peak, {batch}"),
        (panes[1], flops, "FLOPs of a step"),
    ):
        _draw(pane, parts, label)
    figure.suptitle(
        f"{config.preset}: hidden size {config.model.hidden_size}, "
        f"{config.model.num_layers} blocks, {precision_of(config.train)}"
    )
    return save_both(figure, path)


def _draw(pane, bars: Bars, label: str) -> None:
    """Stacked bars, the first on top."""
    names = list(bars)[::-1]
    left = [0.0] * len(names)
    for term in bars[names[0]]:
        widths = [bars[name][term] for name in names]
        pane.barh(names, widths, left=left, label=term)
        left = [at + width for at, width in zip(left, widths, strict=True)]
    pane.set_xlabel(label)
    pane.grid(axis="x", alpha=0.3)
    pane.legend(fontsize=7)
