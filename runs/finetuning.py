"""Table 14 of the paper at a small size: CR-Net beside full rank, tuned on two other corpora.

    python runs/finetuning.py --c4 FILE --abstracts DIR --wikitext DIR --out OUT [--jobs 2]
    python runs/finetuning.py --quick --out OUT     # one step and one epoch of a tiny shape

Each method trains on documents of C4, as in the paper; then it goes on over a share of WikiText-2
and over one of arXiv abstracts, 8 epochs each (as ``crnet finetune`` does: ``--train.init-from``,
``--train.epochs``), at every rate of a grid: all of its weights, or an adapter beside them
(``--train.adapter``). One tokenizer, trained on the documents of C4; perplexity, bits per byte and
next-token accuracy are of the other corpus's validation text, and the rate of a row is that of the
least perplexity there. One seed. Writes OUT/finetuning.json (failed runs too) and prints the table
of docs/finetuning.md. What is finished is not run again.

JSON finetuning: date, code, device, words, pretrained, tuned.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sweep
import torch

from crnet.storage.manifest import describe_code, describe_device

METHODS = ("crnet", "full")
ADAPTED = ("crnet",)
"""Of these methods an adapter is trained too."""
TRAINED = {"all weights": [], "LoRA": ["--train.adapter=lora", "--train.adapter-rank=8"]}
"""What trains, and the words for it."""
CORPORA = {"wikitext": "WikiText-2", "abstracts": "arXiv abstracts"}


@dataclass(frozen=True)
class Study:
    """What is trained, for how long."""

    shape: dict[str, int]
    common: Sequence[str]
    """Words of every run."""
    steps: int
    """Of the pre-training."""
    lr: float
    """Of the pre-training."""
    grids: dict[str, Sequence[float]]
    """Rates of the fine-tuning, by what trains."""
    epochs: int


WHOLE = Study(
    shape={"hidden_size": 64, "intermediate_size": 192, "num_layers": 6, "num_heads": 2},
    common=(
        "--model.rank=16 --data.sequence-length=128 --data.validation-tokens=65536 "
        "--train.batch-size=8 --train.threads=1 --train.device=cpu --train.eval-every-steps=0 "
        "--train.save-every-steps=100 --train.keep-checkpoints=1"
    ).split(),
    steps=1600,
    lr=3e-3,
    grids={"all weights": (1e-3, 3e-4), "LoRA": (1e-2, 3e-3)},
    epochs=8,
)
QUICK = Study(
    shape=sweep.QUICK_SHAPE,
    common=["--model.rank=2", *sweep.QUICK_COMMON],
    steps=1,
    lr=3e-3,
    grids={"all weights": (1e-3,), "LoRA": (1e-2,)},
    epochs=1,
)


def main() -> None:
    parser = sweep.make_parser(__doc__)
    parser.add_argument("--c4", type=Path, help="documents of C4")
    parser.add_argument("--abstracts", type=Path, help="folder of the arXiv abstracts")
    parser.add_argument("--wikitext", type=Path, help="folder with train.txt.xz and valid.txt.xz")
    given = parser.parse_args()
    study, jobs = (QUICK, 0) if given.quick else (WHOLE, given.jobs)
    if not given.quick and None in (given.c4, given.abstracts, given.wikitext):
        parser.error("--c4, --abstracts and --wikitext name the corpora; or say --quick")
    first, corpora = quick_corpora() if given.quick else whole_corpora(given)
    words = {name: [f"--model.linear={name}", *sweep.shape_words(study.shape)] for name in METHODS}
    words = {name: [*each, *study.common] for name, each in words.items()}
    begin = [f"--train.steps={study.steps}", f"--optimizer.lr={study.lr}"]
    pretrained = sweep.run_all(
        {f"first-{name}": [*words[name], *first, *begin] for name in METHODS}, given.out, jobs
    )
    tuned = {}
    for row, corpus in itertools.product(rows_of_table(), corpora):
        name, what = row
        start = given.out / f"first-{name}"
        tokenizer = start / "checkpoints" / f"step_{study.steps}"
        on = [*words[name], *corpora[corpus], f"--data.tokenizer={tokenizer}"]
        on += [f"--train.epochs={study.epochs}"]
        for lr in study.grids[what]:
            rate = [f"--optimizer.lr={lr}", f"--train.init-from={start}"]
            tuned[run_name(row, corpus, lr)] = [*on, *rate, *TRAINED[what]]
    found = sweep.run_all(tuned, given.out, jobs)
    for name, figures in found.items():
        figures["before"] = before(given.out / name)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "code": describe_code(),
        "device": describe_device(torch.device("cpu")),
        "words": {name: [*words[name], *begin] for name in METHODS},
        "pretrained": pretrained,
        "tuned": found,
    }
    sweep.write_report(given.out / "finetuning.json", report)
    print_table(study, report)


def whole_corpora(given: argparse.Namespace) -> tuple[list[str], dict[str, list[str]]]:
    """Words that name the corpus of the pre-training, and by name the shares of the others: about
    as many tokens each."""
    wikitext = [
        f"--data.source={given.wikitext / 'train.txt.xz'}",
        f"--data.validation-source={given.wikitext / 'valid.txt.xz'}",
        "--data.max-documents=26",
    ]
    abstracts = [*sweep.abstracts(given.abstracts, given.out), "--data.max-documents=150"]
    first = [f"--data.source={given.c4}", "--data.vocab-size=2048"]
    return first, {"wikitext": wikitext, "abstracts": abstracts}


def quick_corpora() -> tuple[list[str], dict[str, list[str]]]:
    """The same of text that is here."""
    few = [f"--data.source={__file__}", "--data.documents=line", "--data.max-documents=30"]
    return sweep.QUICK_CORPUS, dict.fromkeys(CORPORA, few)


def before(folder: Path) -> dict[str, Any]:
    """The evaluation of the given weights, before the first step."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return next((row for row in rows if "val_perplexity" in row), {})


def rows_of_table() -> list[tuple[str, str]]:
    """(method, what trains) of every row that was tuned."""
    every = itertools.product(TRAINED, METHODS)
    return [(name, what) for what, name in every if what == "all weights" or name in ADAPTED]


def run_name(row: tuple[str, str], corpus: str, lr: float) -> str:
    """The folder of a run."""
    name, what = row
    kind = "" if what == "all weights" else f"{what.lower()}-"
    return f"{name}-{corpus}-{kind}{lr}"


def print_table(study: Study, report: dict[str, Any]) -> None:
    """The result as Markdown."""
    columns = " | ".join(f"{text}: perplexity | accuracy | rate" for text in CORPORA.values())
    print(f"| | {columns} |")
    print("|---" * (3 * len(CORPORA) + 1) + "|")
    for row in rows_of_table():
        before, after = [], []
        for corpus in CORPORA:
            tuned = {lr: report["tuned"][run_name(row, corpus, lr)] for lr in study.grids[row[1]]}
            best = min(tuned, key=lambda lr: tuned[lr].get("val_perplexity", math.inf))
            before.append(cell(tuned[best]["before"], None))
            after.append(cell(tuned[best], best))
        if row[1] == "all weights":
            print(f"| {row[0]}, before | {' | '.join(before)} |")
        print(f"| {row[0]}, {row[1]} | {' | '.join(after)} |")


def cell(figures: dict[str, Any], lr: float | None) -> str:
    """Perplexity, accuracy and rate of one evaluation."""
    if "val_perplexity" not in figures:
        return "failed | | "
    rate = "" if lr is None else f"{lr:g}"
    return f"{figures['val_perplexity']:.2f} | {figures['val_accuracy']:.2%} | {rate}"


if __name__ == "__main__":
    main()
