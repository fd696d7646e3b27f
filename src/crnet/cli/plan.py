"""``crnet plan``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from crnet.cli.arguments import DEFAULT_PRESET, Command, ConfigFiles, Json, plugin_words, print_json
from crnet.cli.layering import DEFAULTS, Settings
from crnet.config.serialize import command_line, to_dict
from crnet.errors import ConfigError

if TYPE_CHECKING:
    from crnet.cost.rank_search import Found


def plan(
    preset: str = DEFAULT_PRESET,
    /,
    *,
    parameters: float | None = None,
    state_gib: float | None = None,
    memory_gib: float | None = None,
    flops_frac: float | None = None,
    like: str | None = None,
    profile: str = "uniform",
    multiple: int = 1,
    config: ConfigFiles = (),
    as_json: Json = False,
    settings: Settings = DEFAULTS,
) -> None:
    """Find the largest ranks within a budget, explain the choice, print the command that trains it.

    Parameters
    ----------
    preset
        A recipe; crnet list names them. Its ranks are replaced.
    parameters
        Most parameters of the whole model, for example 200e6.
    state_gib
        Most GiB of weights, gradients and optimizer state.
    memory_gib
        Most GiB in all, activations at their peak included, at the micro-batch given.
    flops_frac
        Most FLOPs of the blocks, as a share of full rank's.
    like
        As many parameters as another parameterization, LINEAR[:RANK], has in this shape; with
        @OPTIMIZER behind, as many bytes of state.
    profile
        uniform, flat, middle-heavy, lower-heavy, upper-heavy, or weights of the low-rank blocks
        (1x7,1.5x8,1x8); /k=0.5 behind it weighs a position.
    multiple
        Divides every rank; 16, 32 or 64 suit hardware.
    """
    from crnet.cost import rank_search

    if parameters is not None and not 0 < parameters < float("inf"):
        raise ConfigError(f"--parameters is {parameters}; it must be above zero and finite")
    budget = rank_search.Budget(
        parameters=None if parameters is None else int(parameters),
        state_gib=state_gib,
        memory_gib=memory_gib,
        flops_frac=flops_frac,
        like=like,
    )
    weights = rank_search.parse_profile(profile)
    _show(rank_search.find(settings.of(preset), budget, weights, multiple), as_json)


def _show(found: Found, as_json: bool) -> None:
    words = ["crnet", *command_line(found.config), *plugin_words()]
    if not as_json:
        print(f"{found.explain()}\n\n{shlex.join(words)}")
        return
    figures = {
        "rank": found.rank,
        "binding": found.binding,
        "parameters": found.parameters,
        "state_bytes": found.state_bytes,
        "peak_bytes": found.peak_bytes,
        "flops_frac": found.flops_frac,
        "command": words,
        "config": to_dict(found.config),
    }
    print_json(figures)


COMMAND = Command(plan, layers="run")
