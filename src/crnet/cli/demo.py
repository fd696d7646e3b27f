"""``crnet demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from crnet.cli.arguments import Command, Json, Switch, print_json
from crnet.config.serialize import override
from crnet.train.folders import new_run

Sides = Annotated[tuple[str, ...], Parameter(name="--side", negative=())]


def demo(
    *,
    out: Path | None = None,
    steps: int | None = None,
    quick: Switch = False,
    sides: Sides = (),
    as_json: Json = False,
) -> None:
    """Train CR-Net and full rank side by side on this machine's own text; a few minutes.

    Parameters
    ----------
    out
        Folder of the two runs; none: a new one under crnet-runs.
    steps
        Steps of each run.
    quick
        A smaller model for some seconds: does everything work?
    sides
        Methods to train, the first of which writes a text; none: CR-Net and full rank.
    """
    from crnet.compare import demo as demonstration
    from crnet.report.plots import NEEDS

    configs = demonstration.sides_of(sides or demonstration.SIDES)
    if quick:
        configs = {side: demonstration.quick(config) for side, config in configs.items()}
    if steps is not None:
        told = {"steps": steps}
        configs = {side: override(config, train=told) for side, config in configs.items()}
    figures = demonstration.run(configs, out or new_run("demo"))
    if as_json:
        print_json(figures)
        return
    print(demonstration.table(figures))
    print(f"\nloss curves  {figures['picture'] or NEEDS}")
    for linear, row in figures["rows"].items():
        print(f"{linear:12} run {row['run']}, checkpoint {row['checkpoint']}")
    first = next(iter(figures["rows"]))
    print(f"\n{first} continues {figures['prompt']!r}:\n{figures['prompt']}{figures['sample']}")


COMMAND = Command(demo)
