"""``crnet list``."""

from __future__ import annotations

from typing import Any

from crnet import architectures, linears, optimizers, schedules, streams
from crnet.cli.arguments import Command, Json, print_json
from crnet.config import defaults, presets
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig, choose
from crnet.cost.parameters import num_parameters
from crnet.cost.workload import resolved


def list_known(*, as_json: Json = False) -> None:
    """Name the presets and the methods behind every seam."""
    seams = {
        "parameterizations": linears,
        "streams": streams,
        "architectures": architectures,
        "optimizers": optimizers,
        "schedules": schedules,
    }
    shown = (defaults.LINEAR, defaults.BASELINES[0])
    known: dict[str, Any] = {
        "presets": {
            name: {
                "summary": summary,
                "parameters_m": {each: round(_millions(recipe, each), 2) for each in shown},
            }
            for name, (summary, recipe) in presets.PRESETS.items()
        },
        "paper": {name: summary for name, (summary, _) in presets.PAPER.items()},
        **{
            title: {name: seam.get(name).summary for name in seam.names()}
            for title, seam in seams.items()
        },
    }
    if as_json:
        print_json(known)
        return
    print(f"presets (parameters in millions, {' and '.join(shown)})")
    for name, row in known["presets"].items():
        sizes = "".join(f"{row['parameters_m'][each]:>11,.2f}" for each in shown)
        print(f"  {name:12}{sizes}  {row['summary']}")
    print("the paper's own runs (crnet protocol NAME says what differs)")
    for name, summary in known["paper"].items():
        print(f"  {name:30} {summary}")
    for title in seams:
        print(title)
        for name, summary in known[title].items():
            print(f"  {name:15} {summary}")


def _millions(recipe: RunConfig, linear: str) -> float:
    """Parameters of a recipe with another parameterization."""
    model = choose(resolved(recipe).model, "linear", linear)
    return num_parameters(model_spec(model))["total"] / 1e6


COMMAND = Command(list_known)
