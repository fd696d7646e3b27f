"""The evaluation of the GaLore family, reproduced on purpose: for old figures, and for no others.

Its script (GaLore's torchrun_main.py, copied by Fira, SLTrain, CoLA, LORO, APOLLO and more) differs
from ``inference.evaluate`` in four ways. The counter of batches begins at 1, so that a
process divides the sum of n batches by n + 1. Each batch weighs the same, however many tokens it
has. Weights, logits and the loss of a batch are bf16, so that a loss near 3.4 is a multiple of
1/64. Each process has its own rows, and the mean is over processes: the figure hangs on how many
there were.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from crnet.data.rows import IGNORED, Rows, check_enough
from crnet.errors import ConfigError
from crnet.inference.evaluate import exp
from crnet.model.language_model import LanguageModel


@dataclass(frozen=True)
class CompatEvaluation:
    """What the family's script would have printed."""

    loss: float
    """Nats; n / (n + 1) of the mean over batches."""
    batches: int
    """n, of the process that has the most."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return exp(self.loss)


def evaluate_compat(
    model: LanguageModel, rows: Rows, max_tokens: int, batch_size: int, processes: int = 1
) -> CompatEvaluation:
    """Evaluate as GaLore's script does.

    Args:
        model: on any device; it is not changed.
        rows: of the validation split.
        max_tokens: most input tokens read, by all processes.
        batch_size: rows of a batch of one process.
        processes: that the figure is made for; one computes it.
    Raises:
        ConfigError: the split holds no row, or fewer than there are processes.
    Cost: one forward pass in bf16, a copy of the weights, the logits of a batch.
    """
    check_enough(rows, 1)
    indices = rows.within(max_tokens)
    if len(indices) < processes:
        raise ConfigError(
            f"--processes is {processes}; the validation set has {len(indices)} rows, fewer"
        )
    narrow = _in_bf16(model)
    device = next(narrow.parameters()).device
    means, most = [], 0
    with torch.no_grad():
        for process in range(processes):
            mine = indices[process::processes]
            batches = [mine[at : at + batch_size] for at in range(0, len(mine), batch_size)]
            losses = [batch_loss(narrow, *_on(rows.batch(each), device)) for each in batches]
            means.append(sum(losses) / (len(losses) + 1))
            most = max(most, len(losses))
    return CompatEvaluation(sum(means) / processes, most)


def batch_loss(model: LanguageModel, tokens_BT: Tensor, targets_BT: Tensor) -> float:
    """Mean over the targets of one batch, rounded to bf16."""
    logits = model.logits(tokens_BT).to(torch.bfloat16).flatten(0, 1)
    return float(cross_entropy(logits, targets_BT.flatten(), ignore_index=IGNORED))


def _in_bf16(model: LanguageModel) -> LanguageModel:
    """A copy, its weights in bf16 and its gains as they are: what a bf16 run trains."""
    found = copy.deepcopy(model).eval()
    tensors = found.spec.tensors
    for name, parameter in found.named_parameters():
        if tensors[name].item_bytes(2) == 2:
            parameter.data = parameter.data.to(torch.bfloat16)
    return found


def _on(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    return batch[0].to(device), batch[1].to(device)
