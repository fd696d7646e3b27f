"""What a study will take, before anything is trained: tokens, FLOPs, hours, bytes on disk."""

from __future__ import annotations

import dataclasses
from typing import Any

from crnet.compare.comparison import Comparison, evaluation_steps
from crnet.compare.processes import jobs_of
from crnet.compare.rates import warning
from crnet.compare.results import cost, step_tokens
from crnet.compare.study import Row, last_step
from crnet.compare.sweep import Trial, steps_at
from crnet.compare.verdicts import detectable
from crnet.cost.step import step_flops
from crnet.cost.workload import Workload, workload
from crnet.inference.load import pick_device

MEASURED_FLOPS = 2e12
"""Of a step: a larger one is not measured but foreseen."""
CORE_FLOPS_PER_S = 60e9
"""Of a core, where nothing is measured: fp32 products of a model that is not small."""


def foreseen(of: Comparison, jobs: int | None) -> dict[str, Any]:
    """By row and in all. What is finished takes nothing more.

    Cost: a few steps of every row whose step is small; else nothing.
    """
    rows = {row.name: _row(of, row) for row in of.rows}
    first = next(iter(of.rows)).config
    jobs = jobs or jobs_of(first, max(1, sum(row["runs"] for row in rows.values())))
    seconds = [row["seconds"] for row in rows.values()]
    total = None if None in seconds else sum(seconds) / jobs / 3600
    keys = ("runs", "tokens", "flops", "disk_bytes")
    return {
        "rows": rows,
        "jobs": jobs,
        **{key: sum(row[key] for row in rows.values()) for key in keys},
        "hours": total,
        "tuning": dataclasses.asdict(of.study.tuning) if of.study.tuning else None,
        "seeds": len(of.study.seeds),
        "pairs": len(of.study.pairs()),
        "detectable": detectable(of.study),
    }


def _row(of: Comparison, row: Row) -> dict[str, Any]:
    work, study = workload(row.config), of.study
    steps = runs = folders = 0
    whole = last_step(row.config)
    first = steps_at(row.config, study.tuning.share) if study.tuning else 0
    if study.tuning:
        trials = of.tuned(row)
        left = [each for each in trials if of.is_left(row, each, study.tuning.share)]
        steps, runs, folders = len(left) * first, len(left), len(trials)
    for trial in _others(of, row):
        if first < whole and (trial is None or of.is_left(row, trial, None)):
            steps, runs = steps + whole - first, runs + 1
    best = of.best(row) if study.tuning else ()
    for idx, seed in enumerate(study.seeds):
        trial = None if best is None else of.trial(row, best, seed)
        if trial and not of.is_left(row, trial, None):
            continue
        tuned = bool(study.tuning) and idx < (study.tuning.seeds if study.tuning else 0)
        if tuned and first == whole:
            continue  # its trial is the whole run
        steps += whole - first if tuned else whole
        runs, folders = runs + 1, folders + (not tuned)
    every = evaluation_steps(first or whole, whole)
    seconds, how = step_seconds(row, work)
    forward = steps / every * row.config.data.validation_tokens / step_tokens(work) / 3
    bytes_ = work.state_bytes
    return {
        **cost(work),
        "alignment": None if row.alignment is None else vars(row.alignment),
        "runs": runs,
        "steps": steps,
        "tokens": steps * step_tokens(work),
        "flops": steps * step_flops(work, work.plan)["total"],
        "disk_bytes": folders * (bytes_["weights"] + bytes_["optimizer state"]),
        "step_seconds": seconds,
        "how": how,
        "seconds": None if seconds is None else seconds * (steps + forward),
    }


def _others(of: Comparison, row: Row) -> list[Trial | None]:
    """The trials that go on to the end beside the best one's; None: not known yet."""
    tuning = of.study.tuning
    if not tuning or tuning.finalists == 1:
        return []
    best = of.best(row)
    others = [point for point in of.front(row) if point != best]
    found = [each for point in others for each in of.trials(row, point)]
    unknown = (tuning.finalists - 1) * tuning.seeds - len(found)
    return [*found, *[None] * unknown]


def step_seconds(row: Row, work: Workload) -> tuple[float | None, str]:
    """Of an optimizer step in one of the processes that run side by side, and how it is known."""
    device = pick_device(row.config.train.device)
    flops = step_flops(work, work.plan)["total"]
    if device.type == "cpu" and flops > MEASURED_FLOPS:
        return flops / CORE_FLOPS_PER_S, "foreseen"
    if device.type != "cpu" and work.num_parameters() > 2e9:
        return None, "unknown"
    import torch

    from crnet.measure.profile import Probe

    threads = torch.get_num_threads()
    torch.set_num_threads(row.config.train.threads or 1)
    try:
        return Probe(work, device, rounds=2).seconds(), "measured"
    finally:
        torch.set_num_threads(threads)


def lines(found: dict[str, Any]) -> list[str]:
    """The same as text."""
    head = (
        f"{'row':24}{'parameters':>14}{'MiB at the peak':>17}{'MFLOPs/token':>14}{'aligned':>22}"
        f"{'runs left':>11}{'tokens left':>15}{'hours alone':>13}"
    )
    shown = [head]
    for name, row in found["rows"].items():
        memory = sum(
            row[f"{key}_bytes"] for key in ("weight", "gradient", "optimizer", "activation")
        )
        alignment = row["alignment"]
        words = "-" if alignment is None else f"{alignment['kind']} {alignment['ratio']:.3f}"
        hours = "?" if row["seconds"] is None else f"{row['seconds'] / 3600:.2f}"
        shown.append(
            f"{name:24}{row['parameters']:>14,}{memory / 2**20:>17,.1f}"
            f"{row['flops_a_token'] / 1e6:>14,.1f}{words:>22}{row['runs']:>11}"
            f"{row['tokens']:>15,}{hours:>13}"
        )
    hours = "unknown" if found["hours"] is None else f"about {found['hours']:.2f}"
    how = sorted({row["how"] for row in found["rows"].values()})
    shown.append(
        f"{found['runs']} runs, {found['tokens']:,} tokens, {found['flops']:.2e} FLOPs, "
        f"{found['disk_bytes'] / 2**30:.1f} GiB on disk; hours with {found['jobs']} at a time: "
        f"{hours} (a step {' or '.join(how)})"
    )
    if unlike := warning(found["rows"], found["tuning"]):
        shown.append(unlike)
    if found["detectable"]:
        pairs = f"{found['pairs']} pair{'s' * (found['pairs'] > 1)}"
        shown.append(
            f"the rule, {found['seeds']} seeds and {pairs}: about {found['detectable']:.1f} "
            "deviations of a seed's loss must lie between two rows; with more seeds, or fewer "
            "pairs, less is enough"
        )
    return shown
