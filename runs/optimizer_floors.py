"""Does each optimizer beat SGD with momentum? Each at its own swept rate, after the same tokens.

    python runs/optimizer_floors.py --wikitext DIR --out OUT [--jobs 1] [--steps 100] [--only ...]
    python runs/optimizer_floors.py --quick --out OUT     # four steps of a tiny shape

An optimizer with which a small model trains no better than with SGD has a bug, or options that do
not fit so short a run. Preset ``tiny``, full rank; optimizers that step pairs of factors: plain low
rank, beside SGD and AdamW on it. Rows and their order, the initial values, schedule and clipping
are the same for all. Each searches five rates, a factor of 3 apart, around the one that the
contract trains with (``OptimizerMethod.tried_lr``): all for a quarter of the steps, the best two to
the end; SGD's and AdamW's all to the end. Where the best one stands at an edge, a rate beyond it is
added, up to ``EXTENSIONS`` times. Intervals that are longer than the run are set to an eighth of
it, ranks to a quarter of the width (``fitted``). One seed: a floor, no ranking of what lies close.

DIR holds WikiText-2 as train.txt.xz and valid.txt.xz; the tokenizer is trained on it. ``--jobs 0``:
in this process. Writes OUT/floors.json and prints the table for LOG.md. What is finished is not run
again.

JSON floors: date, code, device, corpus, base, search, entries.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sweep
import torch

from crnet import optimizers
from crnet.compare.sweep import Search, Sweep, trials
from crnet.config.check import check
from crnet.config.presets import PRESETS
from crnet.config.sections import RunConfig
from crnet.config.serialize import override, to_dict
from crnet.errors import ConfigError
from crnet.storage.manifest import describe_code, describe_device

FLOOR = "sgd"
YARDSTICKS = (FLOOR, "adamw")
"""Run on plain low rank too, beside the optimizers of pairs."""
QUICK = ("full/sgd", "full/adamw", "lowrank/sgd", "lowrank/loro-adam")
SEARCH = Search(share=0.25, halving=4)
ALL = Search()
"""SGD's and AdamW's. A quarter of the steps ends near the peak of the rate, and what is ahead there
is a small rate; at the end a larger one may be. What all are held against must not come out too
high."""
SPACING = 3.0
BELOW, ABOVE = 3, 1
"""Rates below and above ``tried_lr``, which a model of 16 channels trains with. SGD's are two steps
higher: its gradients are clipped here, and the contract's are not."""
EXTENSIONS = 3
ROWS, LENGTH = 8, 64
WIDTH = 192


def fitted(steps: int, width: int) -> dict[str, dict[str, Any]]:
    """Options of an optimizer where its defaults are made for longer runs and wider models."""
    every, rank = max(1, steps // 8), max(1, width // 4)
    subspace = {"rank": rank, "refresh_every": every}
    names = ("galore", "galore8bit", "golore", "fira", "gradnorm-lorp", "flora", "apollo")
    return {name: subspace for name in names} | {
        "apollo-mini": {"refresh_every": every},
        "dct-adamw": {"rank": rank},
        "loro-adam": {"exact_every": every},
        "stable-spam": {"reset_every": 2 * every},
    }


def entries() -> list[str]:
    """What is swept, ``LINEAR/OPTIMIZER``; each floor before what stands on it."""
    names = sorted(optimizers.names(), key=lambda name: (name not in YARDSTICKS, name))
    pairs = [name for name in names if optimizers.get(name).steps_pairs]
    others = [name for name in names if name not in pairs and name != FLOOR]
    found = [f"lowrank/{name}" for name in (FLOOR, *YARDSTICKS[1:], *pairs)]
    return [f"full/{FLOOR}", *found[:1], *(f"full/{name}" for name in others), *found[1:]]


def base_of(common: RunConfig, entry: str, width: int) -> RunConfig:
    """The run of an entry, but for its rate."""
    linear, _, name = entry.partition("/")
    options = fitted(common.train.steps, width).get(name, {})
    return override(
        common,
        model={"linear": linear} | ({"rank": "0.25h"} if linear == "lowrank" else {}),
        optimizer={"name": name} | ({name.replace("-", "_"): options} if options else {}),
    )


def rates(name: str) -> list[float]:
    """The first grid."""
    shift = 2 * (name == FLOOR)
    exponents = range(shift - BELOW, shift + ABOVE + 1)
    return [optimizers.get(name).tried_lr * SPACING**each for each in exponents]


def beyond(study: Sweep) -> float | None:
    """A rate that the grid lacks next to its best one; None: it lacks none."""
    best = study.ranked()[0]
    tried = sorted(trial.config.optimizer.lr for trial in study.trials)
    if best["val_loss"] is None:
        return tried[0] / SPACING
    if best["values"]["optimizer.lr"] == tried[0]:
        return tried[0] / SPACING
    return tried[-1] * SPACING if best["values"]["optimizer.lr"] == tried[-1] else None


def search(
    base: RunConfig, grid: Sequence[float], out: Path, jobs: int, rows: list[dict[str, Any]]
) -> Sweep:
    """A search over a grid, said on stderr; ``rows`` of what was searched before."""
    found = trials(base, {"optimizer.lr": [f"{rate:.3g}" for rate in sorted(grid)]})
    how = ALL if base.optimizer.name in YARDSTICKS else SEARCH
    study = Sweep(base, found, how, out, rows)
    for row in study.run(jobs):
        ended = row["problem"] or f"loss {row['val_loss']:.4f}"
        print(f"  {row['trial']}, step {row['step']}: {ended}", file=sys.stderr, flush=True)
    return study


def swept(base: RunConfig, out: Path, jobs: int) -> Sweep:
    """The search over the rate, extended where its best one stands at an edge."""
    study = search(base, grid := rates(base.optimizer.name), out, jobs, [])
    for _ in range(EXTENSIONS):
        more = beyond(study)
        if more is None:
            break
        study = search(base, grid := [*grid, more], out, jobs, study.rows)
    study.rows = list({(row["trial"], row["share"]): row for row in study.rows}.values())
    return study


def summary(study: Sweep) -> dict[str, Any]:
    """An entry of the report."""
    report, config = study.report(), study.base
    best = report["ranked"][0]
    return {
        "options": to_dict(config)["optimizer"].get(config.optimizer.name.replace("-", "_")),
        "best_lr": best["values"]["optimizer.lr"] if best["val_loss"] is not None else None,
        "val_loss": best["val_loss"],
        "step": best["step"],
        "edges": report["edges"],
        "budget": report["budget"],
        "rows": study.rows,
    }


def with_floors(found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each entry with SGD's loss on its parameterization, and how far it is below."""
    told = {}
    for name, entry in found.items():
        floor = found.get(f"{name.partition('/')[0]}/{FLOOR}", {}).get("val_loss")
        loss = entry.get("val_loss")
        gain = None if floor is None or loss is None else floor - loss
        told[name] = entry | {"floor": floor, "below_floor": gain}
    return told


def table(found: Mapping[str, dict[str, Any]]) -> list[str]:
    """Markdown, a row an entry."""
    lines = [
        "| maps | optimizer | rates tried | best rate | validation loss | SGD's | less than SGD's "
        "| budget, whole runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in found.items():
        linear, _, optimizer = name.partition("/")
        if entry.get("val_loss") is None:
            cells = f"{linear} | {optimizer} | failed: {entry['rows'][0]['problem']}"
            lines.append(f"| {cells} |" + " |" * 5)
            continue
        floor, gain = entry["floor"], entry["below_floor"]
        tried = {row["values"]["optimizer.lr"] for row in entry["rows"]}
        lines.append(
            f"| {linear} | {optimizer} | {len(tried)} | {entry['best_lr']:g} "
            f"| {entry['val_loss']:.3f} | {'-' if floor is None else f'{floor:.3f}'} "
            f"| {'-' if gain is None else f'{gain:+.3f}'} | {entry['budget']['whole_runs']:.1f} |"
        )
    return lines


def wikitext(folder: Path | None) -> dict[str, Any]:
    """Keys of ``data`` that name the corpus. Raises ``ConfigError`` where it is not there."""
    if folder is None:
        raise ConfigError("--wikitext names the folder of WikiText-2; or say --quick")
    files = [folder / f"{name}.txt.xz" for name in ("train", "valid")]
    missing = [str(each) for each in files if not each.is_file()]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not there; --wikitext names WikiText-2's folder")
    return {"source": (str(files[0]),), "validation_source": (str(files[1]),)}


def without_folders(base: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose corpus is named by its files alone."""
    told = base["data"]
    names = {
        key: [Path(each).name for each in told[key]] for key in ("source", "validation_source")
    }
    return base | {"data": told | names}


def main() -> None:
    parser = sweep.make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=100, help=f"of {ROWS * LENGTH} tokens each")
    parser.add_argument("--wikitext", type=Path, help="folder of train.txt.xz and valid.txt.xz")
    parser.add_argument("--only", nargs="*", default=[], metavar="LINEAR/OPTIMIZER")
    given = parser.parse_args()
    shape: dict[str, Any] = {}
    data = {"vocab_size": 1024, "sequence_length": LENGTH, "validation_tokens": 8192}
    rows, width, chosen = ROWS, WIDTH, entries()
    try:
        if given.quick:
            given.jobs, given.steps, chosen = 0, 4, list(QUICK)
            shape, rows, width = sweep.QUICK_SHAPE, 2, sweep.QUICK_SHAPE["hidden_size"]
            source = {"source": (f"{Path(__file__).parent}/*.py",), "documents": "line"}
            data = {"vocab_size": 300, "sequence_length": 16, "validation_tokens": 64} | source
        else:
            data |= wikitext(given.wikitext)
    except ConfigError as error:
        parser.error(str(error))
    if unknown := {*given.only} - {*chosen}:
        parser.error(f"--only {', '.join(unknown)}: known are {', '.join(chosen)}")
    chosen = [name for name in chosen if not given.only or name in given.only]
    train = {"steps": given.steps, "batch_size": rows, "threads": 1, "device": "cpu"}
    common = override(
        PRESETS["tiny"][1],
        model=shape,
        data=data,
        train=train | {"save_every_steps": 0, "keep_checkpoints": 1},
    )
    check(common)
    found: dict[str, dict[str, Any]] = {}
    for entry in chosen:
        print(entry, file=sys.stderr, flush=True)
        try:
            study = swept(base_of(common, entry, width), given.out / entry, given.jobs)
        except ConfigError as error:  # a signal, or a folder of another search
            sys.exit(str(error))
        found[entry] = summary(study)
        report = {
            "date": time.strftime("%Y-%m-%d"),
            "code": describe_code(),
            "device": describe_device(torch.device("cpu")),
            "corpus": "WikiText-2" if given.wikitext else "programs of runs/",
            "base": without_folders(to_dict(common)),
            "search": {"yardsticks": dataclasses.asdict(ALL), "others": dataclasses.asdict(SEARCH)},
            "entries": with_floors(found),
        }
        sweep.write_report(given.out / "floors.json", report)
    print("\n".join(table(with_floors(found))))


if __name__ == "__main__":
    main()
