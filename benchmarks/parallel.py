"""The same run by one process and by several, on this machine: speed, memory, loss.

    python benchmarks/parallel.py [--preset tiny] [--steps 20] [--rounds 2] [--out F]
    python benchmarks/parallel.py --quick [--out F]     # a tiny shape, two layouts

Every side is ``crnet train`` itself, on two cores: one process with two threads, or two processes
of one thread that share the run in some way (docs/scale.md). Sides take turns, round after round;
the first tenth of the steps, at least one, is a warm-up. ``tokens_per_s``: median over steps and
rounds, of the whole job. ``peak_mib``: most memory of the fullest process, Python and libraries
included. ``val_loss``: the same on every side, to rounding.

JSON: benchmark, date, command, options, processor, cores, code, load, sides.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from heading import heading, write

from crnet.storage import metrics

SIDES: dict[str, list[str]] = {
    "one process, two threads": ["--train.threads", "2"],
    "data 2": ["--parallel.data", "2"],
    "shard 2": ["--parallel.shard", "2"],
    "tensor 2": ["--parallel.tensor", "2"],
    "pipeline 2": ["--parallel.pipeline", "2"],
}
TINY = (
    "--model.hidden-size 32 --model.intermediate-size 48 --model.num-layers 4 --model.num-heads 2 "
    "--model.rank 8 --data.vocab-size 300 --data.sequence-length 16 --train.batch-size 8"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two layouts, two steps")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.steps, given.rounds, given.sides = 2, 1, list(SIDES)[:2]
    return given


def train(given: argparse.Namespace, side: str, folder: Path) -> dict[str, Any]:
    """One run of a side: its rates, its largest process, its loss."""
    words = [*SIDES[side], "--train.micro-batch-size", "2", "--train.steps", str(given.steps)]
    words += ["--train.log-every-steps", "1", "--train.eval-every-steps", "0"]
    words += ["--data.validation-tokens", "8192", "--train.device", "cpu"]
    words += TINY.split() if given.quick else []
    command = [sys.executable, "-m", "crnet", "train", given.preset, *words, "--out", str(folder)]
    with (folder.parent / "log").open("wb") as log:
        started = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise SystemExit((folder.parent / "log").read_text(errors="replace"))
    rows = metrics.read(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    peak = max(row.get("peak_bytes", 0) for row in steps)
    peak = peak or 1024 * usage.ru_maxrss
    (val_loss,) = (row["val_loss"] for row in rows if row.get("val_loss") and row["step"])
    warm = max(1, len(steps) // 10)
    rates = [row["tokens_per_s"] for row in steps[warm:]]
    return {"rates": rates, "peak_mib": round(peak / 2**20), "val_loss": val_loss}


def main() -> None:
    given = arguments()
    load = {"before": os.getloadavg()[0]}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in given.sides}
    with tempfile.TemporaryDirectory() as root:
        for number in range(given.rounds):
            for side, runs in found.items():
                folder = Path(root) / f"{len(runs)}-{side.replace(' ', '-').replace(',', '')}"
                runs.append(train(given, side, folder))
                print(f"round {number}, {side}: {runs[-1]}", file=sys.stderr)
    load["after"] = os.getloadavg()[0]
    sides = {
        side: {
            "tokens_per_s": statistics.median(rate for run in runs for rate in run["rates"]),
            "peak_mib": max(run["peak_mib"] for run in runs),
            "val_loss": runs[-1]["val_loss"],
        }
        for side, runs in found.items()
    }
    first = next(iter(sides.values()))["tokens_per_s"]
    for side, figures in sides.items():
        ratio = figures["tokens_per_s"] / first
        print(
            f"{side:26}{figures['tokens_per_s']:>10,.0f} tokens/s {ratio:>6.2f} "
            f"{figures['peak_mib']:>7,} MiB   {figures['val_loss']:.5f}"
        )
    write(heading("parallel", given) | {"load": load, "sides": sides}, given.out)


if __name__ == "__main__":
    main()
