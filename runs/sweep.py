"""Run many trainings, some at a time, each in its own process; what is finished is not run again.

A spec is the words after ``crnet train``. A run that was interrupted goes on from its last
checkpoint, so a sweep can be stopped and started at will.
"""

from __future__ import annotations

import argparse
import json
import lzma
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VALIDATION_LINES = 2000


def run_all(specs: Mapping[str, Sequence[str]], out: Path, jobs: int) -> dict[str, dict]:
    """Run every spec; return its final evaluation by name. A failed run is kept and reported."""

    def one(name: str) -> tuple[str, dict]:
        folder = out / name
        found = final_evaluation(folder)
        if found is None:
            resume = ["--resume"] if (folder / "run.json").exists() else []
            words = [sys.executable, "-m", "crnet", "train", "--out", str(folder)]
            done = subprocess.run(
                [*words, *resume, *specs[name]], capture_output=True, text=True, check=False
            )
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:] or ["no message"]
                print(f"{name}: failed: {last[0]}", flush=True)
                return name, {"failed": last[0]}
            found = final_evaluation(folder)
            assert found is not None
            print(f"{name}: perplexity {found['val_perplexity']:.2f}", flush=True)
        return name, found

    with ThreadPoolExecutor(jobs) as pool:
        return dict(pool.map(one, specs))


def final_evaluation(folder: Path) -> dict | None:
    """The evaluation after the last step, and where beta ended; None: the run is not finished."""
    if not (folder / "run.json").exists() or not (folder / "metrics.jsonl").exists():
        return None
    steps = json.loads((folder / "run.json").read_text())["config"]["train"]["steps"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "val_loss" in row and row["step"] == steps]
    if not last or not (folder / "checkpoints" / f"step_{steps}" / "checksums.json").exists():
        return None
    train = [row for row in rows if "loss" in row]
    rates = sorted(row["tokens_per_s"] for row in train)
    return last[-1] | {
        "tokens": train[-1]["tokens"],
        "tokens_per_s_median": rates[len(rates) // 2],
        "beta": beta_range(folder / "checkpoints" / f"step_{steps}" / "model.safetensors"),
    }


def beta_range(weights: Path) -> list[float] | None:
    """Smallest, median and largest beta of a checkpoint; None where it has none."""
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        betas = sorted(float(file.get_tensor(n)) for n in file.keys() if n.endswith(".beta"))  # noqa: SIM118
    return [betas[0], betas[len(betas) // 2], betas[-1]] if betas else None


def begin(description: str | None) -> tuple[argparse.Namespace, list[str]]:
    """Read a script's command line; return it and the words that name the corpus."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--abstracts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    return given, abstracts(given.abstracts, given.out)


def abstracts(folder: Path, out: Path) -> list[str]:
    """Words that name the arXiv abstracts as corpus: the 30k file to train on, the last 2,000
    lines of the rest to validate on."""
    validation = out / "validation.jsonl"
    if not validation.exists():
        out.mkdir(parents=True, exist_ok=True)
        with lzma.open(folder / "arxiv-abstracts-rest.jsonl.xz", "rt", encoding="utf-8") as file:
            lines = file.readlines()[-VALIDATION_LINES:]
        validation.write_text("".join(lines), encoding="utf-8")
    source = folder / "arxiv-abstracts-30k.jsonl.xz"
    return (
        f"--data.source {source} --data.validation-source {validation} "
        "--data.text-key title,abstract"
    ).split()
