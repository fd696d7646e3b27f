"""Forward and backward time of the blocks alone: full rank, CR-Net, its plain version, low rank.

    python benchmarks/block_time.py [--preset llama-130m] [--micro-batch 4] [--rounds 12] [--out F]
    python benchmarks/block_time.py --quick [--out F]     # a tiny shape, a few seconds

The sides are timed in turn, round after round, in one process, so that a drift of the machine's
speed meets all of them; the first round is a warm-up. Quoted: medians, and the ratio to full rank.
``plain`` is CR-Net computed by ``kernels.naive`` and differentiated by autograd.

JSON: benchmark, date, command, preset, tokens, threads, device, code, rounds, full_median_s, sides.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from crnet.config import presets
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import ModelConfig, choose
from crnet.cost.flops import block_flops
from crnet.cost.micro_batch import MicroBatch
from crnet.kernels import naive
from crnet.layers.block import run_blocks
from crnet.linears.crnet import module as crnet_module
from crnet.model.build import build
from crnet.recompute.plan import RecomputePlan
from crnet.storage.manifest import describe_code, describe_device

SIDES = ("full", "crnet", "plain", "lowrank")
QUICK = "--preset tiny --micro-batch 1 --length 32 --rounds 2"


def side_spec(side: str, base: ModelConfig) -> ModelSpec:
    """The blocks of one side. Low rank has CR-Net's ranks, and in block 1 that of block 2: it is
    low rank throughout, so its FLOPs are fewer than CR-Net's."""
    base = dataclasses.replace(base, vocab_size=8)  # the head and the embedding are not timed
    crnet = choose(base, "linear", "crnet")
    if side == "full":
        return model_spec(choose(base, "linear", "full"))
    if side == "lowrank":
        lowrank = choose(base, "linear", "lowrank")
        return model_spec(dataclasses.replace(lowrank, rank=lowrank_ranks(base)))
    return model_spec(crnet)


def lowrank_ranks(base: ModelConfig) -> str:
    """CR-Net's ranks at this shape, and in block 1 that of block 2, as ``--model.rank`` has them.
    One position's is every position's: the presets have no others."""
    blocks = model_spec(choose(base, "linear", "crnet")).slots[1:]
    ranks = [block[0].rank for block in blocks]
    return ",".join(map(str, [ranks[0], *ranks]))


def flops(spec: ModelSpec, sequences: int, length: int) -> int:
    """FLOPs of one forward and backward of the blocks; attention counted in full, not causal."""
    return sum(block_flops(MicroBatch(spec, sequences, length), RecomputePlan()).values())


class Blocks(nn.Module):
    """The blocks of a model, from residual stream to residual stream."""

    def __init__(self, spec: ModelSpec, length: int):
        super().__init__()
        self.backbone = build(spec, seed=0).model
        self.context = spec.architecture.context(
            spec.shape, spec.architecture_options, 0, length, torch.device("cpu"), None
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        (x_BTD,) = run_blocks(self.backbone.blocks(), (x_BTD,), self.context)
        return x_BTD


def plain_lowrank(x: Tensor, a: Tensor, b: Tensor, carry: Tensor, gain: Tensor, **_: Any) -> Tensor:
    """``kernels.naive`` with the arguments of the fused map."""
    return naive.carried_lowrank(x, a, b, carry, gain)


def once(side: str, model: Blocks, x: Tensor, dy: Tensor) -> float:
    """Seconds of one forward and backward."""
    model.zero_grad(set_to_none=True)
    plain: Any = contextlib.nullcontext()
    if side == "plain":
        plain = mock.patch.object(crnet_module, "carried_lowrank", plain_lowrank)
    with plain:
        start_s = time.perf_counter()
        model(x).backward(dy)
        return time.perf_counter() - start_s


def measure(specs: dict[str, ModelSpec], given: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds by side, a figure a round."""
    models = {side: Blocks(spec, given.length) for side, spec in specs.items()}
    shape = (given.micro_batch, given.length, specs["full"].shape.hidden_size)
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    times: dict[str, list[float]] = {side: [] for side in specs}
    for number in range(given.rounds + 1):
        for side, model in models.items():
            elapsed_s = once(side, model, x, dy)
            if number:
                times[side].append(elapsed_s)
    return times


def summary(seconds: list[float], full: list[float], count: int, full_count: int) -> dict[str, Any]:
    """The figures of one side beside those of full rank; ``count``: FLOPs."""
    median_s = statistics.median(seconds)
    ratios = [a / b for a, b in zip(seconds, full, strict=True)]
    return {
        "median_s": median_s,
        "least_s": min(seconds),
        "time_ratio_median_of_pairs": statistics.median(ratios),
        "time_ratio_of_least": min(seconds) / min(full),
        "flop_ratio": count / full_count,
        "gflops_per_s": count / median_s / 1e9,
    }


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-130m")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help=QUICK)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    return parser.parse_args(QUICK.split(), given) if given.quick else given


def main() -> None:
    given = read_arguments()
    base = presets.get(given.preset).model
    specs = {side: side_spec(side, base) for side in SIDES}
    counts = {side: flops(spec, given.micro_batch, given.length) for side, spec in specs.items()}
    times = measure(specs, given)
    report = {
        "benchmark": "block_time",
        "date": time.strftime("%Y-%m-%d"),
        "command": sys.argv,
        "preset": given.preset,
        "tokens": given.micro_batch * given.length,
        "threads": torch.get_num_threads(),
        "device": describe_device(torch.device("cpu")),
        "code": describe_code(),
        "rounds": given.rounds,
        "full_median_s": statistics.median(times["full"]),
        "sides": {
            side: summary(times[side], times["full"], counts[side], counts["full"])
            for side in SIDES
        },
    }
    text = json.dumps(report, indent=1)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
