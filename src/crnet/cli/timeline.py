"""``crnet timeline``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from crnet.config.sections import share_of
from crnet.config.serialize import override
from crnet.errors import ConfigError

if TYPE_CHECKING:
    from crnet.cost.timeline import Timeline


def timeline(
    preset: Preset = DEFAULT_PRESET,
    /,
    *,
    device: str = "h100",
    link_gbps: float | None = None,
    plot: Path | None = None,
    config: ConfigFiles = (),
    as_json: Json = False,
    settings: Settings = DEFAULTS,
) -> None:
    """Draw when the processes of a pipeline compute and when they wait. Nothing is run.

    Parameters
    ----------
    device
        As of crnet cost: a100-80g, h100, h200, l40s, rtx-4090, ..., cpu, or FLOPS,GBPS that a
        device reaches.
    link_gbps
        Gigabytes that go from one process to the next in a second. Left out, sending takes no time.
    plot
        Also draw it, into PLOT.png and PLOT.svg.
    """
    from crnet.cost import hardware
    from crnet.cost.timeline import timeline_of
    from crnet.cost.workload import workload

    if link_gbps is not None and not 0 < link_gbps < float("inf"):
        raise ConfigError(f"--link-gbps is {link_gbps}; it must be above zero and finite")
    run_config = settings.of(preset)
    check(run_config)
    on = hardware.device(device)
    train: dict[str, Any] = {"batch_size": share_of(run_config)}
    if hardware.is_gpu(on) and run_config.train.device == "auto":
        train["device"] = "cuda"
    work = workload(override(run_config, train=train))
    link = None if link_gbps is None else link_gbps * 1e9
    line = timeline_of(work, run_config.parallel, on, link)
    title = (
        f"{run_config.preset} on {line.num_processes} x {on.name}, {line.schedule}, "
        f"{work.num_micro_batches} micro-batches"
    )
    if as_json:
        print_json(_figures(line, work.num_micro_batches))
    else:
        print(_text(line, work.num_micro_batches, title))
    if plot is not None:
        from crnet.report import timeline_plot

        say_pictures(plot, lambda: timeline_plot.plot(line, title, plot))


def _figures(line: Timeline, micro_batches: int) -> dict[str, Any]:
    from crnet.cost.timeline import equal_bubble

    return {
        "schedule": line.schedule,
        "processes": line.num_processes,
        "stages": line.num_stages,
        "micro_batches": micro_batches,
        "seconds": line.seconds,
        "bubble_frac": line.bubble,
        "equal_stages_bubble_frac": equal_bubble(
            line.num_processes, line.num_stages, micro_batches
        ),
        "in_flight": line.in_flight,
        "spans": [span._asdict() for span in line.spans],
    }


def _text(line: Timeline, micro_batches: int, title: str) -> str:
    from crnet.cost.timeline import equal_bubble, picture

    equal = equal_bubble(line.num_processes, line.num_stages, micro_batches)
    lines = [
        title,
        "forward 0 to 9 and backward a to j by the last digit of the micro-batch, waiting .",
        *(f"  {process:>3} {row}" for process, row in enumerate(picture(line))),
        f"seconds of all passes {line.seconds:.4f}; bubble {line.bubble:.4f}, "
        f"of equal stages {equal:.4f}",
        "process, its stages, most micro-batches in flight in each, share of the time it waits",
    ]
    for process in range(line.num_processes):
        mine = range(process, line.num_stages, line.num_processes)
        flying = ",".join(str(line.in_flight[stage]) for stage in mine)
        stages = ",".join(map(str, mine))
        lines.append(f"  {process:>3} {stages:>12}{flying:>12}{line.waiting(process):>12.4f}")
    return "\n".join(lines)


COMMAND = Command(timeline, layers="run")
