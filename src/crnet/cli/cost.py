"""``crnet cost``."""

from __future__ import annotations

from pathlib import Path

from crnet.cli.arguments import (
    DEFAULT_PRESET,
    Command,
    ConfigFiles,
    Json,
    Preset,
    print_json,
    say_pictures,
)
from crnet.cli.layering import DEFAULTS, Settings
from crnet.config.check import check


def cost(
    preset: Preset = DEFAULT_PRESET,
    /,
    *,
    device: str | None = None,
    ranks: int = 1,
    plot: Path | None = None,
    config: ConfigFiles = (),
    as_json: Json = False,
    settings: Settings = DEFAULTS,
) -> None:
    """Predict what a run takes: parameters, memory, FLOPs, communication, time. Nothing is run.

    Parameters
    ----------
    device
        Also the time of a step, eager, compiled and fused, on a100-80g, h100, h200, l40s, rtx-4090,
        ..., cpu, or FLOPS,GBPS that a device reaches. --train.precision auto is bf16-mixed on a
        named GPU.
    ranks
        Also the communication between so many devices.
    plot
        Draw memory and FLOPs of the parameterizations side by side, into PLOT.png and PLOT.svg.
    """
    from crnet.cost import table

    run_config = settings.of(preset)
    check(run_config)
    run_config, on = table.placed(run_config, device)
    rows, titles = table.table_of(run_config, on, ranks)
    if as_json:
        print_json({"rows": [vars(row) for row in rows], "titles": titles})
    else:
        print(table.render(rows, titles))
    if plot is not None:
        from crnet.report import cost_plot

        say_pictures(plot, lambda: cost_plot.plot(run_config, plot))


COMMAND = Command(cost, layers="run")
