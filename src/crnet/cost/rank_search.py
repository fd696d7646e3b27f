"""The largest ranks within a budget of parameters, memory or FLOPs: what ``crnet plan`` prints.

Closed forms, no tensor and no torch: the scale of a profile's weights is found by bisection, and
what rounding leaves is spent block by block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from crnet import linears, optimizers
from crnet.config import defaults
from crnet.config.check import check
from crnet.config.sections import RunConfig, choose
from crnet.config.serialize import override
from crnet.config.units import GIB
from crnet.cost.parameters import num_parameters
from crnet.cost.rank_space import Kind, Ranks, RankSpace, use
from crnet.cost.workload import PLAIN, Workload, problems_of, with_linear, workload
from crnet.errors import ConfigError

PROFILES = ("uniform", "flat", "middle-heavy", "lower-heavy", "upper-heavy")
HEAVY, LIGHT = 256, 192  # the ranks of the paper's ablation of profiles, appendix E.2.6

KINDS: tuple[Kind, ...] = ("parameters", "state", "memory", "flops")


@dataclass(frozen=True)
class Budget:
    """Limits. All that are given hold; at least one is."""

    parameters: int | None = None
    """Of the whole model, embedding and head among them."""
    state_gib: float | None = None
    """Weights, gradients and optimizer state, in GiB."""
    memory_gib: float | None = None
    """State and the peak of activations at the configured micro-batch and policy, in GiB."""
    flops_frac: float | None = None
    """Forward FLOPs of the blocks over those of full rank."""
    like: str | None = None
    """LINEAR[:RANK]: as many parameters as that has in this shape. LINEAR[:RANK]@OPTIMIZER: as many
    bytes of state as it has there."""


@dataclass(frozen=True)
class RankProfile:
    """How ranks relate to each other; the scale comes from the budget."""

    name: str = "uniform"
    """uniform: one rank everywhere. flat: the same, but what is left raises single blocks, the
    topmost first. middle-heavy, lower-heavy, upper-heavy: a third of the blocks gets 256/192 of
    the others' rank (the paper's S2, S1 and S3)."""
    layers: tuple[float, ...] = ()
    """Instead of the name: a weight for each block that a schedule speaks of, bottom first."""
    positions: Mapping[str, float] = field(default_factory=dict)
    """Weights of positions; 1 where none is given."""

    @property
    def is_uniform(self) -> bool:
        """Whether what is left stays unspent."""
        return self.name == "uniform" and not self.layers

    def weights(self, num_blocks: int, positions: Sequence[str]) -> list[tuple[float, ...]]:
        """Of each block, a weight a position. Raises ``ConfigError``: unknown names, or not one
        weight a block."""
        every, num = (*self.layers, *self.positions.values()), len(self.layers) or num_blocks
        wanted = {
            f"--profile {self.name}: known are {', '.join(PROFILES)}": self.name in PROFILES,
            f"--profile gives {num} weights for {num_blocks} low-rank blocks": num == num_blocks,
            f"--profile: positions are {', '.join(positions)}": {*self.positions} <= {*positions},
            "--profile: weights must lie in (0, 1e9)": all(0 < each < 1e9 for each in every),
        }
        if problems := [problem for problem, fine in wanted.items() if not fine]:
            raise ConfigError(problems)
        top = num_blocks - (heavy := max(1, num_blocks // 3))
        starts = {"lower-heavy": 0, "middle-heavy": top // 2, "upper-heavy": top}
        start = starts.get(self.name, num_blocks)
        layers = self.layers or [
            HEAVY if 0 <= idx - start < heavy else LIGHT for idx in range(num_blocks)
        ]
        return [tuple(each * self.positions.get(at, 1.0) for at in positions) for each in layers]


def parse_profile(text: str) -> RankProfile:
    """Read ``flat``, ``middle-heavy/k=0.5`` or ``1x7,1.5x8,1x8/down=2``, or raise ConfigError."""
    common, *apart = text.split("/")
    try:
        positions = {at: float(weight) for at, weight in (word.split("=") for word in apart)}
        if common[:1].isalpha():
            return RankProfile(common, (), positions)
        runs = [part.partition("x") for part in common.split(",")]
        layers = tuple(float(weight) for weight, _, n in runs for _ in range(int(n or 1)))
    except ValueError as error:
        raise ConfigError(
            f"--profile {text} cannot be read; write one of {', '.join(PROFILES)}, or weights of "
            "the low-rank blocks such as 1x7,1.5x8,1x8; /k=0.5 after it weighs a position"
        ) from error
    return RankProfile("flat", layers, positions)


@dataclass(frozen=True)
class Limit:
    """One limit, and what of it is used: items, bytes or a share, by ``kind``."""

    flag: str
    kind: Kind
    most: float
    used: float = math.nan

    def holds(self, space: RankSpace, ranks: Ranks) -> bool:
        """Whether these ranks stay within it."""
        return space.use(ranks, self.kind) <= self.most

    def show(self, number: float, up: bool = False) -> str:
        """The number with its unit; ``up``: rounded upwards, so that it would do as a limit."""
        return show(self.kind, number, up)


def show(kind: Kind, number: float, up: bool = False) -> str:
    """A number of that kind with its unit."""
    units = {"parameters": (1e6, 2, "M"), "flops": (1, 4, " of full rank")}
    scale, decimals, unit = units.get(kind, (GIB, 3, " GiB"))
    number /= scale
    number = math.ceil(number * 10**decimals) / 10**decimals if up else number
    return f"{number:,.{decimals}f}{unit}"


@dataclass(frozen=True)
class Found:
    """The largest ranks within the budget, and what they take."""

    rank: str
    """The schedule, for ``--model.rank``."""
    config: RunConfig
    limits: list[Limit]
    """The budget, with what is used of it."""
    binding: list[str]
    """Flags that forbid larger ranks; none: every rank has reached its width."""
    parameters: dict[str, int]
    """``parameters.num_parameters``: by position and what else there is; the ``total``."""
    state_bytes: dict[str, int]
    peak_bytes: int
    """State and the peak of activations."""
    flops_frac: float

    def explain(self) -> str:
        """Which limit binds, what of each is used, and what the baselines of this shape take."""
        binds = ", ".join(self.binding) or "nothing, every rank has reached its width"
        lines = [f"{self.config.model.linear} --model.rank {self.rank}; binds: {binds}"]
        lines += [
            f"  {each.flag}: {each.show(each.used)} of {each.show(each.most)} "
            f"({each.used / each.most:.1%})"
            for each in self.limits
        ]
        lines.append(f"{'':36}{'parameters':>13}{'state':>14}{'at the peak':>14}  block FLOPs")
        baselines = [with_linear(self.config, name) for name in defaults.BASELINES]
        works = [workload(config) for config in (self.config, *baselines)]
        lines += map(_line, works)
        if any(use(works[0], kind) > use(works[1], kind) for kind in ("parameters", "flops")):
            lines.append("above full rank: factors of so large ranks cost more than they replace")
        return "\n".join(lines)


def _line(work: Workload) -> str:
    """What a run takes, in columns."""
    ranks = [slot.rank for block in work.spec.slots for slot in block if slot.rank]
    ends = sorted({min(ranks), max(ranks)}) if ranks else []
    named = f"{work.spec.linear.name} {'..'.join(map(str, ends))}".strip()
    texts = [show(kind, use(work, kind)) for kind in KINDS]
    name = f"{named}, recompute {work.plan.policy}"
    return f"{name:36}{texts[0]:>13}{texts[1]:>14}{texts[2]:>14}  {texts[3]}"


def limits_of(config: RunConfig, budget: Budget) -> list[Limit]:
    """The limits. Raises ``ConfigError``: none given, unreadable, or not above zero."""
    limits, keys = [], ("parameters", "state_gib", "memory_gib", "flops_frac")
    for key, kind in zip(keys, KINDS, strict=True):
        if (value := getattr(budget, key)) is not None:
            unit = GIB if key.endswith("gib") else 1
            limits.append(Limit(f"--{key.replace('_', '-')}", kind, value * unit))
    if bad := [each for each in limits if not 0 < each.most < math.inf]:
        raise ConfigError(
            f"{each.flag} is {each.show(each.most)}; it must be above zero and finite"
            for each in bad
        )
    limits += [] if budget.like is None else [_like(config, budget.like)]
    if not limits:
        raise ConfigError(
            "no budget is given; give one or more of --parameters, --state-gib, --memory-gib, "
            "--flops-frac, --like"
        )
    if config.train.recompute == "auto":
        flag, most = "--train.activation-budget-gib", config.train.activation_budget_gib or 0
        limits.append(Limit(flag, "activations", most * GIB))
    return limits


def _like(config: RunConfig, like: str) -> Limit:
    method, _, optimizer = like.partition("@")
    linear, _, rank = method.partition(":")
    known = (*linears.names(), *optimizers.names())
    if linear not in linears.names() or (optimizer and optimizer not in optimizers.names()):
        raise ConfigError(
            f"--like {like}: write LINEAR[:RANK][@OPTIMIZER]; there are {', '.join(known)}"
        )
    model = dataclasses.replace(
        choose(config.model, "linear", linear), rank=rank or config.model.rank
    )
    other = dataclasses.replace(
        config,
        model=model,
        optimizer=choose(config.optimizer, "name", optimizer or config.optimizer.name),
        train=dataclasses.replace(config.train, **PLAIN),
    )
    if problems := problems_of(other):
        hint = "" if rank else f"; name its ranks, for example --like {linear}:0.25h"
        raise ConfigError(f"--like {like}: {each}{hint}" for each in problems)
    kind: Kind = "state" if optimizer else "parameters"
    return Limit(f"--like {like}", kind, use(workload(other), kind))


def schedule(ranks: Ranks, positions: Sequence[str]) -> str:
    """The ``--model.rank`` of these ranks, short: ``96x3,112x4/k=48``."""

    def run_lengths(each: Sequence[int]) -> str:
        runs = [(rank, len(list(run))) for rank, run in groupby(each)]
        texts = [f"{rank}x{times}" if times > 1 else f"{rank}" for rank, times in runs]
        return ",".join(texts) if len(runs) > 1 else str(each[0])

    texts = [run_lengths(each) for each in zip(*ranks, strict=True)]
    common = max(dict.fromkeys(texts), key=lambda text: texts.count(text) * len(text))
    pairs = zip(positions, texts, strict=True)
    return common + "".join(f"/{at}={text}" for at, text in pairs if text != common)


def find(
    config: RunConfig, budget: Budget, profile: RankProfile = RankProfile(), multiple: int = 1
) -> Found:
    """The largest ranks of a profile within a budget; what ``config.model.rank`` says is replaced.

    A rank is scale x weight rounded down to ``multiple``, at least ``multiple`` and at most the
    smaller width of its map, with the largest scale that fits. Then, unless the profile is uniform,
    blocks are raised by one multiple at all positions while the budget holds, in the order of
    their weights, of equal ones the topmost first: raising any one block of the result breaks it.
    With ``--train.recompute auto`` the peak may fall where ranks grow and the policy changes: the
    result fits and no block can be raised, but larger ranks may fit as well.

    Raises:
        ConfigError: bad input, or a budget that ``multiple`` as every rank exceeds: which part of
            the model alone exceeds it, and the least that would do.
    Cost: under 2 s for 80 blocks, 12 s where ``replay`` chooses its layers for limited memory.
    """
    check(override(config, model={"rank": "1"}))
    space = RankSpace(config, multiple)
    weights = profile.weights(space.num_blocks, space.positions)
    limits = limits_of(config, budget)
    search = _Search(space, weights, limits)
    least = search.at(0.0)
    if failed := [limit for limit in limits if not limit.holds(space, least)]:
        raise ConfigError(_impossible(space, least, limit) for limit in failed)
    ranks, larger = search.largest_scale()
    if not profile.is_uniform:
        ranks = search.spend(ranks)
        larger = [space.raised(ranks, idx) for idx in search.order]
    beyond = next((each for each in larger if each != ranks), ranks)
    text = schedule(ranks, space.positions)
    found = override(config, model={"rank": text})
    check(found)
    work = workload(found)
    return Found(
        rank=text,
        config=found,
        limits=[dataclasses.replace(limit, used=use(work, limit.kind)) for limit in limits],
        binding=[limit.flag for limit in limits if not limit.holds(space, beyond)],
        parameters=num_parameters(work.spec),
        state_bytes=work.state_bytes,
        peak_bytes=int(use(work, "memory")),
        flops_frac=use(work, "flops"),
    )


class _Search:
    """One search: a space, the weights of its ranks, the limits."""

    def __init__(
        self, space: RankSpace, weights: Sequence[Sequence[float]], limits: Sequence[Limit]
    ):
        self.space, self.weights, self.limits = space, weights, limits
        self.order = sorted(range(len(weights)), key=lambda idx: (-sum(weights[idx]), -idx))
        """Blocks, as they are raised."""
        self._known: dict[Ranks, bool] = {}

    def fits(self, ranks: Ranks) -> bool:
        """Whether every limit holds."""
        if ranks not in self._known:
            self._known[ranks] = all(limit.holds(self.space, ranks) for limit in self.limits)
        return self._known[ranks]

    def at(self, scale: float) -> Ranks:
        """The ranks at a scale of the weights."""
        multiple, caps = self.space.multiple, self.space.caps
        return tuple(
            tuple(
                min(cap, max(1, int(scale * weight / multiple)) * multiple)
                for weight, cap in zip(block, caps, strict=True)
            )
            for block in self.weights
        )

    def largest_scale(self) -> tuple[Ranks, list[Ranks]]:
        """The ranks at the largest scale that fits, and those just above."""
        low, high = 0.0, (1 + 1e-9) * max(self.space.caps) / min(map(min, self.weights))
        if self.fits(self.at(high)):
            low = high
        while high - low > 1e-9 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.fits(self.at(middle)) else (low, middle)
        return self.at(low), [self.at(high)]

    def spend(self, ranks: Ranks) -> Ranks:
        """Raise single blocks until none can be raised."""
        before = None
        while before != ranks:
            before = ranks
            for idx in self.order:
                more = self.space.raised(ranks, idx)
                ranks = more if self.fits(more) else ranks
        return ranks


def _impossible(space: RankSpace, least: Ranks, limit: Limit) -> str:
    """Why the smallest ranks do not fit: the part that is too much alone, or all of them."""
    work = space.workload(least)  # says itself what an activation budget would take
    parts = _parts(space, work, limit.kind)
    text = " + ".join(f"{name} {limit.show(size)}" for name, size in parts.items())
    if alone := next((name for name, size in parts.items() if size > limit.most), None):
        text = f"{alone} alone take {limit.show(parts[alone])}"
    return (
        f"{limit.flag} ({limit.show(limit.most)}): {text}; the least, rank {space.multiple} "
        f"everywhere, takes {limit.show(use(work, limit.kind), up=True)}"
    )


def _parts(space: RankSpace, work: Workload, kind: Kind) -> dict[str, float]:
    """What a run takes, divided; what is nothing is left out."""
    parts: dict[str, float] = {}
    if kind == "memory":
        micro_batch = work.micro_batch
        name = f"activations at micro-batch {micro_batch.sequences} x {micro_batch.length}"
        parts[name] = use(work, "activations")
    if kind in ("state", "memory"):
        parts |= work.state_bytes
    if kind == "parameters":
        counts = num_parameters(work.spec)
        parts["embedding and head"] = counts["embedding"] + counts["head"]
    if kind in ("parameters", "flops"):
        dense = [slot for block in work.spec.slots for slot in block if not slot.rank]
        parts["full-rank maps"] = space.of_slots(dense, kind)
    parts["the rest"] = use(work, kind) - sum(parts.values())
    return {name: size for name, size in parts.items() if size}
