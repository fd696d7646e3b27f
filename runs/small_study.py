"""What studies of small CR-Nets share: batches, closed forms of what is compared, the report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sweep
import torch

from crnet.config.sections import DataConfig, ModelConfig, RunConfig, TrainConfig
from crnet.cost.flops import block_flops
from crnet.cost.workload import Workload, workload
from crnet.storage.manifest import describe_code, describe_device

SEEDS = (0, 1)
ROWS, LENGTH = 16, 128
DOCUMENTS = ["--data.max-documents", "10000"]
"""Of the abstracts: more than the runs read."""


def common_words(save_every: int, steps: int | None = None) -> list[str]:
    """For ``crnet train``: what no run of a study differs in; without ``steps``, all but those."""
    counted = "" if steps is None else f"--train.steps {steps} "
    return (
        f"--data.vocab-size 1024 --data.sequence-length {LENGTH} --data.validation-tokens 131072 "
        f"{counted}--train.batch-size {ROWS} --train.threads 1 --train.device cpu "
        f"--train.eval-every-steps 0 --train.save-every-steps {save_every} "
        "--train.keep-checkpoints 1"
    ).split()


def asked(config: ModelConfig) -> Workload:
    """A step of the study's batch."""
    data, train = DataConfig(sequence_length=LENGTH), TrainConfig(batch_size=ROWS, device="cpu")
    return workload(RunConfig(model=config, data=data, train=train))


def block_parameters(config: ModelConfig) -> int:
    """Trained parameters of all blocks' linear maps, gains among them."""
    spec = asked(config).spec
    maps = [spec.map_tensors(slot) for block in spec.slots for slot in block]
    return sum(each.num_items for tensors in maps for each in tensors.values() if each.trained)


def blocks_flops(config: ModelConfig) -> int:
    """Forward and backward, of a micro-batch."""
    work = asked(config)
    return sum(block_flops(work.micro_batch, work.plan).values())


def run_name(name: str, seed: int) -> str:
    """The folder of one run."""
    return f"{name.replace(' ', '-')}-seed{seed}"


def corpus(folder: Path | None, out: Path) -> list[str]:
    """Words that name it."""
    return [] if folder is None else [*sweep.abstracts(folder, out), *DOCUMENTS]


def study(
    given: argparse.Namespace,
    common: Sequence[str],
    named: Sequence[str],
    described: Mapping[str, Any],
    specs: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Run what is not finished, and return the report.

    Args:
        given: of the command line: ``abstracts``, ``out``, ``jobs``.
        common: words of every run; ``named`` those of the corpus.
        described: the models' closed forms, by name.
        specs: words of each run, by its name.
    """
    return {
        "date": time.strftime("%Y-%m-%d"),
        "code": describe_code(),
        "device": describe_device(torch.device("cpu")),
        "corpus": "arXiv abstracts" if given.abstracts else named or "default",
        "words": common,
        "models": described,
        "runs": sweep.run_all(specs, given.out, given.jobs),
    }
