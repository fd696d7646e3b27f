"""Everything that only a GPU can show, in one call of less than eight minutes.

    python benchmarks/gpu_suite.py --out DIR [--seconds 470] [--only SECTION ...]
    python benchmarks/gpu_suite.py --tiny --out DIR     # on a CPU: a dry run, no figure means much

Sections run in the order of their worth, each with a share of the seconds; what is left of one goes
to the next. The report is written anew after every entry, so that a run that is killed keeps the
rest. Tokens are random, weights are drawn on the device; sides take turns, medians of 7 after 3.
Without a package index: ``benchmarks/gpu_wheels.sh`` first, then

    pip install --no-index --no-deps --target /tmp/site .whl/*.whl
    PYTHONPATH=src:/tmp/site python3 benchmarks/gpu_suite.py --out DIR

Files: gpu_suite.json, table.txt and, with the section numerics, tests.xml.

JSON gpu_suite: benchmark, date, command, tiny, seconds, machine, sections, goals.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from gpu.bench import Bench, machine, run_section
from gpu.ceilings import ceilings, loss_chunks
from gpu.checks import numerics
from gpu.goals import goals, table
from gpu.running import decode, top_kernels
from gpu.training import compiled, eager, peers, policies

SECTIONS = {
    "ceilings": (15, ceilings),
    "numerics": (60, numerics),
    "eager": (90, eager),
    "policies": (45, policies),
    "compiled": (130, compiled),
    "peers": (50, peers),
    "loss": (25, loss_chunks),
    "decode": (25, decode),
    "kernels": (30, top_kernels),
}
"""Seconds of 470, and the entries; by worth."""


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")
    parser.add_argument("--seconds", type=float, default=470, help="of the whole run")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="sections; none: all")
    parser.add_argument("--tiny", "--quick", action="store_true", help="a dry run, on a CPU too")
    given = parser.parse_args()
    if not (given.tiny or torch.cuda.is_available()):
        parser.error("there is no CUDA device; --tiny is a dry run without one")
    return given


def run_suite(bench: Bench, given: argparse.Namespace, sections: dict[str, Any]) -> dict[str, Any]:
    """Run the sections, the report written after every entry."""
    end_s = time.perf_counter() + given.seconds
    report: dict[str, Any] = {
        "benchmark": "gpu_suite",
        "date": time.strftime("%Y-%m-%d"),
        "command": sys.argv,
        "tiny": given.tiny,
        "seconds": given.seconds,
        "machine": machine(bench),
        "sections": {},
        "goals": [],
    }

    def write(name: str, found: dict[str, Any]) -> None:
        report["sections"][name] = found
        report["goals"] = goals(report["sections"])
        unfinished = bench.out / ".gpu_suite.json"
        unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(bench.out / "gpu_suite.json")

    shares_s = {name: seconds for name, (seconds, _) in sections.items()}
    for name, (seconds, entries) in sections.items():
        left_s = end_s - time.perf_counter()
        limit_s = left_s * seconds / sum(shares_s.values())
        del shares_s[name]
        found = run_section(entries, bench, limit_s, lambda it, name=name: write(name, it))
        write(name, found)
        print(f"{name}: {found['status']}, {found['elapsed_s']} s", file=sys.stderr, flush=True)
    return report


def main() -> None:
    given = read_arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() and not given.tiny else "cpu")
    rounds, warm_up = (1, 1) if given.tiny else (7, 3)
    bench = Bench(device, given.out, given.tiny, rounds, warm_up)
    if bench.is_gpu:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    chosen = {name: each for name, each in SECTIONS.items() if name in (given.only or SECTIONS)}
    text = table(run_suite(bench, given, chosen))
    (given.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
