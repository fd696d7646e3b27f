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
from crnet.config.serialize import override
from crnet.errors import ConfigError


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
    from crnet.cost import hardware, table
    from crnet.cost.workload import workload

    if ranks < 1:
        raise ConfigError(f"--ranks is {ranks}; it must be 1 or more")
    run_config = settings.of(preset)
    check(run_config)
    on = hardware.device(device) if device else None
    if on and hardware.is_gpu(on) and run_config.train.device == "auto":
        run_config = override(run_config, train={"device": "cuda"})
    work = workload(run_config)
    rows, titles = table.cost_rows(work, on, ranks), table.titles(work, on, ranks)
    if as_json:
        print_json({"rows": [vars(row) for row in rows], "titles": titles})
    else:
        print(table.render(rows, titles))
    if plot is not None:
        from crnet.report import cost_plot

        say_pictures(plot, lambda: cost_plot.plot(run_config, plot))


COMMAND = Command(cost, layers="run")
