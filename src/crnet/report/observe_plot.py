"""Pictures of ``measure.observe``: figure 2 (means by position) and figure 8 (by block)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crnet.report.plots import new_figure, save_both


def plot(means: Sequence[Mapping[str, Any]], found: Sequence[Any], path: Path) -> list[Path]:
    """Draw into PATH.png and PATH.svg (whatever ending ``path`` has); return both.

    Args:
        means: ``measure.observe.averages``.
        found: ``measure.observe.Observed``, of every map; a row of panes for each rank.
    """
    ranks = list(dict.fromkeys(row["rank"] for row in means))
    figure = new_figure(11, 3.2 * len(ranks))
    panes = figure.subplots(len(ranks), 2, squeeze=False)
    for (bars, heat), rank in zip(panes, ranks, strict=True):
        rows = [row for row in means if row["rank"] == rank]
        names = [row["position"] for row in rows]
        spots = range(len(rows))
        bars.bar([it - 0.2 for it in spots], [row["direct"] for row in rows], 0.4, label="direct")
        bars.bar([it + 0.2 for it in spots], [row["error"] for row in rows], 0.4, label="eq. 3")
        bars.set_xticks(list(spots), names)
        bars.set_ylabel(f"relative error, rank {rank}")
        bars.legend()
        positions = [name for name in names if name != "all"]
        blocks = sorted({each.block for each in found})
        errors = {(it.block, it.position): it.error for it in found if it.rank == rank}
        grid = [[errors[block, name] for name in positions] for block in blocks]
        image = heat.imshow(grid, aspect="auto", origin="lower", vmin=0, vmax=1)
        heat.set_xticks(range(len(positions)), positions)
        heat.set_yticks(range(len(blocks)), [str(block) for block in blocks])
        heat.set_ylabel("block")
        figure.colorbar(image, ax=heat, label="eq. 3")
    return save_both(figure, path)
