"""Recipes by name. Each is a whole ``RunConfig`` and names the table of the paper it comes from.

Of arXiv:2509.18993: sizes (table 9; table 16: llama3-1b; table 21: 70b), ranks (table 10, by
``--model.rank aligned-parameters``, the default, or ``aligned-memory``), 512 rows of 256 tokens,
warm-up and cosine (E.2.1), the steps (table 9), the rate at 350M (0.01, E.2.6), recomputation from
7B on (5.1, E.2.3, G).

Ours: every other rate, from the eight that E.2.1 searches; which one won is not printed, so sweep
them. Clipping at 1, which neither the paper nor the protocol it follows has: no run has shown that
0.01 holds without it. ``replay`` where the paper has its algorithm 1 (docs/presets.md). llama3-1b's
steps: 15.6B tokens. The micro-batch: a power of 2 that takes at most 64 GiB, state included, in
fp32 (13b: in bf16). The corpus is the default one; docs/presets.md has the words for C4. tiny's
rate comes from the grid in LOG.md.
"""

from __future__ import annotations

from typing import Any, Literal

from crnet.config.sections import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from crnet.errors import ConfigError


def _published(
    preset: str,
    sizes: tuple[int, int, int, int],
    steps: int,
    lr: float,
    micro_batch_size: int,
    recompute: Literal["none", "replay"] = "none",
    **model: Any,
) -> RunConfig:
    """``sizes``: h, f, heads, blocks."""
    names = ("hidden_size", "intermediate_size", "num_heads", "num_layers")
    shape: dict[str, Any] = {**dict(zip(names, sizes, strict=True)), **model}
    return RunConfig(
        preset=preset,
        model=ModelConfig(rank="aligned-parameters", **shape),
        data=DataConfig(vocab_size=32_000, sequence_length=256),
        optimizer=OptimizerConfig(lr=lr),
        train=TrainConfig(
            steps=steps,
            batch_size=512,
            micro_batch_size=micro_batch_size,
            recompute=recompute,
            eval_every_steps=1000,
            save_every_steps=1000,
        ),
    )


PRESETS: dict[str, tuple[str, RunConfig]] = {
    "tiny": ("3.5M-parameter blocks for a laptop; the default", RunConfig()),
    "llama-60m": ("table 9, 60M", _published("llama-60m", (512, 1376, 8, 8), 10_000, 1e-2, 256)),
    "llama-130m": (
        "table 9, 130M",
        _published("llama-130m", (768, 2048, 12, 12), 20_000, 1e-2, 256),
    ),
    "llama-350m": (
        "table 9, 350M; its rate is the paper's (E.2.6)",
        _published("llama-350m", (1024, 2736, 16, 24), 60_000, 1e-2, 64),
    ),
    "llama-1b": ("table 9, 1B", _published("llama-1b", (2048, 5461, 32, 24), 100_000, 5e-3, 32)),
    "llama-7b": (
        "table 9, 7B; recomputes (5.1)",
        _published("llama-7b", (4096, 11008, 32, 32), 150_000, 1e-3, 32, "replay"),
    ),
    "llama-13b": (
        "table 9, 13B; recomputes (5.1); one 80 GB device needs --train.precision bf16",
        _published("llama-13b", (5120, 13653, 40, 40), 200_000, 1e-3, 16, "replay"),
    ),
    "llama-70b": (
        "table 21, 70B; f = 8/3 h as the paper assumes, r = h/4; steps as for 13B; fits no device",
        _published("llama-70b", (8192, 21845, 64, 80), 200_000, 1e-3, 16, "replay"),
    ),
    "llama3-1b": (
        "table 16: grouped-query attention, 8 key/value heads; 15.6B tokens (E.3)",
        _published(
            *("llama3-1b", (2048, 7168, 32, 32), 119_000, 5e-3, 32),
            num_kv_heads=8,
            rope_theta=500_000.0,
        ),
    ),
}


def get(name: str) -> RunConfig:
    """The recipe of that name. Raises ``ConfigError`` with the known names if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"no preset is named {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name][1]
