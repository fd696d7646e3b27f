"""The command line: words -> RunConfig -> one function.

Values come, in this order of precedence, from the command line, from ``--config`` files (a later
file wins), and from the preset (or, with ``--resume``, from the run itself). Bad input ends with
one message per problem on stderr and exit code 2; training that became non-finite with exit code 1.
Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import tomllib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cyclopts
from cyclopts import Parameter
from cyclopts.config import Dict

import crnet
from crnet import linears, optimizers
from crnet.config import presets
from crnet.config.check import check
from crnet.config.sections import (
    SECTIONS,
    DataConfig,
    Int,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from crnet.config.serialize import from_dict, read_json, to_dict
from crnet.errors import ConfigError, TrainingError
from crnet.inference.sampling import Sampling, check_sampling

if TYPE_CHECKING:
    from crnet.storage.checkpoint import Checkpoint

RUNS = Path("crnet-runs")
"""Where runs go that were given no ``--out``."""

DEFAULT_PRESET = "tiny"

CONFIGURED = ("train", "cost", "profile", "plan", "prepare", "evaluate")
"""Commands whose settings come from presets and files too."""

app = cyclopts.App(
    name="crnet",
    help="Pre-train language models with cross-layer low-rank structure (CR-Net).",
    version=crnet.__version__,
)

ConfigFiles = Annotated[tuple[Path, ...], Parameter(name="--config", negative=())]
"""YAML, TOML or JSON files with the sections model, data, optimizer, train; a later file wins."""
Json = Annotated[bool, Parameter(name="--json", negative=())]
Switch = Annotated[bool, Parameter(negative=())]


@app.command
def train(
    preset: str | None = None,
    /,
    *,
    out: Path | None = None,
    resume: Switch = False,
    config: ConfigFiles = (),
    as_json: Json = False,
    model: ModelConfig = ModelConfig(),
    data: DataConfig = DataConfig(),
    optimizer: OptimizerConfig = OptimizerConfig(),
    train: TrainConfig = TrainConfig(),
) -> None:
    """Train a model.

    Parameters
    ----------
    preset
        A recipe; crnet list names them. None: tiny, or with --resume that of the run.
    out
        Run folder; none: a new one under crnet-runs.
    resume
        Go on from the newest whole checkpoint of --out (none: of the newest run).
    config
        YAML, TOML or JSON file with sections model, data, optimizer, train; several: the last wins.
    as_json
        Print the result as JSON.
    """
    if resume:
        run_dir = out or _newest_run()
        begun = os.path.exists(run_dir / "run.json")  # if not, training says so
        preset = preset or (_run_config(run_dir).preset if begun else DEFAULT_PRESET)
    else:
        preset = preset or DEFAULT_PRESET
        run_dir = out or _new_run(f"{preset}-{model.linear}")
    run_config = RunConfig(preset=preset, model=model, data=data, optimizer=optimizer, train=train)
    check(run_config)  # before torch is imported: a slip is answered at once

    from crnet.train import run as training

    result = training.run(run_config, run_dir, resume=resume)
    figures: dict[str, Any] = {
        "run": str(result.run_dir),
        "finished": result.finished,
        "step": result.step,
        "tokens": result.tokens,
        "parameters": result.num_parameters,
        "tokens_per_s": result.tokens_per_s,
        "checkpoint": str(result.checkpoint),
        "val_loss": result.after.loss if result.after else None,
        "val_perplexity": result.after.perplexity if result.after else None,
    }
    if as_json:
        print(json.dumps(figures, indent=1))
        return
    if not result.finished:
        print(f"stopped at step {result.step}; go on with: crnet train --resume --out {run_dir}")
    else:
        perplexity = f", validation perplexity {figures['val_perplexity']:.2f}"
        print(f"step {result.step}, {result.tokens:,} tokens{perplexity}")
    print(f"run folder {run_dir} (metrics.jsonl, loss.png), checkpoint {result.checkpoint}")


@app.command
def cost(
    preset: str = DEFAULT_PRESET,
    /,
    *,
    device: str | None = None,
    ranks: int = 1,
    plot: Path | None = None,
    paper_table: Literal["1", "2", "3", "19", "22", "all"] | None = None,
    markdown: Switch = False,
    config: ConfigFiles = (),
    as_json: Json = False,
    model: ModelConfig = ModelConfig(),
    data: DataConfig = DataConfig(),
    optimizer: OptimizerConfig = OptimizerConfig(),
    train: TrainConfig = TrainConfig(),
) -> None:
    """Predict what a run takes: parameters, memory, FLOPs, communication, time. Nothing is run.

    Parameters
    ----------
    preset
        A recipe; crnet list names them.
    device
        Also the time of a step on a100-40g, a100-80g, h100, h200, cpu or FLOPS,GBPS (roofline).
    ranks
        Also the communication between so many devices.
    plot
        Draw memory and FLOPs of the parameterizations side by side, into PLOT.png and PLOT.svg.
    paper_table
        Instead: a table of the CR-Net paper, recomputed from its equations beside the print.
    markdown
        Print the paper's tables as Markdown.
    config
        YAML, TOML or JSON file with sections model, data, optimizer, train; several: the last wins.
    as_json
        Print the figures as JSON.
    """
    from crnet.cost import table as estimate

    if paper_table is not None:
        _paper_tables(paper_table, markdown, as_json)
        return
    if markdown:
        raise ConfigError("--markdown goes with --paper-table")
    if ranks < 1:
        raise ConfigError(f"--ranks is {ranks}; it must be 1 or more")
    run_config = RunConfig(preset=preset, model=model, data=data, optimizer=optimizer, train=train)
    check(run_config)
    found = estimate.table(run_config, estimate.device(device) if device else None, ranks)
    print(json.dumps(found, indent=1) if as_json else estimate.render(found))
    if plot is not None:
        from crnet.report import cost_plot as figures

        for file in figures.plot(run_config, plot):
            print(f"picture {file}", file=sys.stderr)


def _paper_tables(number: str, markdown: bool, as_json: bool) -> None:
    import dataclasses

    from crnet.paper import tables as paper_tables

    if markdown:
        if number != "all":
            raise ConfigError("--markdown writes all tables; say --paper-table all")
        print(paper_tables.markdown(), end="")
        return
    wanted = paper_tables.TABLES if number == "all" else (int(number),)
    tables = [paper_tables.table(each) for each in wanted]
    if as_json:
        print(json.dumps([dataclasses.asdict(each) for each in tables], indent=1))
        return
    print("\n\n".join(paper_tables.render(each) for each in tables))


@app.command
def profile(
    preset: str = DEFAULT_PRESET,
    /,
    *,
    rounds: int = 3,
    config: ConfigFiles = (),
    as_json: Json = False,
    model: ModelConfig = ModelConfig(),
    data: DataConfig = DataConfig(),
    optimizer: OptimizerConfig = OptimizerConfig(),
    train: TrainConfig = TrainConfig(),
) -> None:
    """Measure what cost predicts, on random tokens, and print both side by side.

    Parameters
    ----------
    preset
        A recipe; crnet list names them.
    rounds
        Steps that are timed.
    config
        YAML, TOML or JSON file with sections model, data, optimizer, train; several: the last wins.
    as_json
        Print the figures as JSON.
    """
    run_config = RunConfig(preset=preset, model=model, data=data, optimizer=optimizer, train=train)
    check(run_config)
    if rounds < 1:
        raise ConfigError(f"--rounds is {rounds}; it must be 1 or more")

    import torch

    from crnet.cost import table as estimate
    from crnet.measure.profile import measured
    from crnet.train.run import pick_device

    on = pick_device(train.device)
    if train.threads:
        torch.set_num_threads(train.threads)
    found = estimate.table(run_config, estimate.device("h200" if on.type == "cuda" else "cpu"))
    seen = measured(run_config, found, on, rounds)
    if as_json:
        print(json.dumps({"predicted": found, "measured": seen}, indent=1))
    else:
        print(f"{'':36}{'predicted':>20}{'measured':>20}{'difference':>14}")
        print(estimate.render(found, seen))


@app.command
def plan(
    preset: str = DEFAULT_PRESET,
    /,
    *,
    parameters: float | None = None,
    state_gib: float | None = None,
    memory_gib: float | None = None,
    flops_frac: float | None = None,
    like: str | None = None,
    profile: str = "uniform",
    multiple: Int = 1,
    table_10: Switch = False,
    config: ConfigFiles = (),
    as_json: Json = False,
    model: ModelConfig = ModelConfig(),
    data: DataConfig = DataConfig(),
    optimizer: OptimizerConfig = OptimizerConfig(),
    train: TrainConfig = TrainConfig(),
) -> None:
    """Find the largest ranks within a budget, explain the choice, print the command that trains it.

    Parameters
    ----------
    preset
        A recipe; crnet list names them. Its ranks are replaced.
    parameters
        Most parameters of the whole model, for example 200e6.
    state_gib
        Most GiB of weights, gradients and optimizer state.
    memory_gib
        Most GiB in all, activations at their peak included, at the micro-batch given.
    flops_frac
        Most FLOPs of the blocks, as a share of full rank's.
    like
        As many parameters as full, lowrank:0.25h, lowrank:aligned-parameters; with @adamw behind,
        as many bytes of state.
    profile
        uniform, flat, middle-heavy, lower-heavy, upper-heavy, or weights of the low-rank blocks
        (1x7,1.5x8,1x8); /k=0.5 behind it weighs a position.
    multiple
        Divides every rank; 16, 32 or 64 suit hardware.
    table_10
        Instead: the ranks of the CR-Net paper's table 10 beside those found for the same targets.
    config
        YAML, TOML or JSON file with sections model, data, optimizer, train; several: the last wins.
    as_json
        Print the figures as JSON.
    """
    import shlex

    from crnet.cost import rank_search as planner

    if table_10:
        rows = planner.table_10()
        if as_json:
            print(json.dumps([vars(row) for row in rows], indent=1))
            return
        for row in rows:
            print(
                f"{row.preset:11}{row.alignment:20}{row.reading:11}{row.published:16}"
                f"{row.found:18}{row.difference:>+8.2%}"
            )
        return
    run_config = RunConfig(preset=preset, model=model, data=data, optimizer=optimizer, train=train)
    if parameters is not None and not 0 < parameters < float("inf"):
        raise ConfigError(f"--parameters is {parameters}; it must be above zero and finite")
    budget = planner.Budget(
        parameters=None if parameters is None else int(parameters),
        state_gib=state_gib,
        memory_gib=memory_gib,
        flops_frac=flops_frac,
        like=like,
    )
    found = planner.find(run_config, budget, planner.parse_profile(profile), multiple)
    if as_json:
        figures = {
            "rank": found.rank,
            "binding": found.binding,
            "parameters": found.parameters,
            "state_bytes": found.state_bytes,
            "peak_bytes": found.peak_bytes,
            "flops_frac": found.flops_frac,
            "command": found.words,
            "config": to_dict(found.config),
        }
        print(json.dumps(figures, indent=1))
        return
    print(found.explain())
    print(f"\n{shlex.join(found.words)}")


@app.command
def prepare(
    *, config: ConfigFiles = (), as_json: Json = False, data: DataConfig = DataConfig()
) -> None:
    """Turn a corpus into token shards; train does it by itself and finds them again.

    Parameters
    ----------
    config
        YAML, TOML or JSON file with a section data.
    as_json
        Print the description as JSON.
    """
    check(RunConfig(data=data))

    from crnet.data.shards import prepare as prepare_data

    prepared = prepare_data(data)
    meta = read_json(prepared.folder / "meta.json")
    if as_json:
        print(json.dumps({"folder": str(prepared.folder), **meta}, indent=1))
        return
    print(f"{prepared.folder}: vocabulary {prepared.vocab_size:,}, {prepared.dtype}")
    for split, part in prepared.parts.items():
        print(f"{split:12}{part.documents:>12,} documents{part.tokens:>16,} tokens")


@app.command
def evaluate(
    checkpoint: Path,
    /,
    *,
    config: ConfigFiles = (),
    as_json: Json = False,
    device: str = "auto",
    data: DataConfig = DataConfig(),
) -> None:
    """Evaluate a checkpoint: token-weighted fp32 loss on its own validation set, or another corpus.

    Parameters
    ----------
    checkpoint
        A checkpoint, or a run folder (its newest whole checkpoint).
    config
        YAML, TOML or JSON file with a section data.
    as_json
        Print the figures as JSON.
    device
        cpu, cuda, ...; auto: the GPU where there is one.
    """
    from crnet.data.shards import Rows, validation_hash
    from crnet.data.shards import prepare as prepare_data
    from crnet.inference import evaluate as evaluation
    from crnet.train.run import pick_device

    check(RunConfig(data=data))
    saved = _checkpoint(checkpoint)
    prepared = prepare_data(data)
    if prepared.tokenizer_hash != saved.extra["tokenizer"]:
        raise ConfigError(
            f"{saved.folder}: was trained with another tokenizer than this corpus is prepared "
            f"with; give --data.tokenizer {saved.folder}"
        )
    rows = Rows(prepared, "validation", data.sequence_length, data.rows)
    model = saved.model(pick_device(device))
    found = evaluation.evaluate(model, rows, data.validation_tokens)
    figures = {
        "checkpoint": str(saved.folder),
        "step": saved.progress.step,
        "val_loss": found.loss,
        "val_perplexity": found.perplexity,
        "val_tokens": found.tokens,
        "validation_hash": validation_hash(rows, data.validation_tokens),
    }
    if as_json:
        print(json.dumps(figures, indent=1))
        return
    print(
        f"{saved.folder}: loss {found.loss:.6f}, perplexity {found.perplexity:.4f} over "
        f"{found.tokens:,} tokens of set {figures['validation_hash'][:12]}"
    )


@app.command
def generate(
    checkpoint: Path,
    /,
    *,
    prompt: str = "",
    sampling: Annotated[Sampling, Parameter(name="*")] = Sampling(),
    device: str = "auto",
    as_json: Json = False,
) -> None:
    """Continue a text.

    Parameters
    ----------
    checkpoint
        A checkpoint, or a run folder (its newest whole checkpoint).
    prompt
        The text to continue.
    device
        cpu, cuda, ...; auto: the GPU where there is one.
    as_json
        Print prompt, text and speed as JSON.
    """
    from crnet.inference import generate as generation
    from crnet.train.run import pick_device

    check_sampling(sampling)
    saved = _checkpoint(checkpoint)
    model = saved.model(pick_device(device))
    if not as_json:
        print(prompt, end="", flush=True)
    start_s = time.perf_counter()
    text = ""
    for piece in generation.complete(model, saved.tokenizer(), prompt, sampling):
        text += piece
        if not as_json:
            print(piece, end="", flush=True)
    if not as_json:
        print()
        return
    elapsed_s = time.perf_counter() - start_s
    print(json.dumps({"prompt": prompt, "text": text, "elapsed_s": elapsed_s}, indent=1))


@app.command(name="list")
def list_known(*, as_json: Json = False) -> None:
    """Name the presets, the parameterizations and the optimizers.

    Parameters
    ----------
    as_json
        Print the lists as JSON.
    """
    import dataclasses

    def millions(recipe: RunConfig, linear: str) -> float:
        vocab_size = recipe.model.vocab_size or recipe.data.vocab_size
        shape = dataclasses.replace(recipe.model, vocab_size=vocab_size, linear=linear)
        return sum(linears.num_parameters(shape).values()) / 1e6

    known: dict[str, Any] = {
        "presets": {
            name: {
                "summary": summary,
                "parameters_m": {
                    each: round(millions(recipe, each), 2) for each in ("crnet", "full")
                },
            }
            for name, (summary, recipe) in presets.PRESETS.items()
        },
        "parameterizations": {name: linears.get(name).summary for name in linears.names()},
        "optimizers": {name: optimizers.get(name).summary for name in optimizers.names()},
    }
    if as_json:
        print(json.dumps(known, indent=1))
        return
    print("presets (parameters in millions as CR-Net and full rank)")
    for name, row in known["presets"].items():
        sizes = row["parameters_m"]
        print(f"  {name:12}{sizes['crnet']:>10,.2f}{sizes['full']:>11,.2f}  {row['summary']}")
    for title in ("parameterizations", "optimizers"):
        print(title)
        for name, summary in known[title].items():
            print(f"  {name:12}{summary}")


@app.command
def demo(
    *,
    out: Path | None = None,
    steps: int | None = None,
    quick: Switch = False,
    as_json: Json = False,
) -> None:
    """Train CR-Net and full rank side by side on this machine's own text; a few minutes.

    Parameters
    ----------
    out
        Folder of the two runs; none: a new one under crnet-runs.
    steps
        Steps of each run.
    quick
        A smaller model for some seconds: does everything work?
    as_json
        Print the figures as JSON.
    """
    from crnet.compare import demo as demonstration
    from crnet.config.serialize import override

    config = presets.get("tiny")
    config = demonstration.quick(config) if quick else config
    config = override(config, train={"steps": steps}) if steps is not None else config
    folder = out or _new_run("demo")
    figures = demonstration.run(config, folder)
    if as_json:
        print(json.dumps(figures, indent=1))
        return
    print(demonstration.table(figures))
    print(f"\nloss curves  {figures['picture']}")
    for linear, row in figures["rows"].items():
        print(f"{linear:12} run {row['run']}, checkpoint {row['checkpoint']}")
    print(f"\nCR-Net continues {figures['prompt']!r}:\n{figures['prompt']}{figures['sample']}")


def _new_run(name: str) -> Path:
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1000):
        folder = RUNS / (f"{stem}-{number}" if number else stem)
        if not folder.exists():
            return folder
    raise ConfigError(f"{RUNS}: no free name for a new run; give --out")


def _newest_run() -> Path:
    begun = sorted(RUNS.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not begun:
        raise ConfigError(f"--resume: there is no run under {RUNS}; name one with --out")
    return begun[-1].parent


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a YAML, TOML or JSON file of settings, by its ending.

    Raises:
        ConfigError: missing, of another kind, or not well-formed (with the place, where known).
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            values = yaml.safe_load(text)
        elif path.suffix == ".toml":
            values = tomllib.loads(text)
        elif path.suffix == ".json":
            values = json.loads(text)
        else:
            raise ConfigError(f"--config {path}: end its name in .yaml, .toml or .json")
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: is not UTF-8 text ({error})") from error
    except (ValueError, yaml.YAMLError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {path}: is not well-formed ({reason})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: holds no sections; wanted model, data, ... with keys")
    if flat := [key for key in SECTIONS if not isinstance(values.get(key, {}), dict)]:
        raise ConfigError(
            f"--config {path}: {key} is {values[key]!r}; it must be a section of keys, "
            "such as model: {rank: 96}"
            for key in flat
        )
    return values


def _layers(command: str, arguments: dict[str, Any]) -> tuple[Dict, ...]:
    """What stands behind the command line, the strongest first."""
    files = [(str(path), read_config_file(path)) for path in reversed(arguments.get("config", ()))]
    base: dict[str, Any] = {}
    if command in ("train", "cost", "profile", "plan"):
        if arguments.get("resume"):
            run_dir = arguments.get("out") or _newest_run()
            if os.path.exists(run_dir / "run.json"):
                base = to_dict(_run_config(run_dir))
                base["model"].pop("vocab_size")  # resolved again, from the same tokenizer
        else:
            base = to_dict(presets.get(arguments.get("preset") or DEFAULT_PRESET))
        base.pop("preset", None)
    elif command == "evaluate" and "checkpoint" in arguments:
        base = {"data": to_dict(_checkpoint(arguments["checkpoint"]).config.data)}
    # Under the command's name: cyclopts drops a section that is named like a command (train).
    return tuple(Dict({command: values}, source=at) for at, values in [*files, ("preset", base)])


@functools.cache
def _checkpoint(path: Path) -> Checkpoint:
    # Once a command: it is wanted for its settings and for its weights, and each proof that it is
    # whole reads all of it.
    from crnet.storage.checkpoint import resolve

    return resolve(path)


def _run_config(run_dir: Path) -> RunConfig:
    """The configuration of a run that was begun in a folder."""
    path = run_dir / "run.json"
    manifest = read_json(path)
    if not isinstance(manifest.get("config"), dict):
        raise ConfigError(f"{path}: altered (it holds no configuration); start a new run")
    return from_dict(manifest["config"])


def main(argv: list[str] | None = None) -> None:
    """Run the command line; ends with exit code 0, 1 (training failed), 2 (bad input) or 130."""
    words = sys.argv[1:] if argv is None else argv
    warnings.showwarning = _show_warning
    try:
        app.config = ()
        _checkpoint.cache_clear()
        command = words[0] if words else ""
        for word in words:
            if word.partition("=")[0] in [f"--{section}" for section in SECTIONS]:
                flag = word.partition("=")[0]
                raise ConfigError(f"{flag} is a section; name one of its keys, as {flag}.KEY VALUE")
        if command in CONFIGURED and "--help" not in words:
            _, bound, _ = app.parse_args(words)
            app.config = _layers(command, bound.arguments)
        app(words)
    except ConfigError as error:
        for problem in error.problems:
            print(f"crnet: {problem}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader has seen enough (crnet list | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print("crnet: interrupted", file=sys.stderr)
        sys.exit(130)
    except TrainingError as error:
        print(f"crnet: {error}", file=sys.stderr)
        sys.exit(1)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"crnet: warning: {message}", file=sys.stderr)
