"""Which runs can let products of factors decay (``--optimizer.decay composed``)."""

from __future__ import annotations

from collections.abc import Iterator

from crnet.config.model_spec import ModelSpec
from crnet.config.sections import RunConfig
from crnet.optimizers._composed import pairs_of


def decay_problems(spec: ModelSpec, config: RunConfig) -> Iterator[str]:
    """Why products of factors cannot decay."""
    flag = "--optimizer.decay composed"
    if config.optimizer.decay == "own":
        return
    trained = {name: each for name, each in spec.tensors.items() if each.trained}
    if not config.optimizer.weight_decay:
        yield f"{flag} has no effect without --optimizer.weight-decay"
    if config.train.adapter is not None:
        yield f"{flag} with --train.adapter: PEFT declares no pairs of factors; leave one out"
    elif not pairs_of(trained):
        yield f"{flag}: {spec.linear.name} trains no pair of factors that decays; leave it out"
    if config.train.precision == "bf16":
        yield (
            f"{flag} with --train.precision bf16: its steps are less than half the distance of two "
            "bf16 numbers, and would round away; say --train.precision bf16-mixed"
        )
    if config.parallel.tensor > 1:
        yield (
            f"{flag} with --parallel.tensor: a process has some columns of a factor; say "
            "--parallel.data or --parallel.shard"
        )
