"""What does a restart of CR-Net cost in quality? With and without, at equal tokens, two seeds.

    python runs/restarts.py --out OUT [--jobs 2] [--abstracts DIR]
    python runs/restarts.py --quick --out OUT     # one step of a tiny shape, one seed

A block in ``--model.crnet.restarts`` is full rank and reads nothing of the one below, which is what
a stage of a pipeline wants as its first. Two stages have one in the middle, four have three. A
restart has more parameters than the block it stands for. So ``raised rank`` and ``raised
more`` have none, and ranks that give them as many as ``middle`` and ``quarters``, to within half a
step of one block's rank.

The corpus is the default one, or the arXiv abstracts. All runs have one learning rate, the
default's, and by seed the same rows in the same order. Writes OUT/restarts.json and prints the
table of docs/scale.md. What is finished is not run again. ``flops_frac``: FLOPs of the blocks,
forward and backward, over those without a restart.

JSON restarts: date, code, device, corpus, words, models, runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import small_study
import sweep
from small_study import SEEDS, block_parameters, blocks_flops, corpus, run_name

from crnet.config.sections import ModelConfig
from crnet.linears.crnet import CRNetOptions

SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_layers": 8, "num_heads": 2}
QUICK_SHAPE = sweep.QUICK_SHAPE | {"num_layers": 8}
STAGES = {"no restart": 1, "middle": 2, "quarters": 4}
"""By model, the stages that its restarts are for."""
RAISED = {"raised rank": "middle", "raised more": "quarters"}
"""Without restarts, at the ranks that give as many parameters as another model has."""
COMMON = small_study.common_words(save_every=50, steps=1000)
QUICK = [*sweep.QUICK_COMMON, "--train.steps=1"]


def models(shape: Mapping[str, int], rank: int) -> dict[str, ModelConfig]:
    """What is compared, by name."""
    found = {name: model(shape, str(rank), stages) for name, stages in STAGES.items()}
    wanted = {name: block_parameters(found[other]) for name, other in RAISED.items()}
    return found | {name: model(shape, raised(shape, rank, each)) for name, each in wanted.items()}


def model(shape: Mapping[str, int], rank: str, stages: int = 1) -> ModelConfig:
    """A CR-Net in which every stage but the first begins with a restart."""
    starts = [shape["num_layers"] * idx // stages + 1 for idx in range(1, stages)]
    options = CRNetOptions(restarts=",".join(map(str, starts)) or None)
    return ModelConfig(linear="crnet", rank=rank, vocab_size=1, crnet=options, **shape)


def raised(shape: Mapping[str, int], rank: int, wanted: int) -> str:
    """The ranks, from ``rank`` up, whose blocks have nearest to ``wanted`` parameters; of two
    neighbouring ranks the topmost blocks get the higher."""
    low, high = (block_parameters(model(shape, str(each))) for each in (rank, rank + 1))
    num_open = shape["num_layers"] - 1
    steps = round((wanted - low) / (high - low) * num_open)
    return ",".join(str(rank + (steps + idx) // num_open) for idx in range(num_open))


def described(compared: Mapping[str, ModelConfig]) -> dict[str, dict[str, Any]]:
    """The closed forms, by model."""
    plain = blocks_flops(compared["no restart"])
    return {
        name: {
            "restarts": config.crnet.restarts,
            "rank": config.rank,
            "block_parameters": block_parameters(config),
            "flops_frac": blocks_flops(config) / plain,
        }
        for name, config in compared.items()
    }


def words(config: ModelConfig, shape: Mapping[str, int], seed: int) -> list[str]:
    """A model for ``crnet train``."""
    told = [*sweep.shape_words(shape), "--model.linear=crnet", f"--model.rank={config.rank}"]
    if config.crnet.restarts:
        told.append(f"--model.crnet.restarts={config.crnet.restarts}")
    return [*told, f"--train.seed={seed}"]


def table(report: Mapping[str, Any], seeds: Sequence[int]) -> list[str]:
    """Markdown, a row a model."""
    lines = [
        "| | restarts | ranks | parameters of the blocks | their FLOPs | validation loss by seed "
        "| mean | perplexity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, closed in report["models"].items():
        rows = [report["runs"][run_name(name, seed)] for seed in seeds]
        if any("failed" in row for row in rows):
            lines.append(f"| {name} | failed |" + " |" * 6)
            continue
        losses = [row["val_loss"] for row in rows]
        perplexity = statistics.mean(row["val_perplexity"] for row in rows)
        lines.append(
            f"| {name} | {closed['restarts'] or '-'} | {closed['rank']} "
            f"| {closed['block_parameters']:,} | {closed['flops_frac']:.2f} "
            f"| {' / '.join(f'{loss:.4f}' for loss in losses)} | {statistics.mean(losses):.4f} "
            f"| {perplexity:.2f} |"
        )
    return lines


def main() -> None:
    parser = sweep.make_parser(__doc__)
    parser.add_argument("--abstracts", type=Path, help="folder of the arXiv abstracts")
    given = parser.parse_args()
    if given.quick:
        shape, rank, seeds, given.jobs = QUICK_SHAPE, 2, SEEDS[:1], 0
        common, named = QUICK, sweep.QUICK_CORPUS
    else:
        shape, rank, seeds = SHAPE, 16, SEEDS
        common, named = COMMON, corpus(given.abstracts, given.out)
    compared = models(shape, rank)
    specs = {
        run_name(name, seed): [*words(config, shape, seed), *common, *named]
        for seed in seeds
        for name, config in compared.items()
    }
    report = small_study.study(given, common, named, described(compared), specs)
    sweep.write_report(given.out / "restarts.json", report)
    print("\n".join(table(report, seeds)))


if __name__ == "__main__":
    main()
