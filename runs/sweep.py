"""Run many trainings, some at a time, each in its own process; what is finished is not run again.

    python runs/sweep.py SPECS.json --out OUT [--jobs 2]
    python runs/sweep.py --quick --out OUT     # two tiny runs, in this process

SPECS.json: an object of name -> the words after ``crnet train``, one string, quoted as for a shell,
or a list of words. Each run gets the folder OUT/NAME; its words are in OUT/NAME.words.json, and a
run that was begun with others is refused: its figures would pass for those of the new ones. A run
that was interrupted goes on from its last checkpoint, so a sweep can be stopped (Ctrl-C, SIGTERM:
the runs save, no other begins) and started at will.

JSON sweep: by name step, val_loss, val_perplexity, val_bits_per_byte, val_accuracy,
val_tokens, val_bytes, val_precision, tokens, tokens_per_s_median, beta.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from crnet.compare.processes import message

VALIDATION_LINES = 2000
QUICK_CORPUS = f"--data.source {Path(__file__).parent}/*.py --data.documents line".split()
QUICK_COMMON = (
    "--data.vocab-size 300 --data.sequence-length 16 --data.validation-tokens 64 "
    "--train.batch-size 2 --train.threads 1 --train.device cpu --train.eval-every-steps 0"
).split()
QUICK_SHAPE = {"hidden_size": 8, "intermediate_size": 16, "num_layers": 2, "num_heads": 2}


def run_all(specs: Mapping[str, Sequence[str]], out: Path, jobs: int) -> dict[str, dict]:
    """Run every spec; return its final evaluation by name. A failed run is kept and reported.

    ``jobs``: so many processes at a time; 0: one run after the other, in this process.
    """

    def one(name: str) -> tuple[str, dict]:
        return name, _run(name, specs[name], out / name, own_process=jobs > 0)

    if not jobs:
        return dict(map(one, specs))
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    pool = ThreadPoolExecutor(jobs)
    try:
        return dict(pool.map(one, specs))
    except KeyboardInterrupt:
        for process in RUNNING:
            process.send_signal(signal.SIGTERM)
        sys.exit("stopped; the same command goes on")
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, former)


RUNNING: set[subprocess.Popen[str]] = set()
"""The processes of the sweep."""


def _run(name: str, words: Sequence[str], folder: Path, own_process: bool) -> dict:
    problem = _other_words(folder, words)
    found = None if problem else final_evaluation(folder)
    if found is None and problem is None:
        words = ["train", "--out", str(folder), "--resume", "auto", *words]
        problem = train(words) if own_process else train_here(words)
        found = final_evaluation(folder)
        if found is not None and problem is None:
            print(f"{name}: perplexity {found['val_perplexity']:.2f}", flush=True)
    if problem is None and found is None:
        problem = "stopped before its last step"
    if problem is not None:
        print(f"{name}: failed: {problem}", flush=True)
        return {"failed": problem}
    assert found is not None
    return found


def _other_words(folder: Path, words: Sequence[str]) -> str | None:
    """What is wrong where a run was begun with other words; writes the words where it was not."""
    file = folder.parent / f"{folder.name}.words.json"
    if file.exists():
        if json.loads(file.read_text(encoding="utf-8")) == list(words):
            return None
        return f"was begun with other words; remove {folder} and {file}, or take another name"
    write_report(file, list(words))
    return None


def train(words: Sequence[str]) -> str | None:
    """Run ``crnet`` with these words; what went wrong, if anything did."""
    command = [sys.executable, "-m", "crnet", *words]
    # A session of its own: Ctrl-C reaches it once, from here, and it saves.
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    RUNNING.add(process)
    try:
        _, errors = process.communicate()
    finally:
        RUNNING.discard(process)
    if process.returncode == 0:
        return None
    return message(errors) or f"exit code {process.returncode}"


def train_here(words: Sequence[str]) -> str | None:
    """``train`` in this process: nothing is imported twice."""
    from crnet.cli.app import main

    try:
        main(list(words))
    except SystemExit as ended:
        if ended.code:
            return f"exit code {ended.code}"
    return None


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
    """Smallest, median and largest beta of a checkpoint; None where it has none, or an adapter."""
    from safetensors import safe_open

    if not weights.exists():
        return None
    with safe_open(weights, framework="pt") as file:
        names = [name for name in file.keys() if name.endswith(".beta")]  # noqa: SIM118
        betas = sorted(each for name in names for each in file.get_tensor(name).flatten().tolist())
    return [betas[0], betas[len(betas) // 2], betas[-1]] if betas else None


def begin(description: str | None) -> tuple[argparse.Namespace, list[str]]:
    """Read a study's command line; return it and the words that name the corpus."""
    parser = make_parser(description)
    parser.add_argument("--abstracts", type=Path, help="folder of the arXiv abstracts")
    given = parser.parse_args()
    if given.quick:
        given.jobs = 0
        return given, QUICK_CORPUS
    if given.abstracts is None:
        parser.error("--abstracts names the corpus; or say --quick")
    return given, abstracts(given.abstracts, given.out)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """What every program of this folder understands."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny runs, in this process")
    return parser


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


def shape_words(shape: Mapping[str, int]) -> list[str]:
    """A shape as words for ``crnet train``."""
    return [f"--model.{key.replace('_', '-')}={value}" for key, value in shape.items()]


def write_report(path: Path, report: Mapping | Sequence) -> None:
    """Write a JSON file into a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def split(words: str | list[str]) -> list[str]:
    """The words of one run; quotes keep a word together."""
    return shlex.split(words) if isinstance(words, str) else words


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("specs", type=Path, nargs="?", metavar="SPECS.json")
    given = parser.parse_args()
    if given.quick:
        words = [*shape_words(QUICK_SHAPE), *QUICK_COMMON, *QUICK_CORPUS, "--train.steps=1"]
        specs = {f"seed{seed}": [*words, f"--train.seed={seed}"] for seed in (0, 1)}
        given.jobs = 0
    elif given.specs is None:
        parser.error("SPECS.json says what to run; or say --quick")
    else:
        read = json.loads(given.specs.read_text(encoding="utf-8"))
        specs = {name: split(words) for name, words in read.items()}
    write_report(given.out / "sweep.json", run_all(specs, given.out, given.jobs))


if __name__ == "__main__":
    main()
