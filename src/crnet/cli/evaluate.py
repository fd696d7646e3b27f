"""``crnet evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from crnet.cli.arguments import CheckpointPath, Command, DataFiles, Device, Json, print_json
from crnet.cli.layering import open_checkpoint
from crnet.config.check import check
from crnet.config.sections import DataConfig, RunConfig
from crnet.inference.asked import Protocol, TaskOptions, check_asked

if TYPE_CHECKING:
    from crnet.storage.checkpoint import Checkpoint

Tasks = Annotated[tuple[str, ...], Parameter(negative=(), consume_multiple=True)]


def evaluate(
    checkpoint: CheckpointPath,
    /,
    *,
    protocol: Protocol = "rows",
    window: int | None = None,
    stride: int | None = None,
    tasks: Tasks = (),
    options: Annotated[TaskOptions, Parameter(name="*")] = TaskOptions(),
    config: DataFiles = (),
    as_json: Json = False,
    device: Device = "auto",
    data: DataConfig = DataConfig(),
) -> None:
    """Evaluate a checkpoint: on its validation set, another corpus or lm-eval's tasks; in fp32.

    Parameters
    ----------
    protocol
        rows: the rows of the validation set, as during training; document: every document by
        itself, all tokens; sliding: the corpus as one text under a sliding window; compat: what
        GaLore's script and its forks print, biased and in bf16, beside rows (docs/evaluation.md).
    window
        document, sliding, tasks: most tokens that the model reads at once; none: a row's.
    stride
        sliding: tokens from one window's start to the next one's; none: half a window.
    tasks
        Tasks of lm-eval, by name or as .yaml files, in place of a corpus.
    """
    check(RunConfig(data=data))
    check_asked(protocol, bool(tasks), options, {"--window": window, "--stride": stride})
    saved = open_checkpoint(checkpoint)
    if tasks:
        figures, words = _tasks(saved, data, device, tasks, window, options)
    elif protocol == "rows":
        figures, words = _rows(saved, data, device)
    elif protocol == "compat":
        figures, words = _compat(saved, data, device, options)
    else:
        figures, words = _texts(saved, data, device, protocol, window, stride)
    if as_json:
        print_json({"checkpoint": str(saved.folder), "step": saved.progress.step, **figures})
    else:
        print(f"{saved.folder}: {words}")


Figures = dict[str, Any]


def _tasks(
    saved: Checkpoint,
    data: DataConfig,
    device: str,
    tasks: Sequence[str],
    window: int | None,
    options: TaskOptions,
) -> tuple[Figures, str]:
    """Figures of lm-eval's tasks, and their words."""
    from crnet.inference.on_texts import evaluate_on_tasks

    figures = evaluate_on_tasks(saved, data, device, tasks, window, options)
    return figures, _task_lines(figures)


def _texts(
    saved: Checkpoint,
    data: DataConfig,
    device: str,
    protocol: Literal["document", "sliding"],
    window: int | None,
    stride: int | None,
) -> tuple[Figures, str]:
    """Figures of whole documents or of a sliding window, and their words."""
    from crnet.inference.on_texts import evaluate_on_texts

    found, cut = evaluate_on_texts(saved, data, device, protocol, window, stride)
    figures = {"protocol": protocol, **cut, **found.figures()}
    return figures, (
        f"loss {figures['loss']:.6f}, perplexity {figures['perplexity']:.4f} a token, "
        f"{figures['word_perplexity']:.4f} a word, {figures['bits_per_byte']:.4f} bits a byte, "
        f"accuracy {figures['accuracy']:.2%} over {figures['tokens']:,} tokens "
        f"({figures['bytes']:,} bytes) of {figures['documents']:,} documents"
    )


def _compat(
    saved: Checkpoint, data: DataConfig, device: str, options: TaskOptions
) -> tuple[Figures, str]:
    """Figures as GaLore's script prints them beside those of the rows, and their words."""
    from crnet.inference.on_rows import evaluate_on_compat

    processes = options.processes or 1
    assert options.batch_size is not None  # checked
    figures = evaluate_on_compat(saved, data, device, options.batch_size, processes)
    return figures, (
        f"as GaLore's script: loss {figures['compat_loss']:.6f}, perplexity "
        f"{figures['compat_perplexity']:.4f} ({figures['compat_batches']} batches of "
        f"{options.batch_size} rows on each of {processes} processes); as it is: loss "
        f"{figures['val_loss']:.6f}, perplexity {figures['val_perplexity']:.4f}"
    )


def _task_lines(figures: dict[str, Any]) -> str:
    """A line for each metric."""
    lines = ["lm-eval"]
    for name, row in (figures["groups"] | figures["tasks"]).items():
        shots, documents = row["num_fewshot"], row["documents"]
        lines.append(f"  {name} ({shots} shots, {documents} documents)")
        for metric, value in row.items():
            if metric in ("num_fewshot", "documents", "version") or "_stderr" in metric:
                continue
            base, _, filtered = metric.partition(",")
            error = row.get(f"{base}_stderr" + (f",{filtered}" if filtered else ""))
            around = f" +- {error:.4f}" if error is not None else ""
            lines.append(f"    {metric:24} {value:.4f}{around}")
    return "\n".join(lines)


def _rows(saved: Checkpoint, data: DataConfig, device: str) -> tuple[Figures, str]:
    """Figures of the validation rows, and their words."""
    from crnet.inference.on_rows import evaluate_on

    found, hashed = evaluate_on(saved, data, device)
    figures = {**found.figures(), "validation_hash": hashed}
    return figures, (
        f"loss {figures['val_loss']:.6f}, perplexity {figures['val_perplexity']:.4f}, "
        f"{figures['val_bits_per_byte']:.4f} bits a byte, accuracy "
        f"{figures['val_accuracy']:.2%} over {figures['val_tokens']:,} tokens "
        f"({figures['val_bytes']:,} bytes) of set {hashed[:12]}"
    )


COMMAND = Command(evaluate, layers="checkpoint")
