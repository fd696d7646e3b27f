"""Where one step of a small model goes: data, forward, loss, backward, gradient norm, optimizer.

    python benchmarks/tiny_step.py [--rounds 10] [--threads 1] [--out F]
    python benchmarks/tiny_step.py --quick [--out F]     # a tiny shape, a few seconds

The sides take their steps in turn, round after round, in one process; the first two rounds are a
warm-up. Every part is timed by the wall clock, by the processor time of the process, and by that
of the main thread. The last is the critical path: with more than one thread it excludes what the
others do and the waiting for them, and on a machine that others use too it is the figure to
compare. Quoted: medians, in ms. ``evaluation`` is one forward pass as an evaluation makes it, on
the same tokens; ``issue`` the whole step on eight tokens, that is, what a step costs besides its
arithmetic; ``faults`` the pages that a step asks of the operating system.

JSON: benchmark, date, command, preset, tokens, threads, device, code, environment, rounds, sides.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from crnet.config import presets
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig, choose
from crnet.config.serialize import override
from crnet.data.prepare import prepare
from crnet.data.rows import Batches, Rows
from crnet.storage.checkpoint import Progress
from crnet.storage.manifest import describe_code, describe_device
from crnet.train import run as train
from crnet.train.step import Step

SIDES = ("full", "crnet", "lowrank")
QUICK = "--batch-size 1 --length 32 --layers 2 --rounds 2"
VOCAB_SIZE = 4096
ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GLIBC_TUNABLES", "LD_PRELOAD")
CLOCKS: dict[str, Callable[[], float]] = {
    "wall_ms": time.perf_counter,
    "cpu_ms": time.process_time,
    "main_thread_cpu_ms": time.thread_time,
}
Times = dict[str, list[dict[str, float]]]
"""By part, a reading of every clock a round."""


class Side:
    """One model, its optimizer and its batches."""

    def __init__(self, name: str, base: RunConfig, rows: Rows):
        model = dataclasses.replace(choose(base.model, "linear", name), vocab_size=VOCAB_SIZE)
        self.config = config = dataclasses.replace(base, model=model)
        spec = model_spec(config.model)
        self.step: Step = train.make_step(config, spec, torch.device("cpu"), None)
        self.batches = Batches(rows, 0, config.train.batch_size)
        self.times: Times = defaultdict(list)
        self.faults: list[int] = []

    def run(self) -> None:
        """One round: a step by its parts, a whole step, an evaluation, a step on eight tokens."""
        [batch] = self.timed("data", self.batches.next)
        self.parts(*batch)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self.timed("step", lambda: self.take(*batch))
        self.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        self.step.model.eval()
        with torch.no_grad():
            self.timed("evaluation", lambda: self.step.model(*batch))
        self.step.model.train()
        self.timed("issue", lambda: self.take(*(each[:1, :8] for each in batch)))

    def take(self, tokens: torch.Tensor, targets: torch.Tensor) -> Any:
        """The step as training takes it."""
        return self.step([(tokens, targets)], Progress(step=0, position=0, tokens=0), None)

    def parts(self, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        """The same, part by part; the rate is left at what it is."""
        model, optimizer = self.step.model, self.step.optimizer
        parameters = [parameter for _, parameter in model.trained().values()]
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.timed("forward without the loss and its graph", lambda: model.hidden(tokens))
        loss, _ = self.timed("forward", lambda: model(tokens, targets))
        self.timed("backward", (loss / tokens.numel()).backward)
        grads = [each.grad for each in parameters if each.grad is not None]
        norm = self.timed("norm", lambda: torch.nn.utils.get_total_norm(grads))
        clip = torch.nn.utils.clip_grads_with_norm_
        self.timed("clip", lambda: clip(parameters, self.config.optimizer.clip_norm, norm))
        self.timed("optimizer", optimizer.step)

    def timed(self, part: str, run: Callable[[], Any]) -> Any:
        """What ``run`` returns; its time is noted."""
        starts = {name: clock() for name, clock in CLOCKS.items()}
        found = run()
        taken = {name: 1e3 * (clock() - starts[name]) for name, clock in CLOCKS.items()}
        self.times[part].append(taken)
        return found

    def summary(self, warm_up: int) -> dict[str, Any]:
        """Medians by part and clock, without the first rounds."""
        found: dict[str, Any] = {
            part: {
                clock: round(statistics.median(each[clock] for each in readings[warm_up:]), 3)
                for clock in CLOCKS
            }
            for part, readings in self.times.items()
        }
        return found | {"faults": statistics.median(self.faults[warm_up:])}


def open_rows(base: RunConfig, folder: Path) -> Rows:
    """Rows of text that every Python has."""
    data = {"source": (argparse.__file__,), "cache_dir": folder, "vocab_size": 512}
    data["documents"] = "paragraph"
    config = override(base, data=data)
    prepared = prepare(config.data, progress=False)
    return Rows(prepared, "train", config.data.sequence_length, "packed")


def measure(base: RunConfig, rounds: int, warm_up: int) -> dict[str, Any]:
    """The figures of every side."""
    with tempfile.TemporaryDirectory() as folder:
        rows = open_rows(base, Path(folder))
        sides = {name: Side(name, base, rows) for name in SIDES}
        for _ in range(rounds + warm_up):
            for side in sides.values():
                side.run()
    return {name: side.summary(warm_up) for name, side in sides.items()}


def base_config(given: argparse.Namespace) -> RunConfig:
    """The preset, with what the command line changes."""
    sections: dict[str, dict[str, Any]] = {"model": {}, "data": {}, "train": {}}
    changes = (("model", "num_layers", given.layers), ("data", "sequence_length", given.length))
    for section, key, value in (*changes, ("train", "batch_size", given.batch_size)):
        if value is not None:
            sections[section][key] = value
    return override(presets.get(given.preset), **sections)


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help=QUICK)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(words)
    return parser.parse_args(QUICK.split(), given) if given.quick else given


def main() -> None:
    given = read_arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    base = base_config(given)
    report = {
        "benchmark": "tiny_step",
        "date": time.strftime("%Y-%m-%d"),
        "command": sys.argv,
        "preset": given.preset,
        "tokens": base.train.batch_size * base.data.sequence_length,
        "threads": torch.get_num_threads(),
        "device": describe_device(torch.device("cpu")),
        "code": describe_code(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "rounds": given.rounds,
        "sides": measure(base, given.rounds, warm_up=0 if given.quick else 2),
    }
    text = json.dumps(report, indent=1)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
