"""A checkpoint on whole texts of a corpus, and on lm-eval's tasks."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

from crnet.config.sections import DataConfig
from crnet.data import tokenizer
from crnet.data.sources import texts_to_evaluate
from crnet.errors import ConfigError
from crnet.inference.asked import TaskOptions
from crnet.inference.load import check_tokenizer, load_model, load_tokenizer, pick_device
from crnet.inference.on_rows import is_own
from crnet.inference.texts import Protocol, TextEvaluation, check_windows, evaluate_texts
from crnet.storage.checkpoint import Checkpoint


def evaluate_on_texts(
    saved: Checkpoint,
    data: DataConfig,
    device: str,
    protocol: Protocol,
    window: int | None,
    stride: int | None,
) -> tuple[TextEvaluation, dict[str, int]]:
    """What a checkpoint gives on texts, and the window (and stride) that they were read by.

    Args:
        data: the corpus; of the run's own what was held out is read.
        device: ``inference.load.pick_device``.
        window: None: a row's length.
        stride: of sliding; None: half a window.
    Raises:
        ConfigError: the corpus, the checkpoint, the device or the window cannot be used, the
            tokenizer is another one, or the texts are conversations.
    """
    if data.chat is not None:
        raise ConfigError(
            f"--data.chat {data.chat}: conversations are scored by --protocol rows alone; take "
            "that, or name a corpus of texts with --data.chat none"
        )
    made = load_tokenizer(saved)
    if (given := data.tokenizer) != saved.config.data.tokenizer:
        check_tokenizer(saved, given if given == "train" else tokenizer.load(given).hash)
    has_own = is_own(saved, data)
    if protocol == "sliding" and data.documents == "auto" and not has_own:
        data = dataclasses.replace(data, documents="file")  # pieces of a file are one text
    texts = texts_to_evaluate(data, held_out_alone=has_own)
    model = load_model(saved, pick_device(device))
    window = data.sequence_length if window is None else window
    stride_used = check_windows(model, protocol, window, stride)
    found = evaluate_texts(model, made, texts, protocol, window, stride)
    return found, {"window": window} | ({"stride": stride_used} if protocol == "sliding" else {})


def evaluate_on_tasks(
    saved: Checkpoint,
    data: DataConfig,
    device: str,
    tasks: Sequence[str],
    window: int | None,
    options: TaskOptions,
) -> dict[str, Any]:
    """Figures of lm-eval's tasks, by name or .yaml file: ``tasks``, ``groups``, ``window``, ...

    Raises:
        ConfigError: the package is missing, or a task, the checkpoint or the window cannot be used.
    """
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs the package lm_eval, which cannot be imported ({error}); "
            "pip install 'crnet[eval]'"
        ) from error
    from crnet.inference.tasks import HarnessModel, evaluate_tasks

    window = data.sequence_length if window is None else window
    model = load_model(saved, pick_device(device))
    lm = HarnessModel(model, load_tokenizer(saved), window, options.batch_size)
    found = evaluate_tasks(lm, tasks, options.num_fewshot, options.limit)
    return {"window": window, **found}
