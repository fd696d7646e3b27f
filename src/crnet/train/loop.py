"""The loop: read, step, log, evaluate, save. One path, no callbacks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crnet.config.model_spec import config_at
from crnet.config.sections import RunConfig
from crnet.data.rows import Batches, Rows
from crnet.hub.card import Evaluated
from crnet.inference.evaluate import Evaluation, Precision, evaluate_unless, evaluation_of
from crnet.parallel.saving import taken_apart, weights_in_parts
from crnet.parallel.world import ALONE, World, peak_bytes
from crnet.recompute.plan import Added
from crnet.storage import checkpoint, metrics, parts
from crnet.storage.checkpoint import Contents, Progress
from crnet.train.resume import all_weights, random_states, snapshot
from crnet.train.signals import Stop
from crnet.train.step import Step, Stepped, last_stable_step

TOKENS_BEFORE_TRAINING = 8192
"""Most input tokens of the evaluation before the first step."""


@dataclass
class Record:
    """What a run writes down: metrics and checkpoints."""

    run_dir: Path
    log: metrics.Metrics
    extra: Mapping[str, str]
    """Hashes of the inputs, for every checkpoint."""
    files: Mapping[str, Callable[[Path], None]]
    """What else a checkpoint gets (``storage.checkpoint.Contents``)."""
    beside: Callable[[Path, RunConfig, Progress, Evaluated | None], None]
    """Writes what other programs read of a checkpoint, of a run that stands there."""
    last_checkpoint: Path | None = None
    world: World = ALONE
    """Its first process writes; all of them have the same record."""

    def __post_init__(self) -> None:
        self.evaluations = {
            row["step"]: evaluation_of(row) for row in self.log.rows_before if "val_loss" in row
        }
        """What has been evaluated so far, by step."""
        self._pending: tuple[Contents, Any] | None = None
        """A checkpoint in parts that is being written, and its future."""

    def has(self, step: int) -> bool:
        """Whether the last checkpoint is of that step."""
        return self.last_checkpoint is not None and self.last_checkpoint.name == f"step_{step}"

    def save(self, at: Progress, step: Step) -> None:
        """Write a checkpoint of model and optimizer; in parts, begin to."""
        self.log.sync()
        self.finish()
        if self.world.size > 1 and step.config.parallel.checkpoint == "parts":
            self._begin_parts(at, step)
            return
        weights = all_weights(step.model, self.world)
        state = snapshot(step.optimizer, step.model.spec, self.world)
        config = config_at(step.config, at.step)
        files, beside = self.files, self._beside(config, at)
        self._publish(Contents(weights, state, config, at, self.extra, files, beside=beside))

    def _beside(self, config: RunConfig, at: Progress) -> Callable[[Path], None]:
        found = None
        if self.evaluations:
            step = max(self.evaluations)
            found = step, self.evaluations[step]
        return lambda folder: self.beside(folder, config, at, found)

    def _begin_parts(self, at: Progress, step: Step) -> None:
        state, tensors = taken_apart(step.optimizer)
        tensors |= weights_in_parts(step.model)
        folder = self.world.on_first(lambda: checkpoint.begin(self.run_dir, at.step))
        written = parts.write_later(folder, tensors, self.world.aside)

        def wait(_: Path) -> None:
            if error := written.exception():  # no Exception: torch's own kind
                raise OSError(str(error))

        state = {"optimizer": state, **random_states(step.device)}
        config = config_at(step.config, at.step)
        beside = self._beside(config, at)
        contents = Contents({}, state, config, at, self.extra, self.files, wait, beside)
        self._pending = contents, written

    def finish(self, *, wait: bool = True) -> None:
        """Publish the checkpoint in parts that is being written; where not ``wait``, if it is."""
        if self._pending is None:
            return
        contents, written = self._pending
        if not wait and self.world.any(not written.done()):
            return
        self._pending = None
        written.exception()  # every process has written; the first one says it if it could not
        self._publish(contents)

    def _publish(self, contents: Contents) -> None:
        keep, spared = contents.config.train.keep_checkpoints, last_stable_step(contents.config)
        self.world.on_first(lambda: checkpoint.save(self.run_dir, contents, keep, spared))
        self.last_checkpoint = checkpoint.folder_of(self.run_dir, contents.progress.step)


class Loop:
    """The steps of one start of a run."""

    def __init__(self, step: Step, rows: Rows, validation: Rows, record: Record, stop: Stop):
        self.config: RunConfig = step.config
        self._step, self._rows, self._validation = step, rows, validation
        self._record, self._stop, self._world = record, stop, record.world
        self.at = Progress(step=0, position=0, tokens=0)
        """Where the run stands."""
        self._stable = last_stable_step(self.config)
        self._guarded: Added = {}
        self._trained, self._logged = _Clock(), _Clock()

    @property
    def tokens_per_s(self) -> float:
        """Training tokens over training time: no evaluation, no saving."""
        return self._trained.rate()

    def run(self, at: Progress, show: bool) -> Progress:
        """Step until the last step, the one to stop at, or a signal; returns where the run stands.

        Args:
            at: where it stands.
            show: a progress bar on stderr.
        """
        train, record, self.at = self.config.train, self._record, at
        batches = Batches(self._rows, train.seed, train.batch_size, at.position)
        bar = _bar(train.steps, at.step, show)
        # A signal during an evaluation leaves it undone; the resumed run makes up for it here.
        if self._evaluation_due(at.step) and at.step not in record.evaluations:
            self._evaluate(at, bar)
        self._step.model.train()
        end = min(train.steps, train.stop_after_steps or train.steps)
        while at.step < end and not self._stopping():
            start_s = time.perf_counter()
            micro_batches = batches.next(train.micro_batch_size, *self._world.share)
            done = self._step(micro_batches, at, record.last_checkpoint)
            if self._due(at.step + 1):
                done.check()
            elapsed_s = time.perf_counter() - start_s
            for clock in (self._trained, self._logged):
                clock.add(done.num_tokens, elapsed_s)
            at = self.at = Progress(at.step + 1, batches.position, at.tokens + done.num_tokens)
            bar.update()
            self._log(at, done, bar)
            if self._evaluation_due(at.step) and (found := self._evaluate(at, bar)):
                _write(bar, _progress_line(at, found))
            record.finish(wait=False)
            if self._saving_due(at.step):
                record.save(at, self._step)
        bar.close()
        record.finish()
        if not self.finished(at) and not record.has(at.step):
            self._step.check()
            record.save(at, self._step)
            record.finish()
        return at

    def _stopping(self) -> bool:
        """Whether a signal asked any process to stop: all of them do, at the same step."""
        return self._world.any(self._stop.requested is not None)

    def finished(self, at: Progress) -> bool:
        """Whether every step is done, and the last one evaluated."""
        return at.step >= self.config.train.steps and at.step in self._record.evaluations

    def _is_last(self, at: Progress) -> bool:
        return at.step == self.config.train.steps

    def _due(self, step: int) -> bool:
        """Whether anything is written of a step: only then is its device waited for."""
        train = self.config.train
        every = (train.log_every_steps, train.eval_every_steps)
        return self._saving_due(step) or any(_is_due(step, each) for each in every)

    def _saving_due(self, step: int) -> bool:
        train = self.config.train
        return step in (train.steps, self._stable) or _is_due(step, train.save_every_steps)

    def _log(self, at: Progress, done: Stepped, bar: Any) -> None:
        """The rows of one step, where they are due."""
        self._log_guard(at, bar)
        if not (self._is_last(at) or _is_due(at.step, self.config.train.log_every_steps)):
            return
        rate = self._logged.rate()
        row = {"step": at.step, "tokens": at.tokens, "loss": done.loss, "lr": done.lr}
        row |= {"grad_norm": done.grad_norm, "tokens_per_s": round(rate, 1)}
        row["peak_bytes"] = int(self._world.most(peak_bytes(self._step.device)))
        text = f"loss {done.loss:.3f}, {rate:,.0f} tokens/s"
        if (size := self._world.size) > 1:
            text += f", {rate / size:,.0f} a process, {row['peak_bytes'] / 2**30:.2f} GiB at most"
        self._record.log.write(row)
        bar.set_postfix_str(text)
        self._logged = _Clock()

    def _log_guard(self, at: Progress, bar: Any) -> None:
        """Write down which outputs the guard of ``invert`` keeps, whenever they change."""
        added = self._step.model.guard_added()
        if added == self._guarded:
            return
        self._guarded = added
        self._record.log.write({"step": at.step, "invert_also_keeps": added})
        layers = "; ".join(f"{position} of {list(kept)}" for position, kept in added.items())
        _write(
            bar,
            f"step {at.step}: the error of invert would pass {self.config.train.invert_tolerance}; "
            f"also kept are the outputs {layers or 'of no other block'}",
        )

    def _evaluation_due(self, step: int) -> bool:
        train = self.config.train
        return step in (0, train.steps) or _is_due(step, train.eval_every_steps)

    def _evaluate(self, at: Progress, bar: Any) -> Evaluation | None:
        bar.set_postfix_str("evaluating")
        precision = self._evaluation_precision(at.step)
        found = evaluate_unless(
            self._stopping,
            self._step.model,
            self._validation,
            self._evaluation_tokens(at.step),
            precision,
            self._world,
            self._step.engine.sums,
        )
        if found is not None:
            row = {"step": at.step, **found.figures(), "val_precision": precision}
            self._record.log.write(row)
            self._record.evaluations[at.step] = found
        return found

    def _evaluation_precision(self, step: int) -> Precision:
        """On a GPU that of the run's products, until the last step: fp32 there takes longer than
        the training between two evaluations. Everywhere else, and at the end, fp32."""
        if self._step.device.type != "cuda" or step >= self.config.train.steps:
            return "fp32"
        return "tf32" if self.config.train.precision == "fp32" else "bf16"

    def _evaluation_tokens(self, step: int) -> int:
        """Of an untrained model, whose loss is about ln(vocabulary size) whatever it reads, a few:
        the first step need not wait for the whole set."""
        tokens, is_trained = self.config.data.validation_tokens, self.config.train.init_from
        return tokens if step or is_trained else min(tokens, TOKENS_BEFORE_TRAINING)


class _Clock:
    """Tokens and the time they took."""

    def __init__(self) -> None:
        self.tokens, self.elapsed_s = 0, 0.0

    def add(self, tokens: int, elapsed_s: float) -> None:
        self.tokens, self.elapsed_s = self.tokens + tokens, self.elapsed_s + elapsed_s

    def rate(self) -> float:
        """Tokens a second; 0 before the first."""
        return self.tokens / self.elapsed_s if self.elapsed_s else 0.0


def _is_due(step: int, every: int) -> bool:
    """Whether a step is one of every so many; 0: none is."""
    return bool(every) and step % every == 0


def _bar(steps: int, done: int, show: bool) -> tqdm[Any]:
    hidden: dict[str, Any] = {} if show else {"disable": True}  # else TQDM_DISABLE says it
    return tqdm(
        total=steps,
        initial=done,
        unit="step",
        **hidden,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,  # a log file wants few lines
    )


def _write(bar: Any, line: str) -> None:
    if not bar.disable:
        bar.write(line, file=sys.stderr)


def _progress_line(at: Progress, found: Evaluation) -> str:
    return (
        f"step {at.step}: validation loss {found.loss:.4f}, {found.words()} ({at.tokens:,} tokens)"
    )
