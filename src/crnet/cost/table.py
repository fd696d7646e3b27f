"""What a run will cost before it starts, row by row: what ``crnet cost`` shows.

Closed forms, no torch. Parameters, weights, gradients, optimizer state, kept activations and FLOPs
are exact (``crnet profile`` measures each of them beside its prediction), peaks a few percent off,
times priced kernel by kernel (``cost.clock``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.config.units import GIB
from crnet.cost import hardware
from crnet.cost.clock import WAYS
from crnet.cost.hardware import Device, communication_bytes
from crnet.cost.kept import kept_bytes
from crnet.cost.parameters import num_parameters
from crnet.cost.peak import peak_bytes
from crnet.cost.plan_choice import policies, usual_plan
from crnet.cost.stage_clock import step_seconds
from crnet.cost.step import memory_in_turn, step_flops, step_memory
from crnet.cost.workload import Workload, workload
from crnet.errors import ConfigError
from crnet.recompute.plan import Policy, RecomputePlan

Section = Literal[
    "parameters",
    "state",
    "gradients",
    "kept",
    "peak",
    "logits",
    "memory",
    "cache",
    "flops",
    "communication",
    "seconds",
    "at the end",
]
Unit = Literal["count", "bytes", "s"]


@dataclass(frozen=True)
class CostRow:
    """One figure."""

    section: Section
    term: str
    value: float
    unit: Unit


def plans(work: Workload) -> dict[str, RecomputePlan]:
    """Every recompute policy that the model can have, with its usual plan; the configured one as
    configured. All keep activations as the configured one does."""
    micro_batch, chosen = work.micro_batch, work.plan
    keep_as = chosen.keep_as

    def plan(policy: Policy) -> RecomputePlan:
        usual = usual_plan(micro_batch, policy)
        return chosen if policy == chosen.policy else dataclasses.replace(usual, keep_as=keep_as)

    return {policy: plan(policy) for policy in policies(micro_batch, keep_as)}


def cost_rows(work: Workload, on: Device | None = None, ranks: int = 1) -> list[CostRow]:
    """Everything that ``crnet cost`` shows."""
    micro_batch, states, known = work.micro_batch, work.state_bytes, plans(work)
    kept = {name: sum(kept_bytes(micro_batch, plan).values()) for name, plan in known.items()}
    peaks = {name: peak_bytes(micro_batch, plan) for name, plan in known.items()}
    total = sum(states.values())
    logits = micro_batch.rows * work.spec.shape.vocab_size * 4
    rows = [
        *make_rows("parameters", "count", num_parameters(work.spec)),
        *make_rows("state", "bytes", states | {"total": total}),
        *make_rows("gradients", "bytes", _gradients(work)),
        *make_rows("kept", "bytes", kept),
        *make_rows("peak", "bytes", peaks),
        *make_rows("logits", "bytes", {"all rows at once, never held": logits}),
        *make_rows("memory", "bytes", {name: total + size for name, size in peaks.items()}),
        *make_rows("cache", "bytes", {"of one row": micro_batch.cache_bytes}),
        *make_rows("flops", "count", step_flops(work, work.plan)),
        *make_rows("communication", "bytes", communication_bytes(work, ranks)),
    ]
    rows += make_rows("seconds", "s", step_seconds(work, work.plan, on)) if on else []
    return rows + _rows_at_end(work)


def _gradients(work: Workload) -> dict[str, int]:
    """What updating inside the backward pass saves. At the peak that is less than of gradients,
    which come as activations go."""
    memory = step_memory if work.num_micro_batches > 1 else memory_in_turn
    return {
        "all, ordinary": work.gradient_bytes,
        "at once, fused": work.gradients_at_once,
        "saved": work.gradient_bytes - work.gradients_at_once,
        "memory at the peak, ordinary": memory(work.with_fused(False)),
        "memory at the peak, fused": memory(work.with_fused(True)),
    }


def _rows_at_end(work: Workload) -> list[CostRow]:
    """What becomes less, where tensors leave the model in mid-run."""
    end = work.at_end()
    if end is None:
        return []
    memory = step_memory(end)
    return [
        CostRow("at the end", "parameters", num_parameters(end.spec)["total"], "count"),
        *make_rows("at the end", "bytes", end.state_bytes | {"memory at the peak": memory}),
        CostRow("at the end", "FLOPs of a step", step_flops(end, end.plan)["total"], "count"),
    ]


def placed(config: RunConfig, device: str | None) -> tuple[RunConfig, Device | None]:
    """A run and the device that its time is asked for; on a GPU it is taken to be one of a GPU.

    Raises:
        ConfigError: an unknown device.
    """
    on = hardware.device(device) if device else None
    if on and hardware.is_gpu(on) and config.train.device == "auto":
        config = override(config, train={"device": "cuda"})
    return config, on


def table_of(
    config: RunConfig, on: Device | None = None, ranks: int = 1
) -> tuple[list[CostRow], dict[Section, str]]:
    """Rows and headings of a run that has been checked.

    Raises:
        ConfigError: ``ranks`` is below 1, or no policy fits the activation budget.
    """
    if ranks < 1:
        raise ConfigError(f"--ranks is {ranks}; it must be 1 or more")
    work = workload(config)
    return cost_rows(work, on, ranks), titles(work, on, ranks)


def make_rows(section: Section, unit: Unit, values: Mapping[str, float]) -> list[CostRow]:
    """One row a term."""
    return [CostRow(section, term, value, unit) for term, value in values.items()]


def titles(work: Workload, on: Device | None = None, ranks: int = 1) -> dict[Section, str]:
    """The heading of each section."""
    micro_batch, policy = work.micro_batch, work.plan.policy
    packed = f" as {work.plan.keep_as}" if work.plan.is_packed else ""
    without = "; without the adapter, as if every weight trained" if work.spec.adapter else ""
    found: dict[Section, str] = {
        "parameters": "parameters",
        "state": f"state, GiB; {micro_batch.precision}",
        "gradients": f"gradients, GiB; --optimizer.fused-backward {_fused(work)}{without}",
        "kept": f"activations kept{packed}, GiB; micro-batch "
        f"{micro_batch.sequences} x {micro_batch.length}{_guarded(work)}{without}",
        "peak": f"activations at the peak, GiB{without}",
        "logits": "logits, GiB",
        "memory": f"memory at the peak, GiB{without}",
        "cache": f"key/value cache in generation, GiB; {micro_batch.length} tokens",
        "flops": f"FLOPs of a step, recompute {policy}{without}",
        "communication": f"communication of a step, GiB a rank, {ranks} ranks",
    }
    if on is not None:
        rate, tf32 = on.flops_per_s(micro_batch.precision), on.tf32_flops_per_s
        without = f"; packing not counted{without}" if packed else without
        faster = f" ({tf32 / 1e12:g} in TF32)" if rate < tf32 else ""
        found["seconds"] = (
            f"seconds of a step on {on.name}, recompute {policy}; {micro_batch.precision} products "
            f"at {on.product_frac:g} of {rate / 1e12:g} TFLOPS{faster}, "
            f"{on.bytes_per_s / 1e9:g} GB/s; fused: with kernels that are not here yet{without}"
        )
    if work.at_end() is not None:
        linear, step = work.spec.linear.name, work.num_steps_whole()
        found["at the end"] = (
            f"after step {step}, once tensors of {linear} have left the model; above: before "
            f"(bytes in GiB; recompute {policy})"
        )
    return found


def _fused(work: Workload) -> str:
    """Whether the update is fused with the backward pass, and where that is in vain."""
    number, value = work.num_micro_batches, str(work.optimizer.fused_backward).lower()
    return value if number == 1 else f"{value}, in vain: {number} micro-batches add up"


def _guarded(work: Workload) -> str:
    """That ``invert`` is not algorithm 1 as published, where its guard keeps more than that."""
    plan = plans(work).get("invert")
    added = work.micro_batch.added_at_first(plan) if plan else {}
    number = sum(map(len, added.values()))
    return f"; invert with {number} outputs that its guard adds" if number else ""


def render(
    rows: Sequence[CostRow],
    headings: Mapping[Section, str],
    measured: Sequence[CostRow] | None = None,
) -> str:
    """The rows as text; with ``measured``, a second column and the difference."""
    seen = {(row.section, row.term): row.value for row in measured or ()}
    lines = []
    for section, heading in headings.items():
        group = [row for row in rows if row.section == section]
        lines += [heading] if group else []
        if section == "seconds":
            lines += _seconds_lines(group, seen)
            continue
        for row in group:
            line = f"  {row.term:34}{_shown(row.value, row.unit):>20}"
            if (value := seen.get((section, row.term))) is not None:
                line += f"{_shown(value, row.unit):>20}{_difference(row.value, value):>14}"
            lines.append(line)
    return "\n".join(lines)


def _seconds_lines(group: Sequence[CostRow], seen: Mapping[tuple[str, str], float]) -> list[str]:
    """A column a way, a line a term; what a clock measured behind the way that ran."""
    values = {tuple(row.term.split(": ")): row.value for row in group}
    ways = [way for way in WAYS if any(key[0] == way for key in values)]
    terms = list(dict.fromkeys(key[1] for key in values))
    lines = ["  " + " " * 34 + "".join(f"{way:>20}" for way in ways)]
    for term in terms:
        columns = "".join(f"{_shown(values[way, term], 's'):>20}" for way in ways)
        lines.append(f"  {term:34}{columns}")
    for way in ways:
        if (value := seen.get(("seconds", f"{way}: total"))) is not None:
            difference = _difference(values[way, "total"], value)
            lines.append(f"  {f'measured, {way}':34}{_shown(value, 's'):>20}{difference:>14}")
    return lines


def _shown(number: float, unit: Unit) -> str:
    if unit == "bytes":
        return f"{number / GIB:,.4f}"
    if unit == "s":
        return f"{number:,.4f}"
    return f"{number:,.0f}" if number < 1e13 else f"{number:.4e}"


def _difference(predicted: float, seen: float) -> str:
    if predicted == seen:
        return "0"
    return f"{predicted / seen - 1:+.2%}" if seen else "new"
