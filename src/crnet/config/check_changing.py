"""What does not go with a model that is another one some steps later."""

from __future__ import annotations

from collections.abc import Iterator

from crnet.config.model_spec import config_at
from crnet.config.sections import RunConfig


def changing_problems(config: RunConfig) -> Iterator[str]:
    """Why a run cannot have maps whose options follow from the step
    (``Parameterization.options_at``), one sentence each, with the mend."""
    flag = f"with --model.linear {config.model.linear}"
    if config_at(config, 0).model == config_at(config, 1).model:
        return
    if config.train.compile:
        yield (
            f"--train.compile {flag}: its maps change with every step, and each block would be "
            "compiled anew; leave it out"
        )
    for size, what in (
        ("pipeline", "and stages were cut with them"),
        ("shard", "and the rest would have to be split anew"),
    ):
        if getattr(config.parallel, size) > 1:
            yield (
                f"--parallel.{size} {flag}: tensors leave its maps in mid-run, {what}; say "
                "--parallel.data"
            )
