"""The tables of ``docs/hardware.md`` are what the cost model and the benchmarks' files say.

``python tests/test_hardware_document.py`` prints them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crnet.config.presets import PRESETS
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.cost.hardware import device
from crnet.cost.parameters import num_parameters
from crnet.cost.peak import peak_bytes
from crnet.cost.plan_choice import usual_plan
from crnet.cost.stage_clock import step_seconds
from crnet.cost.step import step_flops
from crnet.cost.workload import Workload, workload

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "hardware.md"
GIB = 2**30
HOUR_S = 60 * 60


def work_of(preset: str, linear: str, **train: Any) -> Workload:
    """A preset on one GPU, in bf16-mixed."""
    train = {"precision": "bf16-mixed", "device": "cuda"} | train
    return workload(override(PRESETS[preset][1], model={"linear": linear}, train=train))


def memory_gib(work: Workload, policy: str) -> float:
    """State and activations at their peak."""
    peak = peak_bytes(work.micro_batch, usual_plan(work.micro_batch, policy))
    return (sum(work.state_bytes.values()) + peak) / GIB


def memory_table() -> list[str]:
    """A line a preset: parameters, and GiB at the preset's micro-batch and at one row."""
    lines = []
    for preset in PRESETS:
        crnet, full = work_of(preset, "crnet"), work_of(preset, "full")
        single = work_of(preset, "crnet", micro_batch_size=1)
        cells = [
            *(f"{num_parameters(each.spec)['total'] / 1e6:,.1f}" for each in (crnet, full)),
            f"{crnet.micro_batch.sequences} x {crnet.micro_batch.length}",
            *(f"{sum(each.state_bytes.values()) / GIB:.2f}" for each in (crnet, full)),
            *(f"{memory_gib(crnet, policy):.1f}" for policy in ("none", "replay")),
            *(f"{memory_gib(full, policy):.1f}" for policy in ("none", "block")),
            f"{memory_gib(single, 'replay'):.2f}",
        ]
        lines.append(f"| {preset} | {' | '.join(cells)} |")
    return lines


def flops(work: Workload) -> dict[str, float]:
    found = step_flops(work, usual_plan(work.micro_batch, "none"))
    return {
        "blocks": found["blocks forward"] + found["blocks backward"],
        "step": found["total"],
    }


def time_table() -> list[str]:
    """A line a preset: tokens and FLOPs of the whole run, and hours foreseen on one H100."""
    lines = []
    for preset in PRESETS:
        config: RunConfig = PRESETS[preset][1]
        tokens = config.train.steps * config.train.batch_size * config.data.sequence_length
        crnet, full = work_of(preset, "crnet"), work_of(preset, "full")
        mine, dense = flops(crnet), flops(full)
        cells = [
            f"{config.train.steps:,}",
            f"{tokens / 1e9:,.3f}",
            f"{config.train.steps * mine['step']:.2e}",
            *(f"{mine[part] / dense[part]:.2f}" for part in ("blocks", "step")),
            *(f"{config.train.steps * step_s(it) / HOUR_S:,.2f}" for it in (crnet, full)),
        ]
        lines.append(f"| {preset} | {' | '.join(cells)} |")
    return lines


def step_s(work: Workload) -> float:
    """Of a compiled step on one H100, nothing recomputed: a price, not a measurement."""
    plan = usual_plan(work.micro_batch, "none")
    return step_seconds(work, plan, device("h100"))["compiled: total"]


def measured(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))


def measured_table() -> list[str]:
    """Tokens a second on two cores, from the files of ``benchmarks/``."""
    tiny = measured("2026-11-26-tiny-step-threads-2-after.json")
    small = measured("2026-11-26-environment-quiet.json")
    large = measured("2026-11-26-peers-quiet.json")["step"]["fp32"]
    rows = small["options"]["micro_batch"] * small["options"]["length"]
    speeds = {
        "tiny": {
            side: tiny["tokens"] / tiny["sides"][side]["step"]["wall_ms"] * 1e3
            for side in ("crnet", "full", "lowrank")
        },
        "llama-60m": {"crnet": rows / small["loads"]["quiet"]["both"]["s_median"]},
        "llama-130m": {side: each["tokens_per_s"] for side, each in large.items()},
    }
    sides = ("crnet", "full", "lowrank", "transformers")
    return [
        f"| {preset} | {' | '.join(f'{by[it]:,.0f}' if it in by else '' for it in sides)} |"
        for preset, by in speeds.items()
    ]


def test_tables() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for table in (memory_table(), time_table(), measured_table()):
        assert "\n".join(table) in text, "\n".join(table)


if __name__ == "__main__":
    print("\n\n".join("\n".join(each) for each in (memory_table(), time_table(), measured_table())))
