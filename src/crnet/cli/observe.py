"""``crnet observe``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from crnet.cli.arguments import (
    CheckpointPath,
    Command,
    DataFiles,
    Device,
    Json,
    print_json,
    say_pictures,
)
from crnet.cli.layering import open_checkpoint
from crnet.config.check import check
from crnet.config.sections import DataConfig, RunConfig

Fracs = Annotated[tuple[float, ...], Parameter(negative=(), consume_multiple=True)]


def observe(
    checkpoint: CheckpointPath,
    /,
    *,
    rank_fracs: Fracs = (0.25, 0.5),
    plot: Path | None = None,
    config: DataFiles = (),
    as_json: Json = False,
    device: Device = "auto",
    data: DataConfig = DataConfig(),
) -> None:
    """Compare the outputs of every map with those of the block below: the paper's section 3.1.

    Parameters
    ----------
    rank_fracs
        Ranks of what is added to the block below, as shares of the hidden size.
    plot
        Draw the errors by position and by block, into PLOT.png and PLOT.svg.
    """
    check(RunConfig(data=data))

    from crnet.measure import observe as measure

    found = measure.observe_on(open_checkpoint(checkpoint), data, device, rank_fracs)
    means = measure.averages(found)
    if as_json:
        print_json({"averages": means, "maps": measure.as_rows(found)})
    else:
        print(measure.render(means))
    if plot is not None:
        from crnet.report import observe_plot

        say_pictures(plot, lambda: observe_plot.plot(means, found, plot))


COMMAND = Command(observe, layers="checkpoint")
