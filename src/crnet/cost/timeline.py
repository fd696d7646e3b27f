"""When each process of a pipeline computes what: the orders of its schedules, laid out in time.

A process runs its passes one after the other, in an order that the schedule fixes. Each pass begins
when the process is free and what the pass reads has come: a forward pass reads the output of the
stage below, a backward pass the gradient of the stage above. Sending keeps no process busy.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from crnet.config import sections
from crnet.cost.clock import clock_of
from crnet.cost.hardware import Device
from crnet.cost.stage_clock import stage_seconds
from crnet.cost.stages import Direction, boundary_bytes, cut
from crnet.cost.workload import Workload
from crnet.errors import ConfigError


class Pass(NamedTuple):
    """A micro-batch's pass through one stage."""

    direction: Direction
    stage: int
    micro_batch: int


class Span(NamedTuple):
    """A pass, and the seconds from the start of the step at which it starts and ends."""

    process: int
    stage: int
    micro_batch: int
    direction: Direction
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """The passes of one optimizer step."""

    schedule: str
    num_processes: int
    num_stages: int
    spans: tuple[Span, ...]
    """Process after process, each in the order of time."""

    @cached_property
    def seconds(self) -> float:
        """From the start of the first pass to the end of the last."""
        return max(span.end_s for span in self.spans)

    @cached_property
    def bubble(self) -> float:
        """Share of the processes' time in which they wait."""
        busy, whole = sum(each.end_s - each.start_s for each in self.spans), self.seconds
        return (self.num_processes * whole - busy) / (self.num_processes * whole) if whole else 0.0

    @cached_property
    def in_flight(self) -> tuple[int, ...]:
        """By stage: most micro-batches whose backward pass is still to come."""
        waiting, most = Counter[int](), Counter[int]()
        for span in self.spans:
            waiting[span.stage] += 1 if span.direction == "forward" else -1
            most[span.stage] = max(most[span.stage], waiting[span.stage])
        return tuple(most[stage] for stage in range(self.num_stages))

    def of_process(self, process: int) -> list[Span]:
        """What one process does, in the order of time."""
        return [span for span in self.spans if span.process == process]

    def waiting(self, process: int) -> float:
        """Share of the time in which one process waits."""
        busy = sum(each.end_s - each.start_s for each in self.of_process(process))
        return (self.seconds - busy) / self.seconds if self.seconds else 0.0


def timeline_of(
    work: Workload,
    parallel: sections.ParallelConfig,
    on: Device,
    link_bytes_per_s: float | None = None,
) -> Timeline:
    """Lay out the passes of a run's optimizer step, at the seconds of the cost model (eager).

    The norm of the gradient and the optimizer come after it and are not in it.

    Args:
        work: of one share of the batch.
        link_bytes_per_s: what crosses a boundary in a second, one way; None: sending takes no time.
    Raises:
        ConfigError: there is no pipeline; ``order``'s.
    """
    if parallel.pipeline == 1:
        raise ConfigError("one process has no pipeline; take --parallel.pipeline 2 or more")
    stages = cut(work.spec, sections.num_stages(parallel), work.micro_batch.length)
    computed = stage_seconds(clock_of(work.micro_batch, on), work.plan, stages)
    forward = [each.forward_s for each in computed]
    backward = [each.backward_s for each in computed]
    sent = [0.0] * (len(stages) - 1)
    if link_bytes_per_s is not None:
        sent = [boundary_bytes(work.micro_batch, s.bottom) / link_bytes_per_s for s in stages[1:]]
    number, processes = work.num_micro_batches, parallel.pipeline
    return simulate(parallel.schedule, forward, backward, number, processes, sent)


def equal_bubble(num_processes: int, num_stages: int, micro_batches: int) -> float:
    """The bubble of equal stages and free sending, in either schedule: (P - 1) / (v M + P - 1), v
    stages a process."""
    chunks = num_stages // num_processes
    return (num_processes - 1) / (chunks * micro_batches + num_processes - 1)


def picture(line: Timeline, width: int = 100) -> list[str]:
    """A row of characters for each process, the step's time from left to right: a forward pass is
    the last digit of its micro-batch, a backward pass a letter (a for 0), waiting a point."""
    rows = []
    for process in range(line.num_processes):
        row, left = "", deque(line.of_process(process))
        for column in range(width):
            at = (column + 0.5) / width * line.seconds
            while left and left[0].end_s <= at:
                left.popleft()
            row += _letter(left[0]) if left and left[0].start_s <= at else "."
        rows.append(row)
    return rows


def _letter(span: Span) -> str:
    number = span.micro_batch % 10
    return str(number) if span.direction == "forward" else "abcdefghij"[number]


def order(
    schedule: str, process: int, num_processes: int, num_stages: int, micro_batches: int
) -> list[Pass]:
    """The passes of one process, in its order.

    Raises:
        ConfigError: the schedule is unknown, or cannot have so many stages or micro-batches.
    Source: Narayanan et al., 2021 (arXiv:2104.04473), section 2.2; as torch's ``Schedule1F1B`` and
    ``ScheduleInterleaved1F1B`` run it.
    """
    _check(schedule, num_processes, num_stages, micro_batches)
    chunks, total = num_stages // num_processes, num_stages // num_processes * micro_batches
    ahead = (chunks - 1) * num_processes + 2 * (num_processes - process - 1)
    if schedule == "1f1b":
        ahead = num_processes - process - 1
    ahead = min(ahead, total)

    def at(direction: Direction, step: int) -> Pass:
        """By turns: as many micro-batches of each stage as there are processes."""
        if schedule == "1f1b":
            return Pass(direction, process, step)
        rest, within = divmod(step, num_processes)
        turn, chunk = divmod(rest, chunks)
        chunk = chunk if direction == "forward" else chunks - 1 - chunk
        return Pass(direction, chunk * num_processes + process, turn * num_processes + within)

    found = [at("forward", step) for step in range(ahead)]
    for step in range(total - ahead):
        found += [at("forward", ahead + step), at("backward", step)]
    return found + [at("backward", step) for step in range(total - ahead, total)]


def _check(schedule: str, num_processes: int, num_stages: int, micro_batches: int) -> None:
    problems = []
    if schedule not in ("1f1b", "interleaved"):
        problems.append(f"schedule {schedule!r} is unknown; take 1f1b or interleaved")
    if num_processes < 1 or micro_batches < 1:
        problems.append(
            f"{num_processes} processes and {micro_batches} micro-batches; both must be 1 or more"
        )
    elif num_stages < 1 or num_stages % num_processes:
        problems.append(
            f"{num_stages} stages cannot be shared by {num_processes} processes; take a multiple"
        )
    elif schedule == "1f1b" and num_stages != num_processes:
        problems.append(
            f"1f1b has a stage a process, not {num_stages} on {num_processes}; take interleaved"
        )
    elif schedule == "interleaved" and micro_batches % num_processes:
        problems.append(
            f"interleaved on {num_processes} processes wants a multiple of {num_processes} "
            f"micro-batches, not {micro_batches}"
        )
    if problems:
        raise ConfigError(problems)


def simulate(
    schedule: str,
    forward: Sequence[float],
    backward: Sequence[float],
    micro_batches: int,
    num_processes: int,
    transfer: float | Sequence[float] = 0.0,
) -> Timeline:
    """Lay one optimizer step out in time.

    Args:
        schedule: ``1f1b`` (a stage a process) or ``interleaved`` (stage s on process s % P).
        forward, backward: seconds of one micro-batch in each stage, bottom first.
        transfer: seconds from the end of a pass to the start of the next stage's, one way; one for
            all boundaries, or one for each, bottom first.
    Raises:
        ConfigError: ``order``'s, or the numbers of seconds and stages disagree.
    Cost: O(passes), 2 S M of them.
    """
    num_stages = len(forward)
    _check(schedule, num_processes, num_stages, micro_batches)
    sent = [transfer] * (num_stages - 1) if isinstance(transfer, int | float) else [*transfer]
    if len(backward) != num_stages or len(sent) != max(num_stages - 1, 0):
        raise ConfigError(
            f"{num_stages} forward, {len(backward)} backward and {len(sent)} transfer times; a "
            "stage has one of each of the first two, a boundary between stages one of the last"
        )
    orders = [
        order(schedule, process, num_processes, num_stages, micro_batches)
        for process in range(num_processes)
    ]
    sent = sent if num_processes > 1 else [0.0] * len(sent)
    ends: dict[Pass, float] = {}
    spans: list[list[Span]] = [[] for _ in orders]
    lengths = {"forward": forward, "backward": backward}
    waiting = deque(range(num_processes))
    while waiting:
        process = waiting.popleft()
        mine = spans[process]
        for each in orders[process][len(mine) :]:
            come = _arrival(each, ends, sent, num_stages)
            if come is None:
                break
            start = max(come, mine[-1].end_s) if mine else come
            end = ends[each] = start + lengths[each.direction][each.stage]
            mine.append(Span(process, each.stage, each.micro_batch, each.direction, start, end))
            waiting.append((each.stage + (1 if each.direction == "forward" else -1)) % len(orders))
    assert sum(map(len, spans)) == 2 * num_stages * micro_batches
    return Timeline(schedule, num_processes, num_stages, tuple(s for row in spans for s in row))


def _arrival(
    each: Pass, ends: dict[Pass, float], sent: Sequence[float], num_stages: int
) -> float | None:
    """When what a pass reads has come; None where nobody has computed it yet."""
    direction, stage, micro_batch = each
    step = -1 if direction == "forward" else 1
    if not 0 <= stage + step < num_stages:
        return 0.0
    end = ends.get(Pass(direction, stage + step, micro_batch))
    return None if end is None else end + sent[min(stage, stage + step)]
