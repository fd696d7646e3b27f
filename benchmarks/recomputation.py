"""Recomputation measured: bytes, time, rounding errors, training. Each part writes one JSON file.

    python benchmarks/recomputation.py memory --out benchmarks/DATE-recomputation-memory.json
    python benchmarks/recomputation.py time --preset llama-350m --out ...
    python benchmarks/recomputation.py time --length 4096 --micro-batch 1 --layers 6 --out ...
    python benchmarks/recomputation.py error --out ...
    python benchmarks/recomputation.py train [--source FILE ...] --out ...
    python benchmarks/recomputation.py --quick --out FOLDER    # every part at a tiny shape

``memory``  bytes kept and bytes at the peak of a step by policy, beside the closed forms.
``time``    forward and backward of the blocks alone; the policies in turn, round after round.
``error``   outputs rebuilt along chains of CR-Net maps: gain, depth, arithmetic, direction.
``train``   one model trained under each policy; then its gradients and rebuilt outputs.
What runs no model, table 2 and the tables and the picture of docs/recomputation.md, is in
recomputation_report.py.

JSON memory: benchmark, date, command, options, threads, device, code, model, tokens, note, eq_38,
sides.
JSON time: benchmark, date, command, options, threads, device, code, model, tokens, sides.
JSON error: benchmark, date, command, options, threads, device, code, note, rows.
JSON train: benchmark, date, command, options, threads, device, code, model, corpus, bf16, runs,
trained.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recomputation_report import (
    UNGUARDED,
    Json,
    add_part,
    describe,
    eq_38_items,
    full_rank,
    plans,
    run_parts,
    write,
)
from torch import Tensor

from crnet import linears
from crnet.config import presets
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import RunConfig
from crnet.config.serialize import override, read_json
from crnet.cost.flops import block_flops
from crnet.cost.kept import kept_bytes
from crnet.cost.micro_batch import MicroBatch
from crnet.cost.peak import peak_bytes
from crnet.data.prepare import prepare
from crnet.data.rows import Batches, Rows
from crnet.errors import TrainingError
from crnet.inference.load import load_model, weights_dtype
from crnet.layers.block import run_blocks
from crnet.linears.crnet import CRNetOptions
from crnet.linears.crnet.module import CRNetMap
from crnet.measure import memory as measure
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from crnet.recompute.engine import Recomputation
from crnet.recompute.plan import RecomputePlan, invert_error, parse_layers
from crnet.specs import Slot
from crnet.storage import checkpoint, metrics
from crnet.train import run as train

QUICK = {
    "memory": "--preset tiny --layers 3 --micro-batch 1 --length 16 --vocab 256",
    "time": "--preset tiny --layers 4 --micro-batch 1 --length 32 --vocab 256 --rounds 2",
    "error": "--gains 0.5 1.0 --layers 2 4 --seeds 2 --hidden 16 --rank 4 --rows 32",
    "train": "--steps 2 --layers 4 --hidden 16 --vocab 300 --batch 2 --length 16 "
    f"--documents paragraph --source {__file__}",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of every part."""
    parts = parser.add_subparsers(metavar="PART")
    for name, part in (("memory", memory), ("time", block_time)):
        words = add_part(parts, name, part)
        words.add_argument("--preset", default="llama-130m")
        words.add_argument("--micro-batch", type=int, default=4)
        words.add_argument("--length", type=int, default=256)
        words.add_argument("--layers", type=int, help="only so many, from the bottom; none: all")
        words.add_argument("--vocab", type=int, default=32_000)
        words.add_argument("--precision", default="fp32", choices=["fp32", "bf16-mixed", "bf16"])
        words.add_argument("--device", default="cpu")
        words.add_argument("--threads", type=int, help="none: torch's choice")
        if name == "time":
            words.add_argument("--rounds", type=int, default=12)
    _arguments_of_error(add_part(parts, "error", error))
    _arguments_of_train(add_part(parts, "train", training))


def _arguments_of_error(words: argparse.ArgumentParser) -> None:
    words.add_argument("--gains", type=float, nargs="+", default=[0.2, 0.5, 0.7, 0.9, 1.0])
    words.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 31])
    words.add_argument("--seeds", type=int, default=5)
    words.add_argument("--hidden", type=int, default=256)
    words.add_argument("--rank", type=int, default=64)
    words.add_argument("--rows", type=int, default=512)
    words.add_argument("--threads", type=int, default=1)


def _arguments_of_train(words: argparse.ArgumentParser) -> None:
    words.add_argument("--steps", type=int, default=320)
    words.add_argument("--layers", type=int, default=16)
    words.add_argument("--hidden", type=int, default=128)
    words.add_argument("--vocab", type=int, default=4096, help="entries of the trained tokenizer")
    words.add_argument("--batch", type=int, default=8)
    words.add_argument("--length", type=int, default=128)
    words.add_argument("--lr", type=float, default=1.5e-3)
    words.add_argument("--beta-init", type=float, default=1.0)
    words.add_argument("--bf16", default="bf16-mixed", choices=["bf16-mixed", "bf16"])
    words.add_argument("--source", nargs="+", default=["python"])
    words.add_argument("--documents", default="auto", help="as --data.documents of crnet train")
    words.add_argument("--text-key", help="for example title,abstract")
    words.add_argument(
        "--runs", type=Path, help="folder of the runs, resumed there; none: a new one"
    )
    words.add_argument("--threads", type=int, default=1)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def shape(given: Any) -> ModelSpec:
    """The preset's CR-Net; with ``--layers`` its lowest blocks, each with the rank it has there."""
    model = dataclasses.replace(presets.get(given.preset).model, vocab_size=given.vocab)
    spec = model_spec(model)
    if given.layers is None or given.layers == model.num_layers:
        return spec
    kept = ",".join(str(rank) for rank in describe(spec)["ranks"][1 : given.layers])
    return model_spec(dataclasses.replace(model, num_layers=given.layers, rank=kept))


# --- memory ---------------------------------------------------------------------------------------


def memory(given: Any) -> None:
    device = torch.device(given.device)
    micro_batch = MicroBatch(shape(given), given.micro_batch, given.length, given.precision)
    full = dataclasses.replace(micro_batch, spec=model_spec(full_rank(micro_batch.spec.config)))
    policies = plans(micro_batch)
    sides = {"full rank, none": _measured(full, {"none": RecomputePlan()}, device)["none"]}
    sides |= _measured(micro_batch, policies, device)
    terms = sides["invert"]["kept"]["terms"]
    found = {
        "model": describe(micro_batch.spec),
        "tokens": micro_batch.rows,
        "note": "kept.measured is what autograd's hooks see, closed_form counts everything, "
        "difference = measured - closed_form.",
        "eq_38": {
            "bytes": eq_38_items(micro_batch, policies["invert"]) * micro_batch.compute_bytes,
            "invert_stream_outputs_bottlenecks": terms["stream"]
            + terms["outputs"]
            + terms["bottlenecks"],
        },
        "sides": sides,
    }
    write("memory", given, device, found)


def _measured(
    micro_batch: MicroBatch, policies: dict[str, RecomputePlan], device: torch.device
) -> Json:
    model = build(micro_batch.spec, 0, device, weights_dtype(micro_batch.precision))
    for parameter in model.parameters():  # there already, so that they do not count at the peak
        parameter.grad = torch.zeros_like(parameter)
    generator = torch.Generator().manual_seed(0)
    sizes = (micro_batch.sequences, micro_batch.length + 1)
    ids = torch.randint(micro_batch.spec.shape.vocab_size, sizes, generator=generator).to(device)
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def run() -> None:
        with autocast(device, micro_batch.precision):
            loss, _ = model(tokens.clone(), targets)  # the tokens count too
        (loss / tokens.numel()).backward()

    sides = {}
    for name, plan in policies.items():
        model.recompute(plan)
        with autocast(device, micro_batch.precision):
            kept = measure.saved_bytes(model, tokens, targets)
        added = model.guard_added()
        gc.collect()
        sides[name] = {
            "plan": dataclasses.asdict(plan),
            "guard_added": added,
            "kept": _kept(micro_batch, kept, kept_bytes(micro_batch, plan, added)),
            "peak": {
                "measured": measure.peak_bytes(run, device),
                "closed_form": peak_bytes(micro_batch, plan, added),
            },
        }
    return sides


def _kept(micro_batch: MicroBatch, measured: int, terms: dict[str, int]) -> Json:
    return {
        "measured": measured,
        "closed_form": sum(terms.values()),
        "difference": measured - sum(terms.values()),
        "terms": terms,
    }


# --- time -----------------------------------------------------------------------------------------


def block_time(given: Any) -> None:
    device = torch.device(given.device)
    micro_batch = MicroBatch(shape(given), given.micro_batch, given.length, given.precision)
    policies = {name: plan for name, plan in plans(micro_batch).items() if "thirds" not in name}
    times = _times(micro_batch, policies, device, given.rounds)
    flops = {name: block_flops(micro_batch, plan) for name, plan in policies.items()}
    sides = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["none"], strict=True)]
        sides[name] = {
            "plan": dataclasses.asdict(policies[name]),
            "median_s": statistics.median(seconds),
            "least_s": min(seconds),
            "time_ratio_median_of_rounds": statistics.median(ratios),
            "time_ratio_least_and_most": [min(ratios), max(ratios)],
            "flops": flops[name],
            "flop_ratio": sum(flops[name].values()) / sum(flops["none"].values()),
            "kept_bytes": sum(kept_bytes(micro_batch, policies[name]).values()),
            "peak_bytes": peak_bytes(micro_batch, policies[name]),
        }
    found = {"model": describe(micro_batch.spec), "tokens": micro_batch.rows, "sides": sides}
    write("time", given, device, found)


def _times(
    micro_batch: MicroBatch, policies: dict[str, RecomputePlan], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of forward and backward of the blocks by policy, a figure a round."""
    # The head and the embedding are not timed.
    spec = model_spec(dataclasses.replace(micro_batch.spec.config, vocab_size=8))
    dtype, length = weights_dtype(micro_batch.precision), micro_batch.length
    backbone = build(spec, 0, device, dtype).model
    options = spec.architecture_options
    context = spec.architecture.context(spec.shape, options, 0, length, device, None)
    sizes = (micro_batch.sequences, length, spec.shape.hidden_size)
    entering = torch.randn(sizes, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(sizes, device=device, dtype=dtype)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def once(runner: Callable[..., Any]) -> float:
        backbone.zero_grad(set_to_none=True)
        entering.grad = None
        synchronize()
        start_s = time.perf_counter()
        with autocast(device, micro_batch.precision):
            (x,) = runner(backbone.blocks(), (entering,), context)
        x.backward(upstream)
        synchronize()
        return time.perf_counter() - start_s

    runners = {
        name: run_blocks if plan.policy == "none" else Recomputation(plan)
        for name, plan in policies.items()
    }
    times: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds + 1):
        for name, runner in runners.items():
            elapsed_s = once(runner)
            if number:  # the first round is a warm-up
                times[name].append(elapsed_s)
    return times


# --- error ----------------------------------------------------------------------------------------

ARITHMETICS: dict[str, tuple[torch.dtype, Any]] = {
    "fp32": (torch.float32, "compute"),
    "bf16": (torch.bfloat16, "compute"),
    "bf16, fp32 carry": (torch.bfloat16, "fp32"),
}

Chain = tuple[list[CRNetMap], list[Tensor], list[Tensor]]
"""Successive maps, their bottlenecks, and their outputs with the one below the first in front."""


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


@torch.no_grad()
def chain(gain: float, arithmetic: str, seed: int, given: Any) -> Chain:
    """Inputs are Gaussian with RMS 1 in every row, as after a norm. Increments X A B have the RMS
    with which outputs neither grow nor decay, sqrt(1 - gain^2); for a gain of 1, 0.3."""
    dtype, carry_dtype = ARITHMETICS[arithmetic]
    h, rank, depth = given.hidden, given.rank, max(given.layers)
    generator = torch.Generator().manual_seed(seed)
    increment = math.sqrt(1 - gain * gain) or 0.3

    def gaussian(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    maps, bottlenecks = [], []
    outputs = [gaussian(given.rows, h).to(torch.float32 if carry_dtype == "fp32" else dtype)]
    for idx in range(1, depth + 1):
        slot = Slot("q", idx, depth + 1, h, h, rank, init_std=1.0)
        module = linears.get("crnet").make(slot, CRNetOptions(carry_dtype=carry_dtype))
        module.A.copy_(gaussian(h, rank) / h**0.5)
        module.B.copy_(gaussian(rank, h) * (increment / rank**0.5))
        module.beta.fill_(gain)
        module.to(dtype)
        x = gaussian(given.rows, h)
        x = (x / x.square().mean(-1, keepdim=True).sqrt()).to(dtype)
        maps.append(module)
        bottlenecks.append(module.down_project(x, outputs[-1]))
        output, _ = module(x, outputs[-1])
        outputs.append(output)
    return maps, bottlenecks, outputs


@torch.no_grad()
def chain_errors(maps: list[CRNetMap], bottlenecks: list[Tensor], outputs: list[Tensor]) -> Json:
    y, off = outputs[-1], []
    for module, z, wanted in zip(maps[::-1], bottlenecks[::-1], outputs[-2::-1], strict=True):
        y = module.carry_from(y, z)
        off.append(rms(y.double() - wanted.double()))
    relative = [it / rms(wanted) for it, wanted in zip(off, outputs[-2::-1], strict=True)]
    y, replayed = outputs[0], []
    for module, z in zip(maps, bottlenecks, strict=True):
        y = module.up_project(z, y)
        replayed.append(y)
    pairs = list(zip(replayed, outputs[1:], strict=True))
    return {
        "bottom": relative[-1],
        "largest": max(relative),
        "over_largest_output": max(off) / max(rms(y) for y in outputs),
        "replay": max(rms(y.double() - wanted.double()) for y, wanted in pairs),
        "replay_bit_equal": all(torch.equal(y, wanted) for y, wanted in pairs),
    }


def error(given: Any) -> None:
    rows = []
    for gain in given.gains:
        for arithmetic in ARITHMETICS:
            chains = [chain(gain, arithmetic, seed, given) for seed in range(given.seeds)]
            unit = torch.finfo(chains[0][2][-1].dtype).eps / 2
            for depth in given.layers:
                seeds = [chain_errors(m[:depth], z[:depth], y[: depth + 1]) for m, z, y in chains]
                bound = invert_error([gain] * depth, unit)[-1]
                row = {"gain": gain, "arithmetic": arithmetic, "layers": depth}
                rows.append(row | _over_seeds(seeds, bound))
    note = (
        "RMS errors over the RMS of what the forward pass had: of the lowest output (bottom) and "
        "of the worst of the chain (largest), medians over the seeds; over_largest_output: over "
        "the largest RMS among the outputs, worst seed, which the bound is about"
    )
    write("error", given, torch.device("cpu"), {"note": note, "rows": rows})


def _over_seeds(seeds: list[Json], bound: float) -> Json:
    return {
        "invert_bottom": statistics.median(it["bottom"] for it in seeds),
        "invert_largest": statistics.median(it["largest"] for it in seeds),
        "invert_most_of_seeds": max(it["largest"] for it in seeds),
        "invert_over_largest_output": max(it["over_largest_output"] for it in seeds),
        "bound": bound,
        "within_bound": all(it["over_largest_output"] <= bound for it in seeds),
        "replay": max(it["replay"] for it in seeds),
        "replay_bit_equal": all(it["replay_bit_equal"] for it in seeds),
    }


# --- train ----------------------------------------------------------------------------------------


def run_config(
    given: Any, precision: str, recompute: str, carry: str, tolerance: float | None = None
) -> RunConfig:
    h = given.hidden
    guard = {} if tolerance is None else {"invert_tolerance": tolerance}
    return override(
        presets.get("tiny"),
        model={
            "num_layers": given.layers,
            "hidden_size": h,
            "intermediate_size": round(h / 3) * 8,
            "num_heads": max(1, h // 32),
            "crnet": {"carry_dtype": carry, "beta_init": given.beta_init},
        },
        data={
            "source": tuple(given.source),
            "text_key": given.text_key,
            "documents": given.documents,
            "vocab_size": given.vocab,
            "sequence_length": given.length,
            "validation_tokens": 65_536,
        },
        optimizer={"lr": given.lr},
        train={
            "steps": given.steps,
            "batch_size": given.batch,
            "precision": precision,
            "recompute": recompute,
            "threads": given.threads,
            "device": "cpu",
            "log_every_steps": 1,
            "eval_every_steps": 0,
            "save_every_steps": 0,
        }
        | guard,
    )


def training(given: Any) -> None:
    bf16, published = given.bf16, UNGUARDED
    sides = {  # precision, policy, carry, tolerance; and the run it is compared with
        "fp32 none": ("fp32", "none", "compute"),
        "fp32 replay": ("fp32", "replay", "compute"),
        "bf16 none": (bf16, "none", "compute"),
        "bf16 replay": (bf16, "replay", "compute"),
        "bf16 invert, guarded": (bf16, "invert", "compute"),
        "bf16 invert, as published": (bf16, "invert", "compute", published),
        "bf16 with fp32 carry none": (bf16, "none", "fp32"),
        "bf16 with fp32 carry invert": (bf16, "invert", "fp32"),
    }
    found: dict[str, Json] = {}
    with contextlib.ExitStack() as stack:
        runs = given.runs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, words in sides.items():
            where = runs / name.replace(" ", "-").replace(",", "")
            run = found[name] = _trained(run_config(given, *words), where)
            if words[1] == "none":
                base = name
            else:
                run["against"] = {"run": base} | _difference(run, found[base])
            print(f"{name}: {len(run['losses'])} steps", file=sys.stderr)
        saved = checkpoint.resolve(runs / "fp32-none")
        trained = _on_trained(saved, bf16)
    model = describe(model_spec(saved.config.model))
    corpus = [Path(source).name for source in given.source]
    result = {"model": model, "corpus": corpus, "bf16": bf16, "runs": found, "trained": trained}
    write("train", given, torch.device("cpu"), result)


def _trained(run: RunConfig, where: Path) -> Json:
    """Train, or go on with what is there; losses, validation, what the guard kept."""
    failed = None
    try:
        train.run(run, where, resume=(where / "run.json").exists(), progress=False)
    except TrainingError as problem:
        failed = str(problem)
    rows = metrics.read(where / "metrics.jsonl")
    speeds = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    return {
        "plan": read_json(where / "run.json")["recompute"],
        "failed": failed,
        "losses": [row["loss"] for row in rows if "loss" in row],
        "validation": [row["val_loss"] for row in rows if "val_loss" in row],
        "tokens_per_s_median": statistics.median(speeds),
        "guard": [row for row in rows if "invert_also_keeps" in row],
    }


def _difference(run: Json, base: Json) -> Json:
    pairs = list(zip(run["losses"], base["losses"], strict=False))
    off = [abs(a - b) for a, b in pairs]
    return {
        "bit_equal": (run["losses"], run["validation"]) == (base["losses"], base["validation"]),
        "first_step_that_differs": next((i for i, it in enumerate(off, 1) if it), None),
        "largest": max(off),
        "last": off[-1],
        "mean_of_last_tenth": statistics.mean(a - b for a, b in pairs[-max(1, len(pairs) // 10) :]),
        "validation": None if run["failed"] else run["validation"][-1] - base["validation"][-1],
    }


def _on_trained(saved: checkpoint.Checkpoint, bf16: str) -> Json:
    """Gradients of one batch and rebuilt outputs of the model that was trained in fp32."""
    run, narrow = saved.config, load_model(saved)
    rows = Rows(prepare(run.data, progress=False), "train", run.data.sequence_length)
    ((tokens, targets),) = Batches(rows, run.train.seed + 1, run.train.batch_size).next()
    options = dataclasses.replace(run.model.crnet, carry_dtype="fp32")
    wide = build(model_spec(dataclasses.replace(run.model, crnet=options)), seed=0)
    wide.load_state_dict(narrow.state_dict())
    maps = [linear for block in narrow.model.blocks()[1:] for linear in block.maps.values()]
    gains = sorted(abs(float(linear.gain())) for linear in maps)
    policies = _compared(MicroBatch(narrow.spec, run.train.batch_size, run.data.sequence_length))
    found: Json = {
        "gain_least_median_most": [gains[0], statistics.median(gains), gains[-1]],
        "gradients": {},
        "rebuilt_outputs": {},
    }
    in_fp32: dict[str, Tensor] = {}
    for arithmetic in ARITHMETICS:
        model = wide if "carry" in arithmetic else narrow
        precision = "fp32" if arithmetic == "fp32" else bf16
        model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        base = _gradients(model, RecomputePlan(), precision, tokens, targets)
        in_fp32 = in_fp32 or base
        compared = {"none, against none in fp32": _gradient_error(base, in_fp32)}
        for name, plan in policies.items():
            grads = _gradients(model, plan, precision, tokens, targets)
            compared[name] = _gradient_error(grads, base) | {"guard_added": model.guard_added()}
        found["gradients"][arithmetic] = compared
        found["rebuilt_outputs"][arithmetic] = _rebuilt_errors(model, precision, tokens)
    return found


def _compared(micro_batch: MicroBatch) -> dict[str, RecomputePlan]:
    """The policies whose gradients are compared with those of ``none``."""
    num_layers = micro_batch.spec.num_layers
    policies = {n: p for n, p in plans(micro_batch).items() if n not in ("none", "invert")}
    for every in [each for each in (4, 8, 16, 32) if each <= num_layers]:
        layers = parse_layers(f"every-{every}", num_layers)
        plan = RecomputePlan("invert", layers, tolerance=UNGUARDED)
        policies[f"invert every {every}, as published"] = plan
    guarded = RecomputePlan("invert", parse_layers("every-8", num_layers))
    return policies | {"invert every 8, guarded": guarded}


def _gradients(
    model: LanguageModel, plan: RecomputePlan, precision: str, tokens: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model.recompute(plan)
    with autocast(tokens.device, precision):
        loss, _ = model(tokens, targets)
    (loss / tokens.numel()).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def _gradient_error(grads: dict[str, Tensor], base: dict[str, Tensor]) -> Json:
    """Norms of differences over norms: of everything, of the worst tensor, of the worst beta."""
    off = {name: float((grads[name] - base[name]).norm()) for name in base}
    size = {name: float(base[name].norm()) for name in base}
    found: Json = {
        "bit_equal": not any(off.values()),
        "whole": math.hypot(*off.values()) / math.hypot(*size.values()),
    }
    for kind in ("tensor", "beta"):
        names = [name for name in base if name.endswith(".beta") == (kind == "beta")]
        share = {name: off[name] / size[name] if size[name] else 0.0 for name in names}
        worst = max(share, key=lambda name: share[name])
        found |= {f"worst_{kind}": share[worst], f"worst_{kind}_is": worst}
    return found


@torch.no_grad()
def _rebuilt_errors(model: LanguageModel, precision: str, tokens: Tensor) -> list[Json]:
    """Outputs of a forward pass rebuilt downwards from those of the last block: the largest
    relative RMS error over the positions, by layers crossed."""
    seen: dict[Any, tuple[Tensor, Tensor]] = {}
    blocks = model.model.blocks()

    def note(module: Any, given: Any, returned: Any) -> None:
        seen[module] = given[0], returned[0]

    columns = [[block.maps[position] for block in blocks] for position in blocks[0].maps]
    handles = [each.register_forward_hook(note) for column in columns for each in column]
    worst = [{"layers": idx, "largest": 0.0, "bound": 0.0} for idx in range(1, len(blocks))]
    with autocast(tokens.device, precision):
        model.hidden(tokens)  # without gradients nothing is recomputed
        for modules in columns:
            _, y = seen[modules[-1]]
            crossed, below = modules[:0:-1], modules[-2::-1]
            gains = [float(module.gain()) for module in crossed]
            bounds = invert_error(gains, torch.finfo(y.dtype).eps / 2)
            for at, module in enumerate(crossed):
                wanted = seen[below[at]][1]
                bottleneck = module.down_project(seen[module][0], wanted)
                y = module.carry_from(y, bottleneck).to(wanted.dtype)
                relative = rms(y.double() - wanted.double()) / rms(wanted)
                worst[at]["largest"] = max(worst[at]["largest"], relative)
                worst[at]["bound"] = max(worst[at]["bound"], bounds[at])
    for handle in handles:
        handle.remove()
    return worst


if __name__ == "__main__":
    run_parts(__doc__, arguments, QUICK)
