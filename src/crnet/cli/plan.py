"""``crnet plan``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crnet.cli.arguments import DEFAULT_PRESET, Command, ConfigFiles, Json, plugin_words, print_json
from crnet.cli.layering import DEFAULTS, Settings
from crnet.config.sections import RunConfig
from crnet.config.serialize import command_line, to_dict
from crnet.errors import ConfigError

if TYPE_CHECKING:
    from crnet.cost.layout_choice import Choice
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
    devices: str | None = None,
    node: int = 8,
    network_gbps: float | None = None,
    config: ConfigFiles = (),
    as_json: Json = False,
    settings: Settings = DEFAULTS,
) -> None:
    """Find the largest ranks within a budget, the fastest layout on devices, or both; say why.

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
        As many parameters as LINEAR[:RANK] has in this shape; @OPTIMIZER: as many bytes of state.
    profile
        uniform, flat, middle-heavy, lower-heavy, upper-heavy, or weights of the low-rank blocks
        (1x7,1.5x8,1x8); /k=0.5 weighs a position.
    multiple
        Divides every rank; 16, 32 or 64 suit hardware.
    devices
        64xh100: finds --parallel.*, micro-batch, recomputation, compilation; keeps those given.
    node
        Devices in a machine.
    network_gbps
        Gb/s a device between machines; none: h100 and h200 400, a100 200, else 100.
    """
    run_config = _run(settings, preset)
    limits = (parameters, state_gib, memory_gib, flops_frac, like)
    wants_ranks = any(limit is not None for limit in limits)
    if devices is not None and not wants_ranks:
        _refuse("a budget", {"--profile": profile != "uniform", "--multiple": multiple != 1})
    if devices is None:
        _refuse("--devices", {"--node": node != 8, "--network-gbps": network_gbps is not None})
        _show(_ranks(run_config, limits, profile, multiple), as_json)
        return
    from crnet.cost import fleet, layout_choice

    found = _ranks(run_config, limits, profile, multiple) if wants_ranks else None
    on = fleet.parse_fleet(devices, node, network_gbps)
    _show_choice(layout_choice.choose(found.config if found else run_config, on), found, as_json)


def _run(settings: Settings, preset: str) -> RunConfig:
    """The run that is asked about. Raises ``ConfigError`` where it trains an adapter."""
    config = settings.of(preset)
    if config.train.adapter is not None:
        raise ConfigError(
            "--train.adapter: crnet plan chooses ranks and layouts for a run that trains every "
            "weight, and an adapter's model is given; leave it out"
        )
    return config


def _refuse(without: str, given: Mapping[str, bool]) -> None:
    """Flags that would have no effect."""
    if names := [name for name, is_given in given.items() if is_given]:
        raise ConfigError(f"{name} has no effect without {without}; leave it out" for name in names)


def _ranks(config: RunConfig, limits: Sequence[Any], profile: str, multiple: int) -> Found:
    """``limits``: in the order of ``Budget``'s fields."""
    from crnet.cost import rank_search

    parameters, *others = limits
    if parameters is not None and not 0 < parameters < float("inf"):
        raise ConfigError(f"--parameters is {parameters}; it must be above zero and finite")
    budget = rank_search.Budget(None if parameters is None else int(parameters), *others)
    return rank_search.find(config, budget, rank_search.parse_profile(profile), multiple)


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


def _show_choice(choice: Choice, found: Found | None, as_json: bool) -> None:
    words = _start(choice)
    if not as_json:
        texts = [found.explain()] if found else []
        print("\n\n".join([*texts, choice.explain(), shlex.join(words)]))
        return
    ranks = {} if found is None else {"rank": found.rank, "binding": found.binding}
    print_json(ranks | choice.figures() | {"command": words, "config": to_dict(choice.config)})


def _start(choice: Choice) -> list[str]:
    """The words that start the run, on every machine the same."""
    fleet = choice.space.fleet
    words = ["crnet", *command_line(choice.config), *plugin_words()]
    if fleet.size == 1:
        return words
    machines = fleet.size // fleet.node
    start = ["torchrun", "--nnodes", str(machines), "--nproc-per-node", str(fleet.node)]
    if machines > 1:
        # FIRST: the name of the first machine.
        start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "FIRST:29500"]
    return [*start, "-m", *words]


COMMAND = Command(plan, layers="run")
