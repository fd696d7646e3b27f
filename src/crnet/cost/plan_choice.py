"""Which recomputation a run gets: the one it asks for, or the cheapest within a budget."""

from __future__ import annotations

import dataclasses
import itertools
import math

from crnet.config.check import policy_problem
from crnet.config.sections import TrainConfig
from crnet.cost.flops import block_flops
from crnet.cost.kept import entering, kept_bytes
from crnet.cost.micro_batch import MicroBatch
from crnet.cost.peak import alive_above, gradients, loss_bytes, peak_bytes
from crnet.errors import ConfigError
from crnet.recompute.plan import (
    POLICIES,
    KeepAs,
    Policy,
    RecomputePlan,
    parse_layers,
    published_layers,
)


def plan_of(micro_batch: MicroBatch, train: TrainConfig) -> RecomputePlan:
    """The plan that a configuration asks for.

    Raises:
        ConfigError: no policy fits ``train.activation_budget_gib``; names the least it would take.
    """
    if train.recompute == "auto":
        budget = (train.activation_budget_gib or 0) * 2**30
        return cheapest(micro_batch, budget, train.invert_tolerance)
    if train.recompute in ("none", "block"):
        return RecomputePlan(train.recompute, keep_as=train.keep_as)
    keep_attention = train.recompute_attention == "keep"
    plan = usual_plan(micro_batch, train.recompute, keep_attention, train.invert_tolerance)
    plan = dataclasses.replace(plan, keep_as=train.keep_as)
    if train.recompute_layers is None:
        return plan
    num_layers = micro_batch.spec.num_layers
    layers = parse_layers(train.recompute_layers, num_layers)
    layers = tuple(layer for layer in layers if layer < num_layers)
    return dataclasses.replace(plan, kept_layers=layers)


def usual_plan(
    micro_batch: MicroBatch, policy: Policy, keep_attention: bool = False, tolerance: float = 0.05
) -> RecomputePlan:
    """The plan of a policy that says no more."""
    layers: tuple[int, ...] = ()
    if policy == "invert":
        layers = published_layers(micro_batch.spec.num_layers)
    elif policy == "replay":
        layers = least_peak(micro_batch, keep_attention)
    return RecomputePlan(policy, layers, keep_attention, tolerance)


def policies(micro_batch: MicroBatch, keep_as: KeepAs = "computed") -> tuple[Policy, ...]:
    """Every policy that the model can be run under, what is kept kept so."""
    spec = micro_batch.spec
    return tuple(each for each in POLICIES if policy_problem(spec, each, keep_as) is None)


def cheapest(
    micro_batch: MicroBatch, budget_bytes: float, tolerance: float = 0.05
) -> RecomputePlan:
    """The plan with the fewest FLOPs to repeat whose ``peak_bytes`` fit the budget.

    ``invert`` is a candidate where its outputs travel in fp32: in bf16 what its guard keeps hangs
    on the betas of every step. (In fp32 too, once gains fall below about 0.2: the guard keeps more,
    writes it down, and the budget may be passed.) Raises ``ConfigError`` where nothing fits.
    """
    known, candidates = policies(micro_batch), []
    for policy in known:
        keeps = (True, False) if policy in ("replay", "invert") else (False,)
        if policy == "invert" and set(micro_batch.blocks[-1].items.values()) != {4}:
            continue
        candidates += [usual_plan(micro_batch, policy, keep, tolerance) for keep in keeps]
    peaks = {plan: peak_bytes(micro_batch, plan) for plan in candidates}
    fitting = [plan for plan in candidates if peaks[plan] <= budget_bytes]
    if not fitting:
        least = min(candidates, key=lambda plan: peaks[plan])
        raise ConfigError(
            f"--train.activation-budget-gib {budget_bytes / 2**30:g}: a micro-batch of "
            f"{micro_batch.sequences} x {micro_batch.length} needs "
            f"{math.ceil(peaks[least] / 2**20) / 1024:.3f} "
            f"at least (--train.recompute {least.policy}); give that, or a smaller "
            "--train.micro-batch-size"
        )
    # Exact before inexact where the FLOPs are equal.
    return min(
        fitting,
        key=lambda plan: (
            block_flops(micro_batch, plan)["recompute"],
            plan.policy == "invert",
            peaks[plan],
        ),
    )


def least_peak(micro_batch: MicroBatch, keep_attention: bool = False) -> tuple[int, ...]:
    """Layers (1-based) for ``replay`` to keep: the segments with the least ``peak_bytes``.

    Keeping n layers' outputs costs n; a segment of k layers k more while it is rebuilt. When the
    backward pass has left a segment its outputs are free, so the segment below may be longer by
    one: k, k + 1, k + 2, ... from the top. Were outputs all there is, n segments within a peak of P
    outputs would cover about n (P - n) + n^2 / 2 layers, most for n = P: P = sqrt(2 L), against
    2 sqrt(L) with equal segments. What else a block holds is counted here, hence the search
    (dynamic programming over the number of layers and of segments below; L^2 n steps).
    """
    num_layers, size = micro_batch.spec.num_layers, micro_batch.stream_size
    one = RecomputePlan("replay", (), keep_attention)
    spans, alone = _spans(micro_batch, one), _alone(micro_batch)
    bases = [_base(micro_batch, bottom) for bottom in range(num_layers)]
    below = [0, *itertools.accumulate(alone)]
    # By blocks and segments: the peak, what is kept, the tops.
    best: dict[tuple[int, int], tuple[int, int, tuple[int, ...]]] = {(0, 0): (0, 0, ())}
    for top in range(1, num_layers + 1):
        for count in range(1, min(top, 2 * math.isqrt(2 * num_layers) + 2) + 1):
            found = []
            for bottom in range(count - 1, top):
                if (under := best.get((bottom, count - 1))) is not None:
                    peak, kept, tops = under
                    kept += bases[bottom]
                    here = spans[bottom, top] + kept
                    kept += size + below[top] - below[bottom]
                    found.append((here if here > peak else peak, kept, tops))
            peak, kept, tops = min(found)
            best[top, count] = (peak, kept, (*tops, top))
    # Everything else that is there when the backward pass begins, twice the head's gradients.
    rest = sum(kept_bytes(micro_batch, one).values()) + loss_bytes(micro_batch)
    rest -= sum(alone) + size
    ends = [value for (top, _), value in best.items() if top == num_layers]
    _, _, tops = min(ends, key=lambda end: (max(end[0], end[1] + rest), end[1]))
    return tops[:-1]


def _spans(micro_batch: MicroBatch, plan: RecomputePlan) -> dict[tuple[int, int], int]:
    """The peak of blocks bottom..top-1 as one segment, without what lies kept below it.

    The fullest block is the topmost or the one under it, whose outputs have gradients from above.
    """
    blocks = micro_batch.blocks
    waiting = [gradients(micro_batch, plan, block) for block in blocks]
    return {
        (bottom, top): max(
            alive_above(micro_batch, plan, bottom, idx) + waiting[idx]
            for idx in range(max(bottom, top - 2), top)
        )
        for top in range(1, len(blocks) + 1)
        for bottom in range(top)
    }


def _alone(micro_batch: MicroBatch) -> list[int]:
    """Of each block: outputs that follow from nothing narrower, kept in any case."""
    return [
        sum(size for name, size in block.outputs.items() if not block.bottlenecks[name])
        for block in micro_batch.blocks
    ]


def _base(micro_batch: MicroBatch, bottom: int) -> int:
    """Outputs that a segment keeps as its carries and that are not kept in any case."""
    blocks = micro_batch.blocks
    return sum(
        blocks[idx].outputs[name]
        for idx, name in entering(micro_batch, bottom)
        if blocks[idx].bottlenecks[name]
    )
