"""What a parameterization has due after a step, and what the optimizer forgets of it."""

from __future__ import annotations

import torch

from crnet.model.language_model import Around, LanguageModel, plainly
from crnet.model.seeds import generator_of
from crnet.optimizers import forget


def run_events(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    step: int,
    seed: int,
    around: Around = plainly,
) -> None:
    """Carry out the events that are due once ``step`` optimizer steps are done.

    Random numbers come from (seed, full name, event, step) alone, so that a resumed run and every
    rank draw the same. ``around``: ``LanguageModel.run_events``.
    """
    for name, each in model.run_events(step, seed, around).items():
        generator = generator_of(seed, name, str(step), "forget")
        forget(optimizer, model.get_parameter(name), each, generator)
