"""The loop: read, accumulate, check, clip, step, log, evaluate, save. One path, no callbacks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import crnet
from crnet import optimizers
from crnet.config.check import check
from crnet.config.sections import RunConfig
from crnet.config.serialize import read_json, to_dict
from crnet.cost import activations as cost
from crnet.data import shards as data
from crnet.errors import ConfigError, TrainingError
from crnet.inference.evaluate import Evaluation, evaluate_unless
from crnet.linears import num_parameters
from crnet.model.backbone import LanguageModel, build
from crnet.recompute.engine import Recomputation
from crnet.report.loss_plot import plot_losses
from crnet.storage import checkpoint, files, metrics
from crnet.storage.checkpoint import Progress


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
    _check_folder(run_dir, resume)
    prepared = data.prepare(config.data, progress=progress)
    config = resolve(config, prepared)
    plan = cost.plan(config)
    rows, validation = (
        data.Rows(prepared, split, config.data.sequence_length, config.data.rows)
        for split in ("train", "validation")
    )
    data.check_enough(rows, config.train.batch_size)
    data.check_enough(validation, 1)
    part = prepared.parts["train"]
    hashes = {
        "tokenizer": prepared.tokenizer_hash,
        # What the order of rows hangs on, without reading every token of a large corpus again.
        "corpus": f"{part.tokens} tokens, {part.documents} documents, "
        f"{prepared.validation_sha256} held out",
        "validation": data.validation_hash(validation, config.data.validation_tokens),
    }
    device = pick_device(config.train.device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)

    saved = checkpoint.newest(run_dir) if resume else None
    if saved is not None:
        _check_same_run(saved, config, hashes)
    model = build(config.model, config.train.seed, device)
    if config.train.precision == "bf16":
        model.bfloat16()
    method = optimizers.get(config.optimizer.name)
    optimizer = method.build(model.optimizer_groups(), config.optimizer)
    at = Progress(step=0, position=0, tokens=0)
    if saved is not None:
        checkpoint.load_weights(model, saved.weights())
        restore(optimizer, saved.state(), device)
        at = saved.progress
    if plan.policy != "none":
        model.model.recomputation = Recomputation(plan)
    if config.train.compile:
        for block in model.model.layers:
            block.compile()

    with files.writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        write_manifest(run_dir, config, plan, prepared, hashes, device, at.step)
        log = metrics.Metrics(
            run_dir, upto_step=at.step if saved else None, tensorboard=config.train.tensorboard
        )
        loop = _Loop(
            config,
            run_dir,
            model,
            optimizer,
            rows,
            validation,
            log,
            hashes,
            device,
            saved.folder if saved else None,
        )
        with contextlib.closing(log), _signals() as stop:
            return loop.run(at, prepared.tokenizer(), stop, progress)


def resolve(config: RunConfig, prepared: data.Prepared) -> RunConfig:
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


def pick_device(name: str) -> torch.device:
    """``auto``: the GPU where there is one. Raises ``ConfigError`` where the device is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--train.device {name}: cannot be used ({reason}); say cpu, cuda or auto"
        ) from error
    return device


def learning_rate(step: int, config: RunConfig) -> float:
    """The base rate of optimizer step ``step``, counted from 1.

    Linear from 0 over the first ``warmup_frac`` of the steps (so that step 1 already moves), then a
    cosine that reaches ``min_lr_frac`` of the peak at the last step. Source: appendix E.2.1.
    """
    peak, floor = config.optimizer.lr, config.optimizer.min_lr_frac
    warmup_steps = config.optimizer.warmup_frac * config.train.steps
    if step <= warmup_steps:
        return peak * step / warmup_steps
    done = (step - warmup_steps) / (config.train.steps - warmup_steps)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class _Loop:
    """The state of one run and its step; ``run`` is the loop."""

    config: RunConfig
    run_dir: Path
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    rows: data.Rows
    validation: data.Rows
    log: metrics.Metrics
    hashes: dict[str, str]
    device: torch.device
    last_checkpoint: Path | None

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.guarded: dict[str, tuple[int, ...]] = {}

    def run(self, at: Progress, tokenizer: Any, stop: _Stop, show: bool) -> Result:
        train = self.config.train
        batches = data.Batches(self.rows, train.seed, train.batch_size, at.position)
        bar = tqdm(
            total=train.steps,
            initial=at.step,
            unit="step",
            disable=not show,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 30,  # a log file wants few lines
        )
        # A signal during an evaluation leaves it undone; the resumed run makes up for it here.
        if self.evaluation_due(at.step) and at.step not in self.evaluations():
            bar.set_postfix_str("evaluating")
            self.evaluate(at.step, stop)
        self.model.train()
        trained_tokens, trained_s = 0, 0.0
        logged_tokens, logged_s = 0, 0.0
        while at.step < train.steps and not stop.requested:
            start_s = time.perf_counter()
            micro_batches = batches.next(train.micro_batch_size)
            lr = learning_rate(at.step + 1, self.config)
            loss, norm, num_tokens = self.step(micro_batches, lr, at)
            elapsed_s = time.perf_counter() - start_s
            at = Progress(at.step + 1, batches.position, at.tokens + num_tokens)
            self.log_guard(at, bar if show else None)
            trained_tokens, trained_s = trained_tokens + num_tokens, trained_s + elapsed_s
            logged_tokens, logged_s = logged_tokens + num_tokens, logged_s + elapsed_s
            last = at.step == train.steps
            bar.update()
            if at.step % train.log_every_steps == 0 or last:
                rate = logged_tokens / logged_s
                row = {"step": at.step, "tokens": at.tokens, "loss": loss, "lr": lr}
                self.log.write(row | {"grad_norm": norm, "tokens_per_s": round(rate, 1)})
                bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s")
                logged_tokens, logged_s = 0, 0.0
            if self.evaluation_due(at.step):
                bar.set_postfix_str("evaluating")
                found = self.evaluate(at.step, stop)
                if show and found is not None:
                    bar.write(_progress_line(at, found), file=sys.stderr)
            if last or (train.save_every_steps and at.step % train.save_every_steps == 0):
                self.save(at, tokenizer)
        bar.close()
        evaluations = self.evaluations()
        finished = at.step >= train.steps and at.step in evaluations
        if not finished and not self.saved(at.step):
            self.save(at, tokenizer)
        plot_losses(
            {self.config.model.linear: metrics.read(self.log.path)}, self.run_dir / "loss.png"
        )
        return Result(
            run_dir=self.run_dir,
            step=at.step,
            tokens=at.tokens,
            finished=finished,
            num_parameters=sum(num_parameters(self.config.model).values()),
            before=evaluations.get(0),
            after=evaluations[max(evaluations)] if evaluations else None,
            tokens_per_s=trained_tokens / trained_s if trained_s else 0.0,
            checkpoint=self.last_checkpoint,
        )

    def step(
        self, micro_batches: list[tuple[Tensor, Tensor]], lr: float, at: Progress
    ) -> tuple[float, float, int]:
        """One optimizer step; returns its loss, its gradient norm before clipping, its tokens."""
        clip = self.config.optimizer.clip_norm
        num_tokens = sum(int((targets != data.IGNORED).sum()) for _, targets in micro_batches)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for tokens, targets in micro_batches:
            tokens = tokens.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            with self.autocast():
                micro_loss, _ = self.model(tokens, targets)
            # Divided by the whole step's tokens: micro-batches add up to the batch, padded or not.
            (micro_loss / num_tokens).backward()
            loss_sum += micro_loss.detach()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None]
        )
        loss, grad_norm = (loss_sum / num_tokens).item(), norm.item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingError(self.non_finite(loss, grad_norm, at))
        if clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.optimizer.step()
        return loss, grad_norm, num_tokens

    def log_guard(self, at: Progress, bar: Any) -> None:
        """Write down which outputs the guard of ``invert`` keeps, whenever they change."""
        recomputation = self.model.model.recomputation
        if recomputation is None or recomputation.added == self.guarded:
            return
        self.guarded = recomputation.added
        self.log.write({"step": at.step, "invert_also_keeps": self.guarded})
        if bar is not None:
            layers = "; ".join(f"{name} of {list(its)}" for name, its in self.guarded.items())
            bar.write(
                f"step {at.step}: the error of invert would pass {recomputation.plan.tolerance}; "
                f"also kept are the outputs {layers or 'of no other block'}",
                file=sys.stderr,
            )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16-mixed"
        )

    def non_finite(self, loss: float, norm: float, at: Progress) -> str:
        end = at.position + self.config.train.batch_size
        good = self.last_checkpoint or "none was saved yet"
        return (
            f"step {at.step + 1}: loss {loss}, gradient norm {norm}; the weights were not changed. "
            f"The step read the sequences at positions {at.position} to {end - 1}. "
            f"Last good checkpoint: {good}. "
            "Try a smaller --optimizer.lr, a longer --optimizer.warmup-frac or --train.precision "
            "fp32"
        )

    def evaluation_due(self, step: int) -> bool:
        every = self.config.train.eval_every_steps
        return step in (0, self.config.train.steps) or bool(every and step % every == 0)

    def evaluations(self) -> dict[int, Evaluation]:
        """What has been evaluated so far, by step."""
        return {
            row["step"]: Evaluation(row["val_loss"], row["val_tokens"])
            for row in metrics.read(self.log.path)
            if "val_loss" in row
        }

    def evaluate(self, step: int, stop: _Stop) -> Evaluation | None:
        found = evaluate_unless(
            lambda: stop.requested is not None,
            self.model,
            self.validation,
            self.config.data.validation_tokens,
        )
        if found is not None:
            row = {"step": step, "val_loss": found.loss, "val_perplexity": found.perplexity}
            self.log.write(row | {"val_tokens": found.tokens})
        return found

    def saved(self, step: int) -> bool:
        return self.last_checkpoint is not None and self.last_checkpoint.name == f"step_{step}"

    def save(self, at: Progress, tokenizer: Any) -> None:
        self.log.sync()
        self.last_checkpoint = checkpoint.save(
            self.run_dir,
            model=self.model,
            state=snapshot(self.optimizer),
            config=self.config,
            progress=at,
            tokenizer=tokenizer,
            extra=self.hashes,
            keep=self.config.train.keep_checkpoints,
        )


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Optimizer and random states, as tensors and numbers (``torch.load(weights_only=True)``)."""
    state: dict[str, Any] = {
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state_all()
    return state


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any], device: torch.device) -> None:
    """Inverse of ``snapshot``."""
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch_rng"])
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state_all(state["cuda_rng"])


class _Stop:
    """Set by the first SIGINT or SIGTERM; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.requested: str | None = None


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """The first SIGINT or SIGTERM asks the loop to save and stop; the second ends at once."""
    stop = _Stop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous: dict[int, Any] = {}

    def handle(number: int, frame: object) -> None:
        for each in numbers:  # first of all: a second signal may come while the first is answered
            signal.signal(each, signal.SIG_DFL)
        stop.requested = signal.Signals(number).name
        print(
            f"\n{stop.requested}: saving after this step; once more ends at once", file=sys.stderr
        )

    try:
        for number in numbers:
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: whoever runs us there handles signals
        pass
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_folder(run_dir: Path, resume: bool) -> None:
    begun = os.path.exists(run_dir / "run.json")  # no where a folder may not be entered
    if begun and not resume:
        raise ConfigError(
            f"{run_dir}: a run is there already; go on with --resume, or choose another --out"
        )
    if resume and not begun:
        raise ConfigError(f"{run_dir}: nothing to resume, there is no run.json in it")
    # Nothing is made before the corpus is known to be good; but learn now what would fail then.
    above = (run_dir, *run_dir.absolute().parents)
    nearest = next(path for path in above if os.path.exists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "is not a folder" if not nearest.is_dir() else "cannot be written"
        raise ConfigError(f"{run_dir}: {nearest} {reason}; choose another --out")


def _check_same_run(
    saved: checkpoint.Checkpoint, config: RunConfig, hashes: dict[str, str]
) -> None:
    problems = []
    old, new = to_dict(saved.config), to_dict(config)
    free = {"cache_dir", "validation_tokens"}
    for section in ("model", "data"):
        for key, was in old[section].items():
            if new[section][key] != was and key not in free:
                problems.append(
                    f"--{section}.{key.replace('_', '-')} was {was!r} and is now "
                    f"{new[section][key]!r}; a resumed run keeps its {section}"
                )
    for key in ("seed", "precision"):
        if new["train"][key] != old["train"][key]:
            problems.append(
                f"--train.{key} was {old['train'][key]!r} and is now {new['train'][key]!r}; "
                "a resumed run keeps it"
            )
    for what in ("tokenizer", "corpus"):
        if not problems and hashes[what] != saved.extra[what]:
            problems.append(
                f"the {what} is not the one this run began with (was {saved.extra[what]}, is "
                f"now {hashes[what]}); restore it, or start a new run"
            )
    if problems:
        raise ConfigError(problems)


def write_manifest(
    run_dir: Path,
    config: RunConfig,
    plan: cost.Plan,
    prepared: data.Prepared,
    hashes: dict[str, str],
    device: torch.device,
    step: int,
) -> None:
    """Write ``run.json``: what was run, on what, from which code. Resumptions are added to it."""
    path = run_dir / "run.json"
    start = {
        "from_step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command_line": sys.argv,
        **describe_code(),
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
    }
    earlier = []
    if path.exists():
        last = read_json(path)
        earlier = [*last.get("earlier_starts", []), {key: last.get(key) for key in start}]
    manifest = {
        "config": to_dict(config),
        **start,
        "parameters": num_parameters(config.model),
        "recompute": dataclasses.asdict(plan),
        "data": {
            "folder": str(prepared.folder),
            "hashes": hashes,
            "parts": {name: dataclasses.asdict(part) for name, part in prepared.parts.items()},
        },
        "earlier_starts": earlier,
    }
    files.write_atomically(path, json.dumps(manifest, indent=1) + "\n")


def describe_code() -> dict[str, Any]:
    """Version, commit and whether the working tree differs from it, and the libraries' versions."""
    import numpy

    return {
        "crnet": crnet.__version__,
        **_git(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def _git() -> dict[str, Any]:
    here = Path(__file__).parent

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed from a wheel inside somebody else's repository, its commit is not ours.
    if ask("ls-files", "--error-unmatch", __file__) is None:
        return {"commit": None, "dirty": None}
    status = ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(status)}


def describe_device(device: torch.device) -> str:
    """A name a reader recognises: the GPU's, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _progress_line(at: Progress, found: Evaluation) -> str:
    return (
        f"step {at.step}: validation loss {found.loss:.4f}, perplexity {found.perplexity:.2f} "
        f"({at.tokens:,} tokens)"
    )
