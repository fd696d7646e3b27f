"""What the environment of a process does to the time of a step: waiting threads, malloc.

    python benchmarks/environment.py [--preset llama-60m] [--linear crnet] [--micro-batch 4]
                                     [--length 256] [--rounds 10] [--loads quiet busy]
                                     [--sides torch passive malloc both] [--out F]
    python benchmarks/environment.py --quick [--out F]     # a tiny shape, one round

``torch``    no variable of those below is set: what a process gets by itself.
``passive``  OMP_WAIT_POLICY=PASSIVE: a thread that waits for the others sleeps.
``malloc``   GLIBC_TUNABLES: large blocks stay in the process, in huge pages.
``both``     what ``crnet train`` sets for itself (``crnet.cli.environment``).

Each side is a process of its own, because neither can be set later; all of them are started first,
and then take one step each in turn, so that a drift of the machine meets all alike. ``busy``: one
other process computes all the time. A first round is not counted. Ratios are to the first side that
is named. ``peak_rss_mib`` after the first round and after all shows whether memory that is kept
grows. On two busy cores a step of the sides that spin takes seconds to minutes, whatever the model.

JSON: benchmark, date, command, options, processor, cores, code, load, loads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from crnet.cli.environment import MALLOC
from crnet.config import presets
from crnet.config.model_spec import model_spec
from crnet.config.serialize import override
from crnet.parallel.cores import num_cores
from crnet.storage.checkpoint import Progress
from crnet.storage.manifest import VARIABLES, describe_code, describe_device
from crnet.train.run import make_step

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
SIDES: dict[str, dict[str, str]] = {
    "torch": {},
    "passive": PASSIVE,
    **{f"spin-{count}": {"GOMP_SPINCOUNT": str(count)} for count in (1000, 10_000, 100_000)},
    "malloc": {"GLIBC_TUNABLES": MALLOC},
    "both": {**PASSIVE, "GLIBC_TUNABLES": MALLOC},
}
QUICK = "--preset tiny --micro-batch 1 --length 32 --vocab 256 --rounds 1"
SPIN = "while True: pass"


class Side:
    """A process that takes a step whenever it is asked to."""

    def __init__(self, variables: dict[str, str], words: list[str]):
        clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words, "--serve"],
            env=clean | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self) -> dict[str, float]:
        """The figures of one step; of none where it is the first answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with exit code {self.process.wait()}")
        return json.loads(line)

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        return self.ask()


def serve(given: argparse.Namespace) -> None:
    """Be a side: a step for every line of stdin."""
    base = presets.get(given.preset)
    batch = {"batch_size": given.micro_batch, "micro_batch_size": None, "device": "cpu"}
    model = {"vocab_size": given.vocab, "linear": given.linear}
    config = override(base, model=model, train=batch)
    step = make_step(config, model_spec(config.model), torch.device("cpu"), None)
    shape = (given.micro_batch, given.length)
    tokens, targets = (torch.randint(0, given.vocab, shape) for _ in range(2))
    print("{}", flush=True)
    for _ in sys.stdin:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        step([(tokens, targets)], Progress(step=10, position=0, tokens=0), None)
        used = resource.getrusage(resource.RUSAGE_SELF)
        figures = {
            "s": time.perf_counter() - wall_s,
            "cpu_s": time.process_time() - cpu_s,
            "page_faults": used.ru_minflt - faults,
            "peak_rss_mib": used.ru_maxrss / 1024,
        }
        print(json.dumps(figures), flush=True)


@contextlib.contextmanager
def load(kind: str) -> Iterator[None]:
    """Meanwhile another process computes, or none."""
    if kind == "quiet":
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def measure(given: argparse.Namespace, sides: dict[str, Side]) -> dict[str, Any]:
    """Figures by load and side."""
    found = {}
    for kind in given.loads:
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        with load(kind):
            for number in range(given.rounds + 1):
                for name, side in sides.items():
                    figures = side.step()
                    if number:
                        rows[name].append(figures)
        first = rows[given.sides[0]]
        found[kind] = {name: summary(each, first) for name, each in rows.items()}
    return found


def summary(rows: list[dict[str, float]], first: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and the medians of the ratios within a round."""
    keys = ("s", "cpu_s", "page_faults")
    medians = {f"{key}_median": statistics.median(row[key] for row in rows) for key in keys}
    ratios = {
        f"{key}_to_first": statistics.median(
            row[key] / other[key] for row, other in zip(rows, first, strict=True)
        )
        for key in ("s", "cpu_s")
    }
    return {
        **medians,
        **ratios,
        "peak_rss_mib": [rows[0]["peak_rss_mib"], rows[-1]["peak_rss_mib"]],
    }


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-60m")
    parser.add_argument("--linear", default="crnet")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--loads", nargs="+", default=["quiet", "busy"], choices=["quiet", "busy"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--quick", action="store_true", help=QUICK)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    return parser.parse_args(QUICK.split(), given) if given.quick else given


def main() -> None:
    given = read_arguments()
    if given.serve:
        serve(given)
        return
    before = os.getloadavg()[0]
    sides = {name: Side(SIDES[name], sys.argv[1:]) for name in given.sides}
    for side in sides.values():
        side.ask()
    loads = measure(given, sides)
    for side in sides.values():
        side.process.communicate()
    hidden = ("out", "quick", "serve")
    report = {
        "benchmark": "environment",
        "date": time.strftime("%Y-%m-%d"),
        "command": [Path(word).name if "/" in word else word for word in sys.argv],
        "options": {key: value for key, value in vars(given).items() if key not in hidden},
        "processor": describe_device(torch.device("cpu")),
        "cores": num_cores(),
        "code": describe_code(),
        "load": {"before": before, "after": os.getloadavg()[0]},
        "loads": loads,
    }
    text = json.dumps(report, indent=1)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
