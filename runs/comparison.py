"""CR-Net, full rank and plain low rank at one shape: same rows, same order, a grid, three seeds.

    python runs/comparison.py --abstracts DIR --out OUT [--jobs 2]

1. Each method tries every learning rate of GRID for a fifth of the tokens (seed 0).
2. Each trains with its best rate from three seeds; mean and deviation of validation perplexity.

Low rank gets the rank that gives its blocks as many parameters as CR-Net's. Writes
OUT/comparison.json (every run, failed ones too) and prints the tables for LOG.md. What is finished
is not run again.
"""

from __future__ import annotations

import json
import math
import statistics
import time

import sweep
import torch

from crnet import linears
from crnet.config.sections import ModelConfig
from crnet.train.run import describe_code, describe_device

GRID = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
SEEDS = (0, 1, 2)
GRID_STEPS, STEPS = 192, 1024
SHAPE = {"hidden_size": 192, "intermediate_size": 512, "num_layers": 7, "num_heads": 6}
CRNET_RANK = 48
COMMON = (
    "--data.vocab-size 8192 --data.sequence-length 256 --data.validation-tokens 131072 "
    "--train.batch-size 8 --train.threads 1 --train.eval-every-steps 512 "
    "--train.save-every-steps 256 --train.keep-checkpoints 1"
).split()


def block_parameters(linear: str, rank: int) -> int:
    """Parameters of all blocks' linear maps."""
    counts = linears.num_parameters(
        ModelConfig(linear=linear, rank=str(rank), vocab_size=1, **SHAPE)
    )
    return sum(counts[position] for position in linears.POSITIONS)


def lowrank_rank() -> int:
    """The rank at which plain low rank has the parameters nearest to CR-Net's."""
    wanted = block_parameters("crnet", CRNET_RANK)
    return min(range(1, 192), key=lambda rank: abs(block_parameters("lowrank", rank) - wanted))


def words(linear: str, rank: int, lr: float, steps: int, seed: int) -> list[str]:
    """What ``crnet train`` is told."""
    shape = [f"--model.{key.replace('_', '-')}={value}" for key, value in SHAPE.items()]
    return [
        f"--model.linear={linear}", f"--model.rank={rank}", f"--optimizer.lr={lr}",
        f"--train.steps={steps}", f"--train.seed={seed}", *shape, *COMMON,
    ]  # fmt: skip


def main() -> None:
    given, corpus = sweep.begin(__doc__)
    ranks = {"crnet": CRNET_RANK, "full": 1, "lowrank": lowrank_rank()}

    grid = sweep.run_all(
        {
            f"grid-{linear}-{lr}": [*words(linear, rank, lr, GRID_STEPS, 0), *corpus]
            for linear, rank in ranks.items()
            for lr in GRID
        },
        given.out,
        given.jobs,
    )
    best = {
        linear: min(GRID, key=lambda lr: perplexity(grid[f"grid-{linear}-{lr}"]))
        for linear in ranks
    }
    final = sweep.run_all(
        {
            f"final-{linear}-seed{seed}": [
                *words(linear, ranks[linear], best[linear], STEPS, seed), *corpus
            ]
            for seed in SEEDS
            for linear in ranks
        },
        given.out,
        given.jobs,
    )  # fmt: skip
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "code": describe_code(),
        "device": describe_device(torch.device("cpu")),
        "shape": SHAPE,
        "ranks": ranks,
        "block_parameters": {name: block_parameters(name, rank) for name, rank in ranks.items()},
        "best_lr": best,
        "grid": grid,
        "final": final,
    }
    (given.out / "comparison.json").write_text(json.dumps(report, indent=1) + "\n")
    print_tables(report)


def perplexity(found: dict) -> float:
    return found.get("val_perplexity", math.inf)


def print_tables(report: dict) -> None:
    """The grid and the result as Markdown."""
    print(f"| {GRID_STEPS} steps, validation perplexity | {' | '.join(map(str, GRID))} |")
    print("|---" * (len(GRID) + 1) + "|")
    for linear in report["ranks"]:
        row = [f"{perplexity(report['grid'][f'grid-{linear}-{lr}']):.2f}" for lr in GRID]
        print(f"| {linear} | {' | '.join(row)} |")
    print()
    print("| model | block parameters | rate | perplexity by seed | mean | deviation |")
    print("|---|---|---|---|---|---|")
    for linear, count in report["block_parameters"].items():
        values = [perplexity(report["final"][f"final-{linear}-seed{seed}"]) for seed in SEEDS]
        each = " / ".join(f"{value:.2f}" for value in values)
        print(
            f"| {linear} | {count / 1e6:.2f}M | {report['best_lr'][linear]} | {each} "
            f"| {statistics.mean(values):.2f} | {statistics.stdev(values):.2f} |"
        )


if __name__ == "__main__":
    main()
