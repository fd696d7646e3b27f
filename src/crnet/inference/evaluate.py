"""Token-weighted loss over a fixed, hashed validation set, in fp32.

The figure depends on the weights and the set alone: which rows it has, and their order, are fixed
(``data.rows.Rows.within``); they are read in batches whose size is fixed here (so the training
micro-batch cannot change even the last bit), losses are summed in fp64 and divided by the number of
target tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from crnet.data.rows import Rows, validation_batches
from crnet.model.build import set_dtype
from crnet.model.language_model import LanguageModel

TOKENS_AT_ONCE = 8192
"""Input tokens in one forward pass of an evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    loss: float
    """Mean over target tokens, nats."""
    tokens: int
    """Target tokens."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(model: LanguageModel, rows: Rows, max_tokens: int) -> Evaluation:
    """Evaluate a model. Arguments, errors and cost: ``evaluate_unless``."""
    found = evaluate_unless(lambda: False, model, rows, max_tokens)
    assert found is not None
    return found


def evaluate_unless(
    stopped: Callable[[], bool], model: LanguageModel, rows: Rows, max_tokens: int
) -> Evaluation | None:
    """Evaluate a model, or give up and return None as soon as ``stopped()`` says so.

    Args:
        stopped: asked before every batch.
        model: on any device. A bf16 model is evaluated through an fp32 copy of its weights.
        rows: rows of the validation split.
        max_tokens: most input tokens read.
    Raises:
        ConfigError: the split holds no row.
    Cost: one forward pass; memory for the logits of a chunk of rows.
    """
    device = next(model.parameters()).device
    if any(each.dtype in (torch.bfloat16, torch.float16) for each in model.parameters()):
        model = copy.deepcopy(model)
        set_dtype(model, torch.float32)
    was_training = model.training
    model.eval()
    batch_size = max(1, TOKENS_AT_ONCE // rows.sequence_length)
    loss_sum, num_tokens, complete = 0.0, 0, True
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for tokens, targets in validation_batches(rows, batch_size, max_tokens):
            if stopped():
                complete = False
                break
            loss, count = model(tokens.to(device), targets.to(device))
            loss_sum += loss.item()
            num_tokens += int(count.item())
    model.train(was_training)
    return Evaluation(loss=loss_sum / num_tokens, tokens=num_tokens) if complete else None
