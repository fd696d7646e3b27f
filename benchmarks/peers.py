"""A whole step of crnet beside the same step of Hugging Face's transformers, on this processor.

    python benchmarks/peers.py [--preset llama-130m] [--micro-batch 4] [--length 256] [--rounds 10]
                               [--precision fp32 bf16-mixed] [--sides full crnet lowrank ...]
                               [--threads N] [--out F] [--json]
    python benchmarks/peers.py --quick [--out F]     # a tiny shape, one round

``step``    forward pass, loss, backward pass, clipping, AdamW: ``full``, ``crnet`` and ``lowrank``
            as ``crnet train`` takes them, ``transformers`` is LlamaForCausalLM (sdpa attention) of
            the same shape as ``full`` with its own loss, the same fused AdamW, the same clipping.
``blocks``  forward and backward pass of the blocks alone, without embedding and head.
``loss``    crnet's head and loss, forward and backward, beside logits and ``cross_entropy``.

The sides take turns in one process, every round in another order, so that a drift of the machine's
speed and the sides before them meet all alike; a first round is not counted. A ratio is the median
of the ratios within a round; ``flops`` is the ratio of the FLOPs, which no time can be expected to
fall below. ``saved`` is what autograd keeps between the passes, parameters not counted (crnet's
loss by chunks, which torch's hooks can see). Precisions whose products this processor has to
emulate are left out, and the report says so. The variables that decide how threads wait and what
malloc does are those of the shell (``crnet train`` sets them for itself): the report has them.

JSON: benchmark, date, command, options, threads, processor, features, environment, code,
transformers, load, left_out, step, blocks, loss.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from block_time import Blocks, flops, lowrank_ranks
from torch import Tensor, nn

from crnet.config import presets
from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig, RunConfig, choose
from crnet.config.serialize import override
from crnet.kernels import loss as loss_kernels
from crnet.measure.memory import saved_bytes
from crnet.storage.checkpoint import Progress
from crnet.storage.manifest import describe_code, describe_device, describe_environment
from crnet.train.run import make_step

SIDES = ("full", "crnet", "lowrank", "transformers")
REFERENCES = ("transformers", "full")
"""Of the ratios."""
QUICK = (
    "--preset tiny --micro-batch 1 --length 32 --rounds 1 --vocab 256 --precision fp32 "
    "--loss-presets tiny"
)
FEATURES = {
    "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16",
    "asimd", "sve", "bf16", "svebf16",
}  # fmt: skip
"""Of /proc/cpuinfo, what products of matrices hang on."""
EMULATED = 4
"""Products that take so many times fp32's are no arithmetic of the processor's own."""

Json = dict[str, Any]
Seconds = tuple[float, float]
"""By the wall's clock, and of the processor."""


# --- the clock ------------------------------------------------------------------------------------


def take_turns(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Seconds]]:
    """Seconds by side, a pair a round; the order turns by one from round to round."""
    times: dict[str, list[Seconds]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found = timed(sides[name])
            if number:
                times[name].append(found)
    return times


def timed(run: Callable[[], object]) -> Seconds:
    """One call."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def ratio(times: Sequence[Seconds], reference: Sequence[Seconds]) -> float:
    """Of the wall's times, the median over the rounds."""
    return statistics.median(a[0] / b[0] for a, b in zip(times, reference, strict=True))


def summary(times: Mapping[str, list[Seconds]], counts: Mapping[str, int], tokens: int) -> Json:
    """The figures of every side; ``counts``: FLOPs."""
    found: Json = {}
    for side, pairs in times.items():
        walls = [wall_s for wall_s, _ in pairs]
        median_s = statistics.median(walls)
        found[side] = {
            "median_s": median_s,
            "least_s": min(walls),
            "most_s": max(walls),
            "cpu_median_s": statistics.median(cpu_s for _, cpu_s in pairs),
            "tokens_per_s": tokens / median_s,
            "gflops_per_s": counts[side] / median_s / 1e9,
        }
        for other in REFERENCES:
            if other in times:
                found[side][f"time_to_{other}"] = ratio(pairs, times[other])
                found[side][f"flops_to_{other}"] = counts[side] / counts[other]
    return found


# --- the sides ------------------------------------------------------------------------------------


def side_config(side: str, given: argparse.Namespace, precision: str) -> RunConfig:
    """A run of one micro-batch a step. transformers' is that of full rank."""
    base = presets.get(given.preset)
    base = override(
        base,
        model={"vocab_size": given.vocab},
        data={"sequence_length": given.length},
        train={
            "batch_size": given.micro_batch,
            "micro_batch_size": None,
            "precision": precision,
            "recompute": "none",
            "device": "cpu",
        },
    )
    model = choose(base.model, "linear", "full" if side == "transformers" else side)
    if side == "lowrank":
        model = dataclasses.replace(model, rank=lowrank_ranks(base.model))
    return dataclasses.replace(base, model=model)


class Batch:
    """Random tokens of one micro-batch."""

    def __init__(self, given: argparse.Namespace):
        generator = torch.Generator().manual_seed(0)
        shape = (given.micro_batch, given.length)
        self.tokens, self.targets = (
            torch.randint(0, given.vocab, shape, generator=generator) for _ in range(2)
        )


class OurStep:
    """The step of ``crnet train``."""

    def __init__(self, config: RunConfig, batch: Batch):
        self.batch = batch
        self.step = make_step(config, model_spec(config.model), torch.device("cpu"), None)
        self.model = self.step.model

    def __call__(self) -> float:
        parts = [(self.batch.tokens, self.batch.targets)]
        return self.step(parts, Progress(step=10, position=0, tokens=0), None).loss


class TheirModel(nn.Module):
    """LlamaForCausalLM with the signature of ours."""

    def __init__(self, model: ModelConfig, length: int):
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads or model.num_heads,
            max_position_embeddings=length,
            rms_norm_eps=model.norm_eps,
            tie_word_embeddings=bool(model.tie_embeddings),
            attn_implementation="sdpa",
            use_cache=False,
        )
        torch.manual_seed(0)
        self.llama: Any = LlamaForCausalLM(config).train()

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        """The mean loss; targets are shifted already."""
        return self.llama(input_ids=tokens, labels=targets, shift_labels=targets).loss, None


class TheirStep:
    """The same step, as a trainer around transformers takes it."""

    def __init__(self, config: RunConfig, batch: Batch):
        self.batch, self.clip = batch, config.optimizer.clip_norm
        self.model = TheirModel(config.model, batch.tokens.shape[1])
        section = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=section.lr,
            betas=(section.beta1, section.beta2),
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=True,
        )
        self.mixed = config.train.precision == "bf16-mixed"

    def __call__(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            loss, _ = self.model(self.batch.tokens, self.batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.item()


def make_side(side: str, config: RunConfig, batch: Batch) -> OurStep | TheirStep:
    return TheirStep(config, batch) if side == "transformers" else OurStep(config, batch)


# --- the parts ------------------------------------------------------------------------------------


def step_times(given: argparse.Namespace, precision: str) -> Json:
    """The whole step."""
    batch = Batch(given)
    configs = {side: side_config(side, given, precision) for side in given.sides}
    sides = {side: make_side(side, config, batch) for side, config in configs.items()}
    rows = given.micro_batch * given.length
    counts = {
        side: block_flops_of(config, given) + 6 * rows * config.model.hidden_size * given.vocab
        for side, config in configs.items()
    }
    times = take_turns(sides, given.rounds)
    found = summary(times, counts, rows)
    for name, side in sides.items():
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
        with mixed:
            found[name]["saved_bytes"] = saved_bytes(side.model, batch.tokens, batch.targets)  # type: ignore[arg-type]
        found[name]["parameters"] = sum(each.numel() for each in side.model.parameters())
    return found


def block_times(given: argparse.Namespace, precision: str) -> Json:
    """The blocks alone, from residual stream to residual stream."""
    configs = {side: side_config(side, given, precision) for side in given.sides}
    shape = (given.micro_batch, given.length, configs[given.sides[0]].model.hidden_size)
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    mixed = precision == "bf16-mixed"
    models = {side: side_blocks(side, config, given) for side, config in configs.items()}
    runs = {side: passes(model, x, dy, mixed) for side, model in models.items()}
    counts = {side: block_flops_of(config, given) for side, config in configs.items()}
    return summary(take_turns(runs, given.rounds), counts, given.micro_batch * given.length)


class TheirBlocks(nn.Module):
    """transformers' blocks, and the norm after them."""

    def __init__(self, model: ModelConfig, length: int):
        super().__init__()
        self.backbone = TheirModel(model, length).llama.model

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(inputs_embeds=x).last_hidden_state


def side_blocks(side: str, config: RunConfig, given: argparse.Namespace) -> nn.Module:
    model = dataclasses.replace(config.model, vocab_size=8)  # the head and embedding are not timed
    if side == "transformers":
        return TheirBlocks(model, given.length)
    return Blocks(model_spec(model), given.length)


def passes(model: nn.Module, x: Tensor, dy: Tensor, mixed: bool) -> Callable[[], object]:
    """Forward and backward pass; gradients are made anew."""

    def run() -> None:
        x.grad = None
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            y = model(x)
        y.backward(dy.to(y.dtype))

    return run


def block_flops_of(config: RunConfig, given: argparse.Namespace) -> int:
    return flops(model_spec(config.model), given.micro_batch, given.length)


def plain_loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """All logits, then their cross-entropy in fp32."""
    logits = torch.nn.functional.linear(x, weight).float()
    return torch.nn.functional.cross_entropy(logits, target, reduction="sum")


def loss_sides(rows: int, width: int, vocab: int) -> dict[str, Callable[[], object]]:
    """Head and loss of one shape, forward and backward: crnet's, and the plain one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator).mul_(0.02).requires_grad_()
    target = torch.randint(0, vocab, (rows,), generator=generator)

    def run(function: Callable[..., Tensor]) -> Callable[[], object]:
        def once() -> None:
            x.grad = weight.grad = None
            (function(x, weight, target) / rows).backward()

        return once

    return {"crnet": run(loss_kernels.linear_cross_entropy), "plain": run(plain_loss)}


def loss_times(given: argparse.Namespace) -> Json:
    """crnet's loss beside the plain one, by preset."""
    found, rows = {}, given.micro_batch * given.length
    for preset in given.loss_presets:
        recipe = presets.get(preset)
        width, vocab = recipe.model.hidden_size, recipe.model.vocab_size or recipe.data.vocab_size
        times = take_turns(loss_sides(rows, width, vocab), given.rounds)
        found[preset] = {
            "rows": rows,
            "hidden_size": width,
            "vocab_size": vocab,
            **{f"{side}_median_s": statistics.median(w for w, _ in t) for side, t in times.items()},
            "time_to_plain": ratio(times["crnet"], times["plain"]),
        }
    return found


# --- the processor --------------------------------------------------------------------------------


def processor_features() -> list[str]:
    """Of ``FEATURES``, those that /proc/cpuinfo lists; empty where there is no such file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, words = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return sorted(FEATURES & set(words.split()))
    return []


def bf16_slowdown(size: int = 192) -> float:
    """Time of a product in bf16 over that in fp32; the least of five each."""
    wide = torch.randn(size, size)
    narrow = wide.bfloat16()
    runs: dict[str, Callable[[], object]] = {"fp32": lambda: wide @ wide}
    runs["bf16"] = lambda: narrow @ narrow
    times = take_turns(runs, 5)
    return min(w for w, _ in times["bf16"]) / min(w for w, _ in times["fp32"])


def usable(precisions: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """The precisions to measure, and why others are left out."""
    kept, left_out = [], {}
    for precision in precisions:
        slowdown = bf16_slowdown() if precision == "bf16-mixed" else 1.0
        if slowdown > EMULATED:
            left_out[precision] = f"a product in bf16 takes {slowdown:.0f} times fp32's here"
        else:
            kept.append(precision)
    return kept, left_out


# --- the report -----------------------------------------------------------------------------------


def table(title: str, part: Json) -> str:
    """A part as Markdown."""
    references = [name for name in REFERENCES if name in part]
    heads = [title, "s", "CPU s", "tokens/s", *(f"time / {name}" for name in references), "FLOPs"]
    saved = any("saved_bytes" in row for row in part.values())
    lines = [[*heads, *(["MiB saved", "parameters"] if saved else [])]]
    lines.append(["---"] * len(lines[0]))
    for side, row in part.items():
        cells = [side, f"{row['median_s']:.3f}", f"{row['cpu_median_s']:.3f}"]
        cells += [f"{row['tokens_per_s']:,.0f}"]
        cells += [f"{row[f'time_to_{name}']:.3f}" for name in references]
        cells += [f"{row[f'flops_to_{references[0]}']:.3f}" if references else ""]
        if saved:
            cells += [f"{row['saved_bytes'] / 2**20:,.0f}", f"{row['parameters'] / 1e6:,.1f}M"]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(report: Json) -> str:
    """The report for people."""
    options, load = report["options"], report["load"]
    lines = [
        f"{options['preset']}, {options['micro_batch']} x {options['length']} tokens, "
        f"{report['threads']} threads, {report['processor']} ({', '.join(report['features'])}), "
        f"load {load['before']:.1f} before and {load['after']:.1f} after, environment "
        f"{report['environment'] or 'as torch has it'}",
    ]
    for part in ("step", "blocks"):
        for precision, rows in report[part].items():
            lines += ["", table(f"{part}, {precision}", rows)]
    lines += ["", "| loss, fp32 | rows x width x vocabulary | s | plain s | time / plain |"]
    lines += ["|---|---|---|---|---|"]
    for preset, row in report["loss"].items():
        lines.append(
            f"| {preset} | {row['rows']} x {row['hidden_size']} x {row['vocab_size']} "
            f"| {row['crnet_median_s']:.4f} | {row['plain_median_s']:.4f} "
            f"| {row['time_to_plain']:.3f} |"
        )
    lines += [f"\n{name} is left out: {why}" for name, why in report["left_out"].items()]
    return "\n".join(lines)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    loss_presets = ["tiny", "llama-60m", "llama-130m", "llama-350m", "llama-1b"]
    parser.add_argument("--preset", default="llama-130m")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16-mixed"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--loss-presets", nargs="*", default=loss_presets)
    parser.add_argument("--threads", type=int, help="none: torch's choice")
    parser.add_argument("--quick", action="store_true", help=QUICK)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if "transformers" in given.sides and importlib.util.find_spec("transformers") is None:
        parser.error("transformers is not installed: pip install 'crnet[dev]', or name --sides")
    return parser.parse_args(QUICK.split(), given) if given.quick else given


def measure(given: argparse.Namespace) -> Json:
    """The report."""
    before, (precisions, left_out) = os.getloadavg()[0], usable(given.precision)
    parts = {
        "step": {precision: step_times(given, precision) for precision in precisions},
        "blocks": {precision: block_times(given, precision) for precision in precisions},
        "loss": loss_times(given),
    }
    theirs = metadata.version("transformers") if "transformers" in given.sides else None
    hidden = ("out", "json", "quick")
    return {
        "benchmark": "peers",
        "date": time.strftime("%Y-%m-%d"),
        "command": [Path(word).name if "/" in word else word for word in sys.argv],
        "options": {key: value for key, value in vars(given).items() if key not in hidden},
        "threads": torch.get_num_threads(),
        "processor": describe_device(torch.device("cpu")),
        "features": processor_features(),
        "environment": describe_environment(),
        "code": describe_code(),
        "transformers": theirs,
        "load": {"before": before, "after": os.getloadavg()[0]},
        "left_out": left_out,
        **parts,
    }


def main() -> None:
    given = read_arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    report = measure(given)
    whole = json.dumps(report, indent=1)
    if given.out:
        given.out.write_text(whole + "\n", encoding="utf-8")
    print(whole if given.json else text(report))


if __name__ == "__main__":
    main()
