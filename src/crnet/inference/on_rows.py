"""A checkpoint on the validation rows of a corpus: that of its run, or another."""

from __future__ import annotations

import dataclasses
from typing import Any

from crnet.config.sections import DataConfig
from crnet.data.prepare import prepare
from crnet.data.rows import Rows, validation_hash
from crnet.inference.compat import evaluate_compat
from crnet.inference.evaluate import Evaluation, evaluate
from crnet.inference.load import check_tokenizer, load_model, pick_device
from crnet.storage.checkpoint import Checkpoint

USE = ("sequence_length", "rows", "validation_tokens", "cache_dir", "tokenizer", "vocab_size")
"""Keys of the data that do not say which texts there are."""


def is_own(saved: Checkpoint, data: DataConfig) -> bool:
    """Whether the texts are those of the corpus that the model was trained on."""
    kept = {key: getattr(data, key) for key in USE}
    return dataclasses.replace(saved.config.data, **kept) == data


def rows_of(saved: Checkpoint, data: DataConfig) -> Rows:
    """The validation rows of a corpus in the tokens of a checkpoint. Arguments, errors:
    ``evaluate_on``."""
    if not is_own(saved, data) and data.tokenizer == saved.config.data.tokenizer:
        data = dataclasses.replace(data, tokenizer=str(saved.folder))
    prepared = prepare(data)
    check_tokenizer(saved, prepared.tokenizer_hash)
    return Rows(prepared, "validation", data.sequence_length, data.rows)


def evaluate_on(saved: Checkpoint, data: DataConfig, device: str) -> tuple[Evaluation, str]:
    """What a checkpoint gives on a corpus, and the hash of the rows.

    Args:
        data: the corpus; another one than the run's is prepared with the model's own tokenizer,
            unless it names one.
        device: ``inference.load.pick_device``.
    Raises:
        ConfigError: the corpus, the checkpoint or the device cannot be used, or the tokenizer is
            another one.
    """
    rows = rows_of(saved, data)
    model = load_model(saved, pick_device(device))
    found = evaluate(model, rows, data.validation_tokens)
    return found, validation_hash(rows, data.validation_tokens)


def evaluate_on_compat(
    saved: Checkpoint, data: DataConfig, device: str, batch_size: int, processes: int
) -> dict[str, Any]:
    """``evaluate_on``, and beside it what the GaLore family's script would print.

    Args:
        batch_size, processes: ``inference.compat.evaluate_compat``.
    """
    rows = rows_of(saved, data)
    model = load_model(saved, pick_device(device))
    found = evaluate(model, rows, data.validation_tokens)
    biased = evaluate_compat(model, rows, data.validation_tokens, batch_size, processes)
    return {
        **found.figures(),
        "compat_loss": biased.loss,
        "compat_perplexity": biased.perplexity,
        "compat_batches": biased.batches,
    }
