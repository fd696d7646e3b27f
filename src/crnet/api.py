"""The package from Python: what the command line does, as functions (docs/python.md).

The commands call these, or what these call: one path, the same numbers, the same errors. A key of
the command line is a keyword here, by its bare name: ``steps=3`` is ``--train.steps 3``
(``config.keys``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

from torch import Tensor

from crnet.config import presets
from crnet.config.check import check
from crnet.config.keys import with_keys
from crnet.config.sections import DataConfig, RunConfig
from crnet.config.serialize import build as read_options
from crnet.cost import table
from crnet.cost.table import CostRow
from crnet.cost.workload import resolved, workload
from crnet.data import tokenizer as tokenizers
from crnet.data.prepare import prepare
from crnet.data.rows import Batches, Rows, validation_batches
from crnet.data.tokenizer import Tokenizer
from crnet.inference import generate as generation
from crnet.inference.asked import Protocol, TaskOptions, check_asked
from crnet.inference.evaluate import Evaluation
from crnet.inference.generate import Prompt
from crnet.inference.load import load_model, load_tokenizer, pick_device
from crnet.inference.on_rows import evaluate_on, evaluate_on_compat
from crnet.inference.on_texts import evaluate_on_tasks, evaluate_on_texts
from crnet.inference.sampling import Sampling
from crnet.inference.texts import TextEvaluation
from crnet.measure.observe import RANK_FRACS, Observed, observe_on
from crnet.model.device import with_precision
from crnet.model.language_model import LanguageModel
from crnet.storage import checkpoint
from crnet.train import run as training
from crnet.train.folders import as_given, begun_config, new_run, preset_of, resumed_run, tuned_from
from crnet.train.run import Result
from crnet.train.start import initial_model

Recipe = str | RunConfig
"""A preset's name, or a configuration."""


class Loaded(NamedTuple):
    """A trained model: ``model, tokenizer = crnet.load("run")``."""

    model: LanguageModel
    tokenizer: Tokenizer

    def generate(self, prompt: Prompt = "", **sampling: Any) -> str:
        """Continue a text, or answer messages: ``crnet.generate``."""
        return generate(self, prompt, **sampling)


def configure(recipe: Recipe = RunConfig.preset, **keys: Any) -> RunConfig:
    """Return the configuration of a run.

    Args:
        recipe: a preset (``crnet list`` names them), or a configuration to start from.
        keys: other values, by the names of the command line's keys (``config.keys.with_keys``).
    Raises:
        ConfigError: every problem, in the words of the command line.
    """
    begun = recipe if isinstance(recipe, RunConfig) else presets.get(recipe)
    config = with_keys(begun, keys)
    check(config)
    return config


def build(recipe: Recipe = RunConfig.preset, **keys: Any) -> LanguageModel:
    """Return a new model, its weights as training begins with them.

    Args:
        recipe, keys: ``configure``. Without ``model={"vocab_size": ...}`` the vocabulary is as
            large as the tokenizer's is to be, ``data.vocab_size``.
    Raises:
        ConfigError: the configuration, or the device, cannot be used.
    Cost: memory of the weights; 0.1 billion numbers drawn a second and core.
    """
    config = resolved(configure(recipe, **keys))
    device = pick_device(config.train.device)
    config = with_precision(config, device)
    return initial_model(config, workload(config).spec, device)


def load(path: str | Path, *, device: str = "auto") -> Loaded:
    """Return model and tokenizer of a checkpoint, or of a run's newest whole one.

    Raises:
        ConfigError: there is none, it is damaged, or the device cannot be used.
    """
    saved = checkpoint.resolve(Path(path))
    return Loaded(load_model(saved, pick_device(device)), load_tokenizer(saved))


def train(
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    resume: bool | Literal["auto"] = False,
    progress: bool = True,
    **keys: Any,
) -> Result:
    """Train a model; the command ``crnet train`` calls this.

    Args:
        recipe, keys: ``configure``. None: tiny, or with ``resume`` that of the run, whose own
            values stand behind ``keys`` then.
        out: folder of the run; None: a new one under ``crnet-runs``.
        resume: go on in ``out`` (None: the newest run) from the newest whole checkpoint, to the
            same bits; auto: if a run was begun there.
        progress: a bar on stderr.
    Returns:
        How the run ended: ``after.loss``, ``after.perplexity``, ``run_dir``, ``checkpoint``, ...
    Raises:
        ConfigError: the configuration, the corpus or the folder cannot be used; or the run wants
            several processes, which the command starts.
        TrainingError: loss or gradient became non-finite.
    """
    run_dir = resumed_run(resume, Path(out) if out is not None else None)
    goes_on = run_dir is not None
    if run_dir is not None and not isinstance(recipe, RunConfig):
        preset_of(run_dir, recipe)
        recipe = _begun(run_dir) or recipe
    config = configure(RunConfig.preset if recipe is None else recipe, **keys)
    if run_dir is None:
        run_dir = (
            Path(out) if out is not None else new_run(f"{config.preset}-{config.model.linear}")
        )
    return training.run(config, run_dir, resume=goes_on, progress=progress)


def _begun(run_dir: Path) -> RunConfig | None:
    """Of the run in a folder, as it was given."""
    begun = begun_config(run_dir)
    return begun and as_given(begun)


def finetune(
    path: str | Path, *, out: str | Path | None = None, progress: bool = True, **keys: Any
) -> Result:
    """Go on from a checkpoint on another corpus; the command ``crnet finetune`` does the same.

    Args:
        path: a checkpoint, or a run (its newest whole one): its model, its tokenizer and, where
            nothing else is said, its settings, for one epoch.
        out, progress: ``train``.
        keys: ``configure``; ``source=...`` has to be there.
    Returns:
        ``before`` and ``after`` are of the new corpus.
    Raises:
        ConfigError: as ``load`` and ``train``.
    """
    config = configure(tuned_from(checkpoint.resolve(Path(path))), **keys)
    folder = out or new_run(f"{config.preset}-{config.model.linear}-finetuned")
    return train(config, out=folder, progress=progress)


def generate(source: str | Path | Loaded, prompt: Prompt = "", **sampling: Any) -> str:
    """Return what a model writes behind a prompt, or answers.

    Args:
        source: a checkpoint, a run, or what ``load`` returned.
        prompt: an empty one starts a new text; a list of messages (``role``, ``content``) is
            answered, by the chat template that the model was trained with.
        sampling: ``max_tokens``, ``temperature``, ``top_k``, ``top_p``, ``greedy``, ``seed``,
            ``stop_at_end``, ``use_cache`` (``inference.sampling.Sampling``).
    Raises:
        ConfigError: ``load``; every problem of the options and of the prompt.
    """
    options: Sampling = read_options(Sampling, sampling)
    model, encoder = source if isinstance(source, Loaded) else load(source)
    return "".join(generation.complete(model, encoder, prompt, options))


@overload
def evaluate(
    path: str | Path,
    *,
    protocol: Literal["rows"] = ...,
    tasks: tuple[()] = ...,
    device: str = ...,
    **data: Any,
) -> Evaluation: ...
@overload
def evaluate(
    path: str | Path,
    *,
    protocol: Literal["document", "sliding"],
    window: int | None = ...,
    stride: int | None = ...,
    tasks: tuple[()] = ...,
    device: str = ...,
    **data: Any,
) -> TextEvaluation: ...
@overload
def evaluate(
    path: str | Path,
    *,
    tasks: str | Sequence[str],
    window: int | None = ...,
    num_fewshot: int | None = ...,
    limit: int | None = ...,
    batch_size: int | None = ...,
    device: str = ...,
    **data: Any,
) -> dict[str, Any]: ...
@overload
def evaluate(
    path: str | Path,
    *,
    protocol: Literal["compat"],
    batch_size: int,
    processes: int | None = ...,
    device: str = ...,
    **data: Any,
) -> dict[str, Any]: ...
def evaluate(
    path: str | Path,
    *,
    protocol: Protocol = "rows",
    window: int | None = None,
    stride: int | None = None,
    tasks: str | Sequence[str] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    processes: int | None = None,
    device: str = "auto",
    **data: Any,
) -> Evaluation | TextEvaluation | dict[str, Any]:
    """Return the figures of a checkpoint; the command ``crnet evaluate`` gives the same.

    Args:
        path: a checkpoint, or a run (its newest whole one).
        protocol: rows: the validation rows, as during training; document: every document by
            itself; sliding: the corpus as one text under a sliding window; compat: as GaLore's
            script, biased and in bf16 (``inference.compat``).
        window: document, sliding, tasks: most tokens read at once; None: a row's.
        stride: sliding: from one window's start to the next one's; None: half a window.
        tasks: of lm-eval, by name or .yaml file, in place of a corpus.
        num_fewshot, limit, batch_size: of tasks (``inference.asked.TaskOptions``).
        batch_size, processes: compat: rows of a batch of one process, and how many there were.
        data: keys of the section data, over those of the run: ``source=...``. Another corpus is
            read with the model's tokenizer.
    Returns:
        Loss, perplexity, bits per byte and accuracy; under document and sliding also a word's
        perplexity; of tasks a dict, the rows of ``tasks`` and ``groups`` by name; under compat
        one of ``compat_loss`` and ``compat_perplexity`` beside the figures of rows.
    Raises:
        ConfigError: the checkpoint or the corpus cannot be used, or a key would have no effect.
    Numerics: fp32, token-weighted; of rows the figure at the end of the run, to the last bit.
    """
    words = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    options = TaskOptions(
        num_fewshot=num_fewshot, limit=limit, batch_size=batch_size, processes=processes
    )
    check_asked(protocol, bool(words), options, {"--window": window, "--stride": stride})
    saved = checkpoint.resolve(Path(path))
    config = _data_of(saved, data)
    if words:
        return evaluate_on_tasks(saved, config, device, words, window, options)
    if protocol == "rows":
        return evaluate_on(saved, config, device)[0]
    if protocol == "compat":
        assert batch_size is not None  # checked
        return evaluate_on_compat(saved, config, device, batch_size, processes or 1)
    return evaluate_on_texts(saved, config, device, protocol, window, stride)[0]


def observe(
    path: str | Path,
    *,
    device: str = "auto",
    rank_fracs: Sequence[float] = RANK_FRACS,
    **data: Any,
) -> list[Observed]:
    """Compare the outputs of every map with those of the block below (section 3.1 of the paper).

    Args:
        path: a checkpoint, or a run. A model of transformers: ``crnet.measure.observe.observe``.
        rank_fracs: ranks of what is added to the block below, as shares of the hidden size.
        data: keys of the section data, over those of the run, whose validation rows are read.
    Raises:
        ConfigError: the checkpoint or the corpus cannot be used.
    Numerics: forward passes in fp32, sums and singular values in fp64.
    """
    saved = checkpoint.resolve(Path(path))
    return observe_on(saved, _data_of(saved, data), device, rank_fracs)


def _data_of(saved: checkpoint.Checkpoint, keys: dict[str, Any]) -> DataConfig:
    """The data of a checkpoint's run with other keys. Raises ``ConfigError``: they are wrong."""
    config = with_keys(RunConfig(data=saved.config.data), {"data": keys})
    check(RunConfig(data=config.data))
    return config.data


def cost(
    recipe: Recipe = RunConfig.preset, *, device: str | None = None, ranks: int = 1, **keys: Any
) -> list[CostRow]:
    """Return what a run will take: the rows of the table of ``crnet cost``, as numbers.

    Args:
        recipe, keys: ``configure``.
        device: also the time of a step there: a100-80g, h100, ..., or FLOPS,GBPS.
        ranks: also the communication between so many devices.
    Raises:
        ConfigError: the configuration, the device or the count cannot be used.
    """
    return table.table_of(*table.placed(configure(recipe, **keys), device), ranks)[0]


def tokenizer(spec: str | Path) -> Tokenizer:
    """Open a tokenizer: that of a run or a checkpoint, a tokenizer.json, a SentencePiece .model, a
    Hugging Face name. Raises ``ConfigError`` where it cannot be."""
    path = Path(spec)
    if (path / "run.json").exists() and not (path / "tokenizer.json").exists():
        return load_tokenizer(checkpoint.resolve(path))
    return tokenizers.load(str(spec))


def batches(
    recipe: Recipe = RunConfig.preset,
    split: Literal["train", "validation"] = "train",
    **keys: Any,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a run: tokens and the targets that follow them.

    Args:
        recipe, keys: ``configure``.
        split: train: one batch a step, ``train.steps`` of them, in the order of the run;
            validation: every row that an evaluation reads.
    Returns:
        Pairs (B, T), int64; a target of -100 does not count.
    Raises:
        ConfigError: the corpus cannot be used, or has too few rows.
    Cost: the first call of a corpus prepares it, and the cache keeps it.
    """
    config = configure(recipe, **keys)
    data, size = config.data, config.train.batch_size
    rows = Rows(prepare(data), split, data.sequence_length, data.rows)
    if split == "validation":
        yield from validation_batches(rows, size, data.validation_tokens)
        return
    whole = Batches(rows, config.train.seed, size)
    for _ in range(config.train.steps):
        yield from whole.next()
