"""A run: from a configuration to a folder with figures and checkpoints.

    check -> prepare -> resolve -> spec and plan -> build (or load) -> manifest -> loop

``step`` is one step, ``loop`` repeats it, ``resume`` says what a run that goes on must keep.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from crnet import optimizers
from crnet.config.check import check
from crnet.config.model_spec import ModelSpec
from crnet.config.sections import RunConfig, options_of, settings_of
from crnet.cost.workload import workload
from crnet.data.prepare import prepare
from crnet.data.rows import Rows, check_enough, validation_hash
from crnet.data.shards import Prepared
from crnet.errors import ConfigError
from crnet.inference.evaluate import Evaluation
from crnet.inference.load import load_model, pick_device, weights_dtype
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from crnet.report.plots import plot_losses
from crnet.storage import checkpoint, files, metrics
from crnet.storage.checkpoint import Checkpoint, Progress
from crnet.storage.manifest import write_manifest
from crnet.train.loop import Loop, Record
from crnet.train.resume import check_folder, check_plugins, check_same_run, restore
from crnet.train.signals import signals
from crnet.train.step import Step


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    run_dir: Path
    step: int
    tokens: int
    finished: bool
    """False where a signal stopped it; it can be resumed."""
    num_parameters: int
    before: Evaluation | None
    """Before the first step; None where a signal came first."""
    after: Evaluation | None
    """The latest one."""
    tokens_per_s: float
    """Training tokens over training time: no evaluation, no saving."""
    checkpoint: Path | None


@dataclass(frozen=True)
class Corpus:
    """The rows of a run, and hashes of what they come from."""

    prepared: Prepared
    train: Rows
    validation: Rows
    hashes: dict[str, str]


def run(config: RunConfig, run_dir: Path, *, resume: bool = False, progress: bool = True) -> Result:
    """Train a model as ``config`` says, into ``run_dir``.

    Args:
        config: everything that decides the numbers; resolved and written to ``run.json``.
        run_dir: new, unless ``resume``.
        resume: go on from the newest whole checkpoint in ``run_dir``; bit-identical to a run that
            was never interrupted (same machine and threads, CPU).
        progress: show a progress bar on stderr.
    Raises:
        ConfigError: the configuration, the corpus or the folder cannot be used.
        TrainingError: loss or gradient became non-finite; names the step, the rows and the last
            good checkpoint.
    """
    check(config)
    check_folder(run_dir, resume)
    with contextlib.ExitStack() as held:  # what keeps other processes out of the folder
        return _run(config, run_dir, resume, progress, held)


def _run(
    config: RunConfig, run_dir: Path, resume: bool, progress: bool, held: contextlib.ExitStack
) -> Result:
    if resume:
        held.enter_context(files.alone(run_dir))
        check_plugins(run_dir)
        metrics.read(run_dir / metrics.METRICS)  # a broken one is refused before anything changes
    prepared = prepare(config.data, progress=progress)
    config = resolve(config, prepared)
    work = workload(config)
    corpus = open_corpus(prepared, config)
    device = pick_device(config.train.device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    saved = checkpoint.newest(run_dir) if resume else None
    if saved is not None:
        check_same_run(saved, config, corpus.hashes)
    step = make_step(config, work.spec, device, saved)
    step.model.recompute(work.plan)
    if config.train.compile:
        step.model.compile_blocks()
    at = saved.progress if saved else Progress(step=0, position=0, tokens=0)
    facts = {
        "parameters": parameters_by_role(work.spec),
        "recompute": dataclasses.asdict(work.plan),
        "data": describe_corpus(corpus),
    }
    with files.writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        if not resume:
            held.enter_context(files.alone(run_dir))
            check_folder(run_dir, resume)  # another one may have begun since
        write_manifest(run_dir, config, device=device, from_step=at.step, facts=facts)
        upto_step = at.step if saved else None
        log = metrics.Metrics(run_dir, upto_step=upto_step, tensorboard=config.train.tensorboard)
        tokenizer = {"tokenizer": prepared.tokenizer().save}
        last = saved.folder if saved else None
        record = Record(run_dir, log, corpus.hashes, tokenizer, last)
        with contextlib.closing(log), signals() as stop:
            loop = Loop(step, corpus.train, corpus.validation, record, stop)
            return _result(loop, loop.run(at, progress), record, work.num_parameters())


def _result(loop: Loop, at: Progress, record: Record, num_parameters: int) -> Result:
    rows = metrics.read(record.log.path)
    plot_losses({loop.config.model.linear: rows}, record.run_dir / "loss.png")
    evaluations = record.evaluations()
    return Result(
        run_dir=record.run_dir,
        step=at.step,
        tokens=at.tokens,
        finished=loop.finished(at),
        num_parameters=num_parameters,
        before=evaluations.get(0),
        after=evaluations[max(evaluations)] if evaluations else None,
        tokens_per_s=loop.tokens_per_s,
        checkpoint=record.last_checkpoint,
    )


def resolve(config: RunConfig, prepared: Prepared) -> RunConfig:
    """Fill in what the corpus decides: the vocabulary size.

    Raises:
        ConfigError: ``model.vocab_size`` is given and smaller than the tokenizer's.
    """
    wanted = config.model.vocab_size or prepared.vocab_size
    if wanted < prepared.vocab_size:
        raise ConfigError(
            f"--model.vocab-size {wanted} is below the tokenizer's {prepared.vocab_size}; "
            "leave it out, or give at least that"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=wanted))


def open_corpus(prepared: Prepared, config: RunConfig) -> Corpus:
    """The rows of a run. Raises ``ConfigError`` where there are too few of them."""
    data = config.data
    train, validation = (
        Rows(prepared, split, data.sequence_length, data.rows) for split in ("train", "validation")
    )
    check_enough(train, config.train.batch_size)
    check_enough(validation, 1)
    parts = prepared.parts
    hashes = {
        "tokenizer": prepared.tokenizer_hash,
        "corpus": f"{parts['train'].tokens} tokens {parts['train'].sha256}, "
        f"{parts['validation'].sha256} held out",
        "validation": validation_hash(validation, data.validation_tokens),
    }
    return Corpus(prepared, train, validation, hashes)


def describe_corpus(corpus: Corpus) -> dict[str, object]:
    """What ``run.json`` says of the data."""
    parts = corpus.prepared.parts
    return {
        "folder": str(corpus.prepared.folder),
        "hashes": corpus.hashes,
        "parts": {name: dataclasses.asdict(part) for name, part in parts.items()},
    }


def parameters_by_role(spec: ModelSpec) -> dict[str, int]:
    """How many numbers the tensors of each role hold."""
    counts: Counter[str] = Counter()
    for tensor in spec.tensors.values():
        counts[tensor.role] += tensor.num_items
    return dict(counts)


def make_step(
    config: RunConfig, spec: ModelSpec, device: torch.device, saved: Checkpoint | None
) -> Step:
    """Model and optimizer: initialised, or as a checkpoint has them."""
    if saved is None:
        dtype = weights_dtype(config.train.precision)
        model = build(spec, config.train.seed, device, dtype)
    else:
        model = load_model(saved, device)
    step = Step(config, model, make_optimizer(config, model), device)
    if saved is None:
        step.run_events(0)
    else:
        state = saved.state()
        try:
            restore(step.optimizer, state, device)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"{saved.folder / checkpoint.STATE}: is not the state of this optimizer ({error}); "
                "restore the file, or remove the checkpoint to go on from the one before it"
            ) from error
    return step


def make_optimizer(config: RunConfig, model: LanguageModel) -> torch.optim.Optimizer:
    """The optimizer of a model's trained parameters."""
    section = config.optimizer
    settings = settings_of(section, config.train.seed)
    method = optimizers.get(section.name)
    return method.build(model.trained(), options_of(section, section.name), settings)
