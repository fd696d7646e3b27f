"""Recipes by name. Each is a whole ``RunConfig`` and names the table of the paper it comes from.

Sizes: arXiv:2509.18993, table 9 (60M to 13B), table 16 (llama3-1b), table 21 (70b).
Ranks: table 10, by ``--model.rank aligned-parameters`` (the default) or ``aligned-memory``.
Schedule and batch: appendix E.2.1; the steps are table 9's. The learning rates lie inside the
range that the appendix searches; it does not say which won, so sweep them. tiny's comes from the
grid in LOG.md.
"""

from __future__ import annotations

from crnet.config.sections import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from crnet.errors import ConfigError


def _published(
    preset: str, h: int, f: int, heads: int, layers: int, steps: int, lr: float, **model: object
) -> RunConfig:
    return RunConfig(
        preset=preset,
        model=ModelConfig(
            rank="aligned-parameters",
            hidden_size=h,
            intermediate_size=f,
            num_heads=heads,
            num_layers=layers,
            **model,  # type: ignore[arg-type]
        ),
        data=DataConfig(vocab_size=32_000, sequence_length=256),
        optimizer=OptimizerConfig(lr=lr),
        train=TrainConfig(
            steps=steps,
            batch_size=512,
            micro_batch_size=None,
            eval_every_steps=1000,
            save_every_steps=1000,
        ),
    )


PRESETS: dict[str, tuple[str, RunConfig]] = {
    "tiny": ("3.5M-parameter blocks for a laptop; the default", RunConfig()),
    "llama-60m": ("table 9, 60M", _published("llama-60m", 512, 1376, 8, 8, 10_000, 5e-3)),
    "llama-130m": ("table 9, 130M", _published("llama-130m", 768, 2048, 12, 12, 20_000, 5e-3)),
    "llama-350m": ("table 9, 350M", _published("llama-350m", 1024, 2736, 16, 24, 60_000, 5e-3)),
    "llama-1b": ("table 9, 1B", _published("llama-1b", 2048, 5461, 32, 24, 100_000, 3e-3)),
    "llama-7b": ("table 9, 7B", _published("llama-7b", 4096, 11008, 32, 32, 150_000, 3e-3)),
    "llama-13b": ("table 9, 13B", _published("llama-13b", 5120, 13653, 40, 40, 200_000, 3e-3)),
    "llama-70b": (
        "table 21, 70B; f = 8/3 h as the paper assumes, r = h/4; steps as for 13B",
        _published("llama-70b", 8192, 21845, 64, 80, 200_000, 3e-3),
    ),
    "llama3-1b": (
        "table 16: grouped-query attention, 8 key/value heads",
        _published(
            "llama3-1b", 2048, 7168, 32, 32, 110_000, 3e-3, num_kv_heads=8, rope_theta=500_000.0
        ),
    ),
}


def get(name: str) -> RunConfig:
    """The recipe of that name. Raises ``ConfigError`` with the known names if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"no preset is named {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name][1]
