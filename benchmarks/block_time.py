"""Forward and backward time of the blocks alone: full rank, CR-Net, its plain version, low rank.

    python benchmarks/block_time.py [--preset llama-130m] [--micro-batch 4] [--rounds 12] [--out F]

The sides are timed in turn, round after round, in one process, so that a drift of the machine's
speed meets all of them; the first round is a warm-up. Quoted: medians, and the ratio to full rank.
``plain`` is CR-Net computed by ``kernels.naive`` and differentiated by autograd.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from crnet import linears
from crnet.config import presets
from crnet.config.sections import ModelConfig
from crnet.kernels import naive
from crnet.linears.crnet import module as crnet_module
from crnet.model.attention import rope
from crnet.model.backbone import build
from crnet.train.run import describe_code, describe_device

SIDES = ("full", "crnet", "plain", "lowrank")


def side_config(side: str, base: ModelConfig) -> ModelConfig:
    """The shape of one side. Low rank has CR-Net's ranks, and in block 1 that of block 2: it is low
    rank throughout, so its FLOPs are fewer than CR-Net's."""
    if side == "lowrank":
        ranks = [slot.rank for slot in linears.slots(base) if slot.position == "q"][1:]
        return dataclasses.replace(
            base, linear="lowrank", rank=",".join(map(str, [ranks[0], *ranks]))
        )
    return dataclasses.replace(base, linear="full" if side == "full" else "crnet")


def block_flops(config: ModelConfig, tokens: int, length: int) -> int:
    """FLOPs of one forward and backward of the blocks; attention counted in full, not causal."""
    method = linears.get(config.linear)
    weights = sum(method.matrix_items(slot) for slot in linears.slots(config))
    attention = 2 * 2 * length * config.hidden_size * config.num_layers
    return 3 * tokens * (2 * weights + attention)


class Blocks(nn.Module):
    """The blocks of a model, from residual stream to residual stream."""

    def __init__(self, config: ModelConfig, length: int):
        super().__init__()
        backbone = build(dataclasses.replace(config, vocab_size=8), seed=0).model
        self.layers, self.carries = backbone.layers, backbone.carry == "below"
        head_size = config.hidden_size // config.num_heads
        self.rope = rope(0, length, head_size, config.rope_theta, torch.device("cpu"))

    def forward(self, x: Tensor) -> Tensor:
        carry: tuple[Tensor, ...] = ()
        for block in self.layers:
            x, *outputs = block(x, self.rope, *carry)
            carry = tuple(outputs) if self.carries else ()
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="llama-130m")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()

    base = presets.get(given.preset).model
    models = {side: Blocks(side_config(side, base), given.length) for side in SIDES}
    shape = (given.micro_batch, given.length, base.hidden_size)
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(given.rounds + 1):
        for side, model in models.items():
            model.zero_grad(set_to_none=True)
            plain = mock.patch.object(
                crnet_module,
                "carried_lowrank",
                naive.carried_lowrank if side == "plain" else crnet_module.carried_lowrank,
            )
            with plain:
                start_s = time.perf_counter()
                model(x).backward(dy)
                elapsed_s = time.perf_counter() - start_s
            if number:
                times[side].append(elapsed_s)
    full_s = statistics.median(times["full"])
    tokens = given.micro_batch * given.length
    full_flops = block_flops(side_config("full", base), tokens, given.length)
    sides = {}
    for side in SIDES:
        flops = block_flops(side_config(side, base), tokens, given.length)
        ratios = [a / b for a, b in zip(times[side], times["full"], strict=True)]
        sides[side] = {
            "median_s": statistics.median(times[side]),
            "least_s": min(times[side]),
            "time_ratio_median_of_pairs": statistics.median(ratios),
            "time_ratio_of_least": min(times[side]) / min(times["full"]),
            "flop_ratio": flops / full_flops,
            "gflops_per_s": flops / statistics.median(times[side]) / 1e9,
        }
    report = {
        "benchmark": "block_time",
        "date": time.strftime("%Y-%m-%d"),
        "command": sys.argv,
        "preset": given.preset,
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "device": describe_device(torch.device("cpu")),
        "code": describe_code(),
        "rounds": given.rounds,
        "full_median_s": full_s,
        "sides": sides,
    }
    text = json.dumps(report, indent=1)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
