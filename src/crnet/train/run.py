"""A run: from a configuration to a folder with figures and checkpoints.

    check -> prepare -> resolve -> spec and plan -> build (or load) -> manifest -> loop

``step`` is one step, ``loop`` repeats it, ``resume`` says what a run that goes on must keep.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crnet import optimizers, trackers
from crnet.adapters import beside
from crnet.config import presets
from crnet.config.check import check
from crnet.config.model_spec import ModelSpec, config_at
from crnet.config.sections import (
    RunConfig,
    TrainConfig,
    adapter_of,
    share_of,
    trackers_of,
)
from crnet.config.serialize import override, read_json, to_dict
from crnet.cost.workload import Workload, micro_batch_of, workload
from crnet.data.prepare import prepare
from crnet.data.rows import Rows, check_enough, validation_hash
from crnet.data.shards import Prepared
from crnet.data.tokenizer import Tokenizer
from crnet.errors import ConfigError
from crnet.hub import files as hub
from crnet.inference.evaluate import Evaluation
from crnet.inference.load import BASE, BASE_SHA256, describe_base, load_model, pick_device
from crnet.kernels import compiled
from crnet.model.device import prepare_device, with_precision
from crnet.model.language_model import LanguageModel
from crnet.model.padding import stored_on
from crnet.paper import protocol
from crnet.parallel.engine import Engine
from crnet.parallel.pipeline import PipelineEngine, lay_out_part
from crnet.parallel.saving import put_together
from crnet.parallel.world import ALONE, World, joined
from crnet.report.plots import loss_picture
from crnet.storage import checkpoint, files, metrics
from crnet.storage.checkpoint import Checkpoint, Progress
from crnet.storage.manifest import MANIFEST, describe_code, write_manifest
from crnet.storage.metrics import Metrics
from crnet.trackers import Trackers
from crnet.train.deterministic import deterministic
from crnet.train.loop import Loop, Record
from crnet.train.resume import (
    check_folder,
    check_plugins,
    newest_of,
    restore,
    say_changes,
    set_random_states,
)
from crnet.train.signals import signals
from crnet.train.start import check_start, initial_model
from crnet.train.step import Step, make_optimizer


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    run_dir: Path
    step: int
    tokens: int
    finished: bool
    """False where a signal or ``train.stop_after_steps`` stopped it; it can be resumed."""
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
            was never interrupted (same machine and threads, CPU). Into more steps: from the one
            before the schedule's fall, where it has one (``Schedule.last_stable``).
        progress: show a progress bar on stderr.
    Raises:
        ConfigError: the configuration, the corpus or the folder cannot be used.
        TrainingError: loss or gradient became non-finite; names the step, the rows and the last
            good checkpoint.
    """
    check(config)
    with contextlib.ExitStack() as held:  # what keeps other processes out of the folder
        world = held.enter_context(joined(config.parallel))
        world.on_first(lambda: trackers.check_installed(trackers_of(config.train)))
        world.on_first(lambda: beside.check_installed(adapter_of(config.train)))
        world.on_first(lambda: check_folder(run_dir, resume))
        choose_kernels(config.train)
        return _run(config, run_dir, resume, progress and world.is_first, held, world)


def _run(
    config: RunConfig,
    run_dir: Path,
    resume: bool,
    progress: bool,
    held: contextlib.ExitStack,
    world: World,
) -> Result:
    if resume:
        world.on_first(lambda: _take(run_dir, held))
        check_plugins(run_dir)
        metrics.read(run_dir / metrics.METRICS)  # a broken one is refused before anything changes
    prepared = world.on_first(lambda: prepare(config.data, progress=progress))
    prepared = prepared if world.is_first else prepare(config.data, progress=False)
    device = pick_device(config.train.device)
    config = resolve(config, prepared, device)
    prepare_device(config, device)
    work = workload(work_of_one(config, device))
    corpus = open_corpus(prepared, config)
    world.check_same(lambda: {"corpus": corpus.hashes, "code": describe_code()})
    same = deterministic(device) if config.train.deterministic else contextlib.nullcontext()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    saved = newest_of(run_dir, config, world) if resume else None
    changed = say_changes(saved, config, corpus.hashes, say=world.is_first) if resume else []
    began = _began_with(run_dir, saved, config, prepared)
    step = make_step(config, work.spec, device, saved, world, corpus.train)
    step.model.recompute(work.plan)
    if config.train.compile:
        step.model.compile_blocks()
    at = saved.progress if saved else Progress(step=0, position=0, tokens=0)
    facts = _facts(config, work, device, corpus) | {"init_from": began}
    start = {"from_step": at.step, "resumed_with": changed}

    def begin() -> None:
        with files.writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            if not resume:
                _take(run_dir, held)
                check_folder(run_dir, resume)  # another one may have begun since
            write_manifest(run_dir, config, device=device, start=start, facts=facts)

    world.on_first(begin)
    with files.writing(run_dir):
        upto_step = at.step if saved else None
        tracking = functools.partial(start_trackers, config, run_dir, upto_step)
        log = Metrics(run_dir, upto_step=upto_step, trackers=tracking, writes=world.is_first)
        tokenizer, last = prepared.tokenizer(), saved.folder if saved else None
        extra, files_of = _added(step.model, corpus, tokenizer, began, saved)
        card = functools.partial(hub.write, tokenizer)
        record = Record(run_dir, log, extra, files_of, card, last, world)
        with same, contextlib.closing(log), signals(say=world.is_first) as stop:
            loop = Loop(step, corpus.train, corpus.validation, record, stop)
            with world.naming_the_lost(lambda: f"step {loop.at.step}"):
                loop.run(at, progress)
            at = work.spec.at(loop.at.step, config.train.steps)
            return _result(loop, record, sum(each.num_items for each in at.tensors.values()))


def _facts(
    config: RunConfig, work: Workload, device: torch.device, corpus: Corpus
) -> dict[str, Any]:
    """What ``run.json`` says of a run beside its configuration."""
    return {
        "parameters": parameters_by_role(work.spec),
        "recompute": dataclasses.asdict(work.plan),
        "kernels": "fused" if compiled.fused_on(device) else "torch",
        "data": describe_corpus(corpus),
        **protocol.published(config),
    }


def start_trackers(config: RunConfig, run_dir: Path, upto_step: int | None) -> Trackers | None:
    """Those that the configuration names, at the run of before where it goes on; None: it names
    none."""
    names = trackers_of(config.train)
    if not names:
        return None
    first_step = 0 if upto_step is None else upto_step + 1
    place = trackers.Place(run_dir, trackers.identity_of(run_dir), first_step)
    return Trackers(names, place, to_dict(config))


def _take(run_dir: Path, held: contextlib.ExitStack) -> None:
    """Keep other runs out of the folder."""
    held.enter_context(files.alone(run_dir))


def _began_with(
    run_dir: Path, saved: Checkpoint | None, config: RunConfig, prepared: Prepared
) -> object:
    """What ``run.json`` says of ``train.init_from``; a run that goes on needs no more of it."""
    if config.train.init_from is None:
        return None
    if saved is not None:
        return read_json(run_dir / MANIFEST).get("init_from")
    return check_start(config.train.init_from, config, prepared.tokenizer_hash)


def _added(
    model: LanguageModel,
    corpus: Corpus,
    tokenizer: Tokenizer,
    began: Any,
    saved: Checkpoint | None,
) -> tuple[dict[str, str], dict[str, Callable[[Path], None]]]:
    """What every checkpoint notes and holds beside weights and state (``began``: _began_with)."""
    notes, files_of = dict(corpus.hashes), {"tokenizer": tokenizer.save}
    if model.spec.adapter is not None:
        if saved is None:
            notes |= describe_base(Path(began["checkpoint"]))
        else:
            notes |= {key: saved.extra[key] for key in (BASE, BASE_SHA256)}
        base = Path(notes[BASE])
        files_of["adapter"] = functools.partial(beside.write, model=model, base=base)
    return notes, files_of


def work_of_one(config: RunConfig, device: torch.device) -> RunConfig:
    """What one process of a run computes."""
    return override(config, train={"device": str(device), "batch_size": share_of(config)})


def _result(loop: Loop, record: Record, num_parameters: int) -> Result:
    if record.world.is_first:
        rows = metrics.read(record.log.path)
        loss_picture({loop.config.model.linear: rows}, record.run_dir / "loss.png")
    evaluations, at = record.evaluations, loop.at
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


def choose_kernels(train: TrainConfig) -> None:
    """Set the process's kernels. Raises ``ConfigError`` where blocks cannot be compiled."""
    compiled.choose(train.kernels)
    if train.compile and (problem := compiled.compiler_problem(pick_device(train.device))):
        raise ConfigError(f"--train.compile: {problem}, or leave --train.compile out")


def resolve(config: RunConfig, prepared: Prepared, device: torch.device) -> RunConfig:
    """Fill in what corpus and device decide: vocabulary size, precision, the steps of epochs; then
    what the parameterization makes of these.

    Raises:
        ConfigError: ``model.vocab_size`` is given and smaller than the tokenizer's, or steps are
            given beside epochs.
    """
    wanted = config.model.vocab_size or prepared.vocab_size
    if wanted < prepared.vocab_size:
        raise ConfigError(
            f"--model.vocab-size {wanted} is below the tokenizer's {prepared.vocab_size}; "
            "leave it out, or give at least that"
        )
    config = config_at(with_steps(with_precision(config, device), prepared), 0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=wanted))


def with_steps(config: RunConfig, prepared: Prepared) -> RunConfig:
    """The run with the steps of its epochs: every row is read as often, the last step filled up
    from the next pass."""
    epochs, given = config.train.epochs, config.train.steps
    if epochs is None:
        return config
    rows = Rows(prepared, "train", config.data.sequence_length, config.data.rows)
    steps = -(-epochs * len(rows) // config.train.batch_size)
    if given not in (TrainConfig.steps, presets.get(config.preset).train.steps, steps):
        raise ConfigError(
            f"--train.steps {given} with --train.epochs {epochs}, which are {steps} steps; leave "
            "one of them out (--train.epochs none)"
        )
    config = override(config, train={"steps": max(steps, 1)})
    check(config)
    return config


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
    config: RunConfig,
    spec: ModelSpec,
    device: torch.device,
    saved: Checkpoint | None,
    world: World = ALONE,
    rows: Rows | None = None,
) -> Step:
    """Model and optimizer: initialised, or as a checkpoint has them; this process's part.

    ``rows``: of training, for maps that look at the first ones (``Step.begin``).
    """
    lay = functools.partial(lay_out_part, world=world, length=config.data.sequence_length)
    if saved is None:
        model = initial_model(config, spec, device, lay)
    else:
        spec = spec.at(saved.progress.step, config.train.steps)
        spec = stored_on(spec, device, optimizers.get(config.optimizer.name))
        model = load_model(saved, device, spec, lay)
    engine = make_engine(config, model, device, world)
    step = Step(config, engine, make_optimizer(config, model), device)
    if saved is None:
        step.begin(rows)
    else:
        try:
            if saved.in_parts and _reads_parts(step.engine, spec):
                state = saved.state_without_parts()
                put_together(step.optimizer, saved, state["optimizer"])
                set_random_states(state, device)
            else:
                restore(step.optimizer, saved.state(), device, model.spec)
        except ConfigError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"{saved.folder / checkpoint.STATE}: is not the state of this optimizer ({error}); "
                "restore the file, or remove the checkpoint to go on from the one before it"
            ) from error
    return step


def _reads_parts(engine: Engine, spec: ModelSpec) -> bool:
    """Whether a process's state is made of what lies in parts, none of it whole."""
    parallel = engine.world.parallel
    return engine.is_split and spec.width_multiple == parallel.pipeline == parallel.tensor == 1


def make_engine(
    config: RunConfig, model: LanguageModel, device: torch.device, world: World
) -> Engine:
    """How the processes of a run compute with their parts of the model."""
    if world.parallel.pipeline == 1:
        return Engine(model, world)
    micro_batch = micro_batch_of(work_of_one(config, device), model.spec.whole())
    return PipelineEngine(model, world, micro_batch)
