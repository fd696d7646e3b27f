"""What makes two rows of a study alike: parameters, memory or training FLOPs, by the cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.cost.step import step_flops, step_memory
from crnet.cost.workload import problems_of, workload
from crnet.errors import ConfigError

Kind = Literal["parameters", "memory", "flops"]

TOLERANCE = 0.01
"""Share by which aligned rows may differ."""


@dataclass(frozen=True)
class Aligned:
    """A row beside another one."""

    kind: Kind
    other: str
    ratio: float
    """Its figure over the other one's."""


def figure(config: RunConfig, kind: Kind) -> float:
    """Parameters of the whole model; bytes of state and of activations at their peak; FLOPs of an
    optimizer step, recomputation with it."""
    work = workload(config)
    if kind == "parameters":
        return work.num_parameters()
    return step_memory(work) if kind == "memory" else step_flops(work, work.plan)["total"]


def aligned(config: RunConfig, other: RunConfig, kind: Kind, name: str) -> Aligned:
    """Raises ``ConfigError`` where the two differ by more than 1%, with the rank that would do."""
    ratio = figure(config, kind) / figure(other, kind)
    if abs(ratio - 1) > TOLERANCE:
        try:
            rank = fitted(config, other, kind).model.rank
            mend = f"model.rank = {rank!r} comes nearest"
        except ConfigError:
            mend = "no rank comes near"
        raise ConfigError(f"has {ratio:.3f} of the {kind} of {name}, not the same; {mend}")
    return Aligned(kind, name, ratio)


def fitted(config: RunConfig, other: RunConfig, kind: Kind) -> RunConfig:
    """With the one rank, of all blocks and maps, at which a figure is nearest to another run's.

    Raises:
        ConfigError: no rank can be trained, or none changes the figure.
    Cost: some tens of evaluations of the cost model.
    """

    def at(rank: int) -> RunConfig:
        return override(config, model={"rank": str(rank)})

    wanted = figure(other, kind)
    low, high = 1, config.model.hidden_size
    while high > low and problems_of(at(high)):
        high -= 1 if high - low < 64 else 32
    if problems := problems_of(at(low)):
        raise ConfigError(problems)
    if figure(at(low), kind) == figure(at(high), kind):
        raise ConfigError(f"{config.model.linear} has no rank that changes its {kind}; leave align")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if figure(at(middle), kind) <= wanted else (low, middle)
    return min((at(low), at(high)), key=lambda each: abs(figure(each, kind) - wanted))
