"""Updates inside the backward pass beside the ordinary ones: time of a step, memory at its peak.

    python benchmarks/fused_backward.py [--rounds 8] [--length 256] [--out F]
    python benchmarks/fused_backward.py --quick [--out F]     # the tiny preset alone, a few seconds

Each case is one micro-batch of a preset, fp32, one thread, without clipping. Time: both steps in
turn, round after round, in one process, the first round a warm-up; medians. Memory: each side in a
process of its own, two steps, the most that Linux counted for it (its libraries too); beside
it what the cost model foretells of state and activations, and the bytes of all gradients and of
those that are alive at once. Loss and norm of the gradient are compared to the bit.

JSON: benchmark, date, command, options, processor, cores, code, load, cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from crnet.cli.environment import as_trained

if __name__ == "__main__":
    as_trained()

import torch
from heading import heading, write

from crnet.config import presets
from crnet.config.check import check
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig, choose
from crnet.config.serialize import override
from crnet.cost.step import step_memory
from crnet.cost.workload import workload
from crnet.storage.checkpoint import Progress
from crnet.train import run as train

CASES = (
    ("tiny", "full", "adamw", 8),
    ("tiny", "crnet", "adamw", 8),
    ("llama-130m", "full", "adamw", 1),
    ("llama-130m", "full", "galore", 1),
    ("llama-130m", "full", "scale", 1),
    ("llama-130m", "crnet", "adamw", 1),
)
"""Preset, parameterization, optimizer, rows of the batch."""
SIDES = {"ordinary": False, "fused": True}
STEPS = 2
"""Of a process whose memory is measured."""


def config_of(case: tuple[str, str, str, int], length: int, fused: bool) -> RunConfig:
    """One side of a case."""
    preset, linear, optimizer, rows = case
    base = presets.get(preset)
    base = dataclasses.replace(
        base,
        model=choose(base.model, "linear", linear),
        optimizer=choose(base.optimizer, "name", optimizer),
    )
    found = override(
        base,
        model={"vocab_size": base.data.vocab_size, "init_std": 0.02},
        optimizer={"clip_norm": 0.0, "fused_backward": fused},
        data={"sequence_length": length},
        train={
            "batch_size": rows,
            "micro_batch_size": None,
            "precision": "fp32",
            "recompute": "none",
            "device": "cpu",
            "threads": 1,
        },
    )
    check(found)
    return found


def batch_of(config: RunConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and targets at random, one micro-batch."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.train.batch_size, config.data.sequence_length)
    return [
        tuple(torch.randint(0, config.model.vocab_size, shape, generator=generator) for _ in "ab")
    ]


def timed(case: tuple[str, str, str, int], length: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step of both sides, in turn, and whether their figures are the same."""
    configs = {name: config_of(case, length, fused) for name, fused in SIDES.items()}
    cpu = torch.device("cpu")
    steps = {
        name: train.make_step(config, model_spec(config.model), cpu, None)
        for name, config in configs.items()
    }
    batch = batch_of(configs["fused"])
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    for number in range(rounds + 1):
        for name in (*SIDES,) if number % 2 else (*SIDES,)[::-1]:
            start_s = time.perf_counter()
            done = steps[name](batch, Progress(number, number * len(batch), 0), None)
            seconds[name].append(time.perf_counter() - start_s)
            figures[name].append((done.loss, done.grad_norm))
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {
        "step_s": medians,
        "ratio": medians["fused"] / medians["ordinary"],
        "same_figures": figures["fused"] == figures["ordinary"],
    }


def remembered(case: tuple[str, str, str, int], length: int) -> dict[str, Any]:
    """Bytes of both sides, each in a process of its own."""
    found = {}
    for name in SIDES:
        words = [sys.executable, __file__, "--one", json.dumps([*case, length, name])]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    work = workload(config_of(case, length, True))
    return {
        "peak_bytes": found,
        "foretold_bytes": {
            name: step_memory(workload(config_of(case, length, fused)))
            for name, fused in SIDES.items()
        },
        "gradient_bytes": work.gradient_bytes,
        "gradients_at_once": work.gradients_at_once,
    }


def one(case: tuple[str, str, str, int], length: int, side: str) -> int:
    """The most memory that this process has taken after some steps."""
    config = config_of(case, length, SIDES[side])
    step = train.make_step(config, model_spec(config.model), torch.device("cpu"), None)
    batch = batch_of(config)
    for number in range(STEPS):
        step(batch, Progress(number, number * len(batch), 0), None)
    # Not getrusage's: that begins with what the parent had.
    (found,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return int(found) * 1024


def line(case: dict[str, Any]) -> str:
    """For docs/performance.md."""
    peaks = case["peak_bytes"]
    return (
        f"| {case['preset']}, {case['linear']}, {case['optimizer']} "
        f"| {case['gradient_bytes'] / 2**30:.3f} | {case['gradients_at_once'] / 2**30:.3f} "
        f"| {peaks['ordinary'] / 2**30:.2f} | {peaks['fused'] / 2**30:.2f} | {case['ratio']:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--quick", action="store_true", help="the tiny preset alone")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="the JSON file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        *case, length, side = json.loads(given.one)
        print(one((case[0], case[1], case[2], case[3]), length, side))
        return
    length, rounds = (32, 2) if given.quick else (given.length, given.rounds)
    report = {**heading("fused_backward", given, hidden=("one",)), "load": os.getloadavg()[0]}
    report["cases"] = []
    print(
        "| | gradients, GiB | at once | peak: ordinary | fused | time |\n|---|---|---|---|---|---|"
    )
    for case in CASES[:1] if given.quick else CASES:
        found = dict(zip(("preset", "linear", "optimizer", "rows"), case, strict=True))
        found |= timed(case, length, rounds) | remembered(case, length)
        report["cases"].append(found)
        print(line(found), flush=True)
        write(report, given.out)


if __name__ == "__main__":
    main()
