"""CR-Net, full rank and plain low rank at one shape: same rows, same order, a grid, three seeds.

    python runs/comparison.py --abstracts DIR --out OUT [--jobs 2]
    python runs/comparison.py --quick --out OUT     # one step of a tiny shape, one rate, two seeds

1. Each method tries every learning rate of the grid for a fifth of the tokens (seed 0).
2. Each trains with its best rate from three seeds; mean and deviation of validation perplexity.

Low rank gets the rank that gives its blocks as many parameters as CR-Net's. Writes
OUT/comparison.json (every run, failed ones too) and prints the tables for LOG.md. What is finished
is not run again.

JSON comparison: date, code, device, shape, ranks, block_parameters, best_lr, grid, final.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sweep
import torch

from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig
from crnet.storage.manifest import describe_code, describe_device


@dataclass(frozen=True)
class Study:
    """What is compared at which shape, and for how long."""

    shape: Mapping[str, int]
    crnet_rank: int
    grid: Sequence[float]
    """Learning rates."""
    seeds: Sequence[int]
    grid_steps: int
    steps: int
    common: Sequence[str]
    """Words for ``crnet train``."""

    def ranks(self) -> dict[str, int]:
        """By method. Plain low rank has the one whose parameters are nearest to CR-Net's."""
        wanted = self.block_parameters("crnet", self.crnet_rank)
        lowrank = min(
            range(1, self.shape["hidden_size"]),
            key=lambda rank: abs(self.block_parameters("lowrank", rank) - wanted),
        )
        return {"crnet": self.crnet_rank, "full": 1, "lowrank": lowrank}

    def block_parameters(self, linear: str, rank: int) -> int:
        """Parameters of all blocks' linear maps."""
        config = ModelConfig(linear=linear, rank=str(rank), vocab_size=1, **self.shape)
        spec = model_spec(config)
        maps = [spec.map_tensors(slot) for block in spec.slots for slot in block]
        return sum(tensor.num_items for tensors in maps for tensor in tensors.values())

    def words(self, linear: str, rank: int, lr: float, steps: int, seed: int) -> list[str]:
        """What ``crnet train`` is told."""
        return [
            f"--model.linear={linear}", f"--model.rank={rank}", f"--optimizer.lr={lr}",
            f"--train.steps={steps}", f"--train.seed={seed}", *sweep.shape_words(self.shape),
            *self.common,
        ]  # fmt: skip


WHOLE = Study(
    shape={"hidden_size": 192, "intermediate_size": 512, "num_layers": 7, "num_heads": 6},
    crnet_rank=48,
    grid=(7.5e-4, 1.5e-3, 3e-3, 6e-3),
    seeds=(0, 1, 2),
    grid_steps=192,
    steps=1024,
    common=(
        "--data.vocab-size 8192 --data.sequence-length 256 --data.validation-tokens 131072 "
        "--train.batch-size 8 --train.threads 1 --train.eval-every-steps 512 "
        "--train.save-every-steps 256 --train.keep-checkpoints 1"
    ).split(),
)
QUICK = Study(
    shape=sweep.QUICK_SHAPE,
    crnet_rank=2,
    grid=(1.5e-3,),
    seeds=(0, 1),
    grid_steps=1,
    steps=1,
    common=sweep.QUICK_COMMON,
)


def main() -> None:
    given, corpus = sweep.begin(__doc__)
    study = QUICK if given.quick else WHOLE
    ranks = study.ranks()
    grid = sweep.run_all(
        {
            f"grid-{linear}-{lr}": [*study.words(linear, rank, lr, study.grid_steps, 0), *corpus]
            for linear, rank in ranks.items()
            for lr in study.grid
        },
        given.out,
        given.jobs,
    )
    best = {
        linear: min(study.grid, key=lambda lr: perplexity(grid[f"grid-{linear}-{lr}"]))
        for linear in ranks
    }
    final = sweep.run_all(
        {
            f"final-{linear}-seed{seed}": [
                *study.words(linear, rank, best[linear], study.steps, seed), *corpus
            ]
            for seed in study.seeds
            for linear, rank in ranks.items()
        },
        given.out,
        given.jobs,
    )  # fmt: skip
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "code": describe_code(),
        "device": describe_device(torch.device("cpu")),
        "shape": study.shape,
        "ranks": ranks,
        "block_parameters": {
            name: study.block_parameters(name, rank) for name, rank in ranks.items()
        },
        "best_lr": best,
        "grid": grid,
        "final": final,
    }
    sweep.write_report(given.out / "comparison.json", report)
    print_tables(study, report)


def perplexity(found: dict) -> float:
    return found.get("val_perplexity", math.inf)


def print_tables(study: Study, report: dict) -> None:
    """The grid and the result as Markdown."""
    print(
        f"| {study.grid_steps} steps, validation perplexity | {' | '.join(map(str, study.grid))} |"
    )
    print("|---" * (len(study.grid) + 1) + "|")
    for linear in report["ranks"]:
        row = [f"{perplexity(report['grid'][f'grid-{linear}-{lr}']):.2f}" for lr in study.grid]
        print(f"| {linear} | {' | '.join(row)} |")
    print()
    print("| model | block parameters | rate | perplexity by seed | mean | deviation |")
    print("|---|---|---|---|---|---|")
    for linear, count in report["block_parameters"].items():
        final = report["final"]
        values = [perplexity(final[f"final-{linear}-seed{seed}"]) for seed in study.seeds]
        each = " / ".join(f"{value:.2f}" for value in values)
        print(
            f"| {linear} | {count / 1e6:.2f}M | {report['best_lr'][linear]} | {each} "
            f"| {statistics.mean(values):.2f} | {statistics.stdev(values):.2f} |"
        )


if __name__ == "__main__":
    main()
