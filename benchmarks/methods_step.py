"""One optimizer step of every parameterization and stream at one shape, as a ratio to full rank.

    python benchmarks/methods_step.py [--preset llama-130m] [--methods crnet,cola] [--out F]
    python benchmarks/methods_step.py --quick [--out F]     # a tiny shape, a few seconds

Groups of methods and full rank take their steps in turn, round after round, in one process, so that
a drift of the machine's speed meets all of a group; the first round is a warm-up. A step is what
training takes: forward, loss, backward, clipping, optimizer, events. ``ratio`` is the median over
the rounds of a method's time over full rank's in the same round; ``flops_ratio`` is what the cost
model counts, products alone; ``over`` their quotient, which the package wants below 1.3.
``kept_bytes`` is what blocks keep of a token, nothing recomputed; ``flat_s`` the step on eight
tokens: what a step costs besides its products, the optimizer above all. The process has malloc
and waiting threads as ``crnet train`` has them (``crnet.cli.environment``): without, a method that
writes many large tensors pays for fresh pages up to a fifth of its step, which training does not.

JSON: benchmark, date, command, options, processor, cores, code, tokens, bar, full, methods.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crnet.cli import environment

if __name__ == "__main__":
    environment.as_trained()

import torch
from heading import heading, write
from torch import Tensor

from crnet import linears, streams
from crnet.config import presets
from crnet.config.check import check
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig, choose
from crnet.config.serialize import override
from crnet.cost.kept import kept_bytes
from crnet.cost.step import step_flops
from crnet.cost.workload import workload
from crnet.model.seeds import generator_of
from crnet.recompute.plan import RecomputePlan
from crnet.storage.checkpoint import Progress
from crnet.train import run as train

QUICK = "--preset tiny --sequences 1 --length 32 --layers 2 --rounds 2 --vocab-size 64"
BAR = 1.3
"""Most that a step may take, over its FLOPs, both as ratios to full rank."""
RANK = "0.33h"
"""Where the published tables have none for a method: a third of the width, as at 130M."""
BASE = "full"
FEW = 8
"""Tokens of a step that has hardly any products."""


def methods(wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key of the model, name) of every method that has a step of its own."""
    for key, seam in (("linear", linears), ("stream", streams)):
        usual = BASE if key == "linear" else "residual"
        yield from (
            (key, name) for name in seam.names() if name != usual and (not wanted or name in wanted)
        )


def config_of(base: RunConfig, key: str, name: str) -> RunConfig:
    """A run with one method; a stream stands around dense maps."""
    model = choose(base.model, "linear", name if key == "linear" else BASE)
    model = choose(model, "stream", name) if key == "stream" else model
    sizes = (model.hidden_size, model.num_layers)
    tables = linears.get(model.linear).published_ranks.get("aligned-parameters", {})
    if sizes not in tables:
        model = dataclasses.replace(model, rank=RANK)
    config = dataclasses.replace(base, model=model)
    check(config)
    return config


class Side:
    """One model, its optimizer, and its times."""

    def __init__(self, config: RunConfig):
        self.work = workload(config)
        self.step = train.make_step(config, model_spec(config.model), torch.device("cpu"), None)
        self.seconds: list[float] = []
        self.few: list[float] = []

    def run(self, tokens: Tensor, targets: Tensor) -> None:
        """A step, and one on a few tokens."""
        self.few.append(self._timed(tokens[:1, :FEW], targets[:1, :FEW]))
        self.seconds.append(self._timed(tokens, targets))

    def _timed(self, *batch: Tensor) -> float:
        start_s = time.perf_counter()
        self.step([batch], Progress(step=1, position=0, tokens=0), None)
        return time.perf_counter() - start_s

    def figures(self) -> dict[str, float]:
        kept = kept_bytes(self.work.micro_batch, RecomputePlan())
        blocks = sum(kept[term] for term in ("stream", "outputs", "bottlenecks", "inside"))
        return {
            "step_s": round(statistics.median(self.seconds[1:]), 4),
            "flat_s": round(statistics.median(self.few[1:]), 4),
            "flops": step_flops(self.work, RecomputePlan())["total"],
            "kept_bytes": round(blocks / self.work.micro_batch.rows / self.work.spec.num_layers),
            "state_bytes": sum(self.work.state_bytes.values()),
        }


def compared(side: Side, full: Side) -> dict[str, Any]:
    """A method's figures and its ratios to full rank in the same rounds."""
    pairs = zip(side.seconds[1:], full.seconds[1:], strict=True)
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    mine, theirs = side.figures(), full.figures()
    flops_ratio = mine["flops"] / theirs["flops"]
    return mine | {
        "ratio": round(ratio, 3),
        "flops_ratio": round(flops_ratio, 3),
        "over": round(ratio / flops_ratio, 3),
        "holds": ratio / flops_ratio <= BAR,
    }


def measure(base: RunConfig, given: argparse.Namespace) -> dict[str, Any]:
    """Group by group: as many models as memory holds."""
    wanted = given.methods.split(",") if given.methods else []
    shape = (base.train.batch_size, base.data.sequence_length)
    generator = generator_of(0, "tokens")
    tokens, targets = (
        torch.randint(0, given.vocab_size, shape, generator=generator) for _ in range(2)
    )
    full: dict[str, Any] = {}
    found: dict[str, Any] = {}
    left = list(methods(wanted))
    while left:
        group, left = left[: given.group], left[given.group :]
        sides = {name: Side(config_of(base, key, name)) for key, name in group}
        sides[BASE] = Side(config_of(base, "linear", BASE))
        for _ in range(given.rounds + 1):
            for side in sides.values():
                side.run(tokens, targets)
        theirs = sides.pop(BASE)
        full = theirs.figures()
        found |= {name: compared(side, theirs) for name, side in sides.items()}
        for name in sides:
            line = found[name]
            print(f"{name:18} {line['ratio']:6.2f} {line['flops_ratio']:6.2f} {line['over']:6.2f}")
    return {"full": full, "methods": found}


def base_config(given: argparse.Namespace) -> RunConfig:
    """The preset, one batch of so many rows."""
    model = {"vocab_size": given.vocab_size}
    if given.layers:
        model["num_layers"] = given.layers
    return override(
        presets.get(given.preset),
        model=model,
        data={"sequence_length": given.length},
        train={
            "batch_size": given.sequences,
            "micro_batch_size": given.sequences,
            "precision": "fp32",
            "device": "cpu",
            "recompute": "none",
        },
    )


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-130m")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--group", type=int, default=4, help="methods in memory beside full rank")
    parser.add_argument("--methods", help="names with commas; none: all")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--quick", action="store_true", help=QUICK)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(words)
    return parser.parse_args(QUICK.split(), given) if given.quick else given


def main() -> None:
    given = read_arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    base = base_config(given)
    report = heading("methods_step", given) | {
        "tokens": given.sequences * given.length,
        "bar": BAR,
        **measure(base, given),
    }
    write(report, given.out)


if __name__ == "__main__":
    main()
