"""Is a variant of CR-Net better than CR-Net? Each against it and plain low rank, two seeds.

    python runs/variants.py --out OUT [--jobs 2] [--steps 1000] [--abstracts DIR] [--only NAME ...]
    python runs/variants.py --quick --out OUT     # one step of a tiny shape, one seed

A variant differs from ``CR-Net`` in the options that its words name and in nothing else: shape,
ranks, learning rate (the default's, tuned for none), and by seed the rows and their order. So a
variant may have more parameters or FLOPs: both stand beside its loss, ``flops_frac`` over CR-Net's.
Two seeds tell whether a variant is far off; they do not rank what lies within their spread, and say
nothing of larger models.

The corpus is the default one, or the arXiv abstracts. Writes OUT/variants.json and prints the table
for LOG.md. What is finished is not run again.

JSON variants: date, code, device, corpus, words, models, runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import small_study
import sweep
from small_study import LENGTH, ROWS, SEEDS, block_parameters, blocks_flops, corpus, run_name

from crnet.config.sections import ModelConfig, RunConfig
from crnet.config.serialize import override

BASE = "CR-Net"
PLAIN = "low rank"
SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_layers": 6, "num_heads": 4}
RANK = 16
QUICK_SHAPE = sweep.QUICK_SHAPE
COMMON = small_study.common_words(save_every=100)


def variants(rank: int, steps: int) -> dict[str, dict[str, Any]]:
    """Options of CR-Net by name of the variant."""
    fifth = max(1, steps // 5)
    return {
        BASE: {},
        "gain by channel": {"gain": "channel"},
        "no carry of o and down": {"carries": "q,k,v,gate,up"},
        "norm": {"norm": "rms"},
        "duplicate": {"duplicate": 1.0},
        "gain warmed up from 0": {"gain_warmup_steps": fifth},
        "beta fixed at 0.5": {"beta": 0.5},
        "factors by fans": {"init": "fans"},
        "refactor": {"refactor_every": fifth},
        "gain by head": {"gain": "head"},
        "orthogonal factors": {"init": "orthogonal"},
        "norm with gains": {"norm": "gain"},
        "low-rank first block": {"first_rank": rank},
    }


def models(
    shape: Mapping[str, int], rank: int, options: Mapping[str, dict[str, Any]]
) -> dict[str, ModelConfig]:
    """What is compared, by name."""
    sizes = {"rank": str(rank), "vocab_size": 1, **shape}
    base = RunConfig(model=ModelConfig(linear="crnet", **sizes))
    found = {name: override(base, model={"crnet": each}).model for name, each in options.items()}
    return {PLAIN: ModelConfig(linear="lowrank", **sizes), **found}


def described(
    compared: Mapping[str, ModelConfig], options: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The closed forms, by model."""
    base = blocks_flops(compared[BASE])
    return {
        name: {
            "options": options.get(name, {}),
            "block_parameters": block_parameters(config),
            "flops_frac": blocks_flops(config) / base,
        }
        for name, config in compared.items()
    }


def words(
    config: ModelConfig, options: Mapping[str, Any], shape: Mapping[str, int], seed: int
) -> list[str]:
    """A model for ``crnet train``."""
    told = [*sweep.shape_words(shape), f"--model.linear={config.linear}"]
    told.append(f"--model.rank={config.rank}")
    told += [f"--model.crnet.{key.replace('_', '-')}={each}" for key, each in options.items()]
    return [*told, f"--train.seed={seed}"]


def table(report: Mapping[str, Any], seeds: Sequence[int]) -> list[str]:
    """Markdown, a row a model."""
    lines = [
        "| | parameters of the blocks | their FLOPs | validation loss by seed | mean "
        "| less than CR-Net's by seed |",
        "|---|---|---|---|---|---|",
    ]

    def losses(name: str) -> list[float]:
        rows = [report["runs"][run_name(name, seed)] for seed in seeds]
        return [row["val_loss"] for row in rows if "failed" not in row]

    base = losses(BASE)
    for name, closed in report["models"].items():
        found = losses(name)
        if len(found) < len(seeds) or len(base) < len(seeds):
            lines.append(f"| {name} | failed |" + " |" * 4)
            continue
        gains = [theirs - own for theirs, own in zip(base, found, strict=True)]
        lines.append(
            f"| {name} | {closed['block_parameters']:,} | {closed['flops_frac']:.2f} "
            f"| {' / '.join(f'{loss:.4f}' for loss in found)} | {statistics.mean(found):.4f} "
            f"| {' / '.join(f'{each:+.4f}' for each in gains)} |"
        )
    return lines


def main() -> None:
    parser = sweep.make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1000, help=f"of {ROWS * LENGTH} tokens each")
    parser.add_argument("--abstracts", type=Path, help="folder of the arXiv abstracts")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    given = parser.parse_args()
    if given.quick:
        shape, rank, seeds, given.jobs, given.steps = QUICK_SHAPE, 2, SEEDS[:1], 0, 1
        common, named = sweep.QUICK_COMMON, sweep.QUICK_CORPUS
    else:
        shape, rank, seeds = SHAPE, RANK, SEEDS
        common, named = COMMON, corpus(given.abstracts, given.out)
    common = [*common, f"--train.steps={given.steps}"]
    options = variants(rank, given.steps)
    compared = models(shape, rank, options)
    if unknown := {*given.only} - compared.keys():
        parser.error(f"--only {', '.join(unknown)}: known are {', '.join(compared)}")
    wanted = {PLAIN, BASE, *(given.only or compared)}
    compared = {name: each for name, each in compared.items() if name in wanted}
    specs = {
        run_name(name, seed): [*words(each, options.get(name, {}), shape, seed), *common, *named]
        for name, each in compared.items()
        for seed in seeds
    }
    report = small_study.study(given, common, named, described(compared, options), specs)
    sweep.write_report(given.out / "variants.json", report)
    print("\n".join(table(report, seeds)))


if __name__ == "__main__":
    main()
