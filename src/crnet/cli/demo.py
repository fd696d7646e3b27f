"""``crnet demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from crnet.cli.arguments import DEFAULT_PRESET, Command, Json, Switch, print_json
from crnet.config import presets
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

    config = demonstration.short(presets.get(DEFAULT_PRESET))
    config = demonstration.quick(config) if quick else config
    config = override(config, train={"steps": steps}) if steps is not None else config
    chosen = sides or demonstration.SIDES
    figures = demonstration.run(config, out or new_run("demo"), sides=chosen)
    if as_json:
        print_json(figures)
        return
    print(demonstration.table(figures))
    print(f"\nloss curves  {figures['picture'] or NEEDS}")
    for linear, row in figures["rows"].items():
        print(f"{linear:12} run {row['run']}, checkpoint {row['checkpoint']}")
    print(f"\n{chosen[0]} continues {figures['prompt']!r}:\n{figures['prompt']}{figures['sample']}")


COMMAND = Command(demo)
