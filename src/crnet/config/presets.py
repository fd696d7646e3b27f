"""Recipes by name. Each is a whole ``RunConfig`` and names the table of the paper it comes from,
where it comes from one.

Of arXiv:2509.18993: sizes (table 9; table 16: llama3-1b; table 21: 70b), ranks (table 10, by
``--model.rank aligned-parameters``, the default, or ``aligned-memory``), 512 rows of 256 tokens,
warm-up and cosine (E.2.1), the steps (table 9), the rate at 350M (0.01, E.2.6), recomputation from
7B on (5.1, E.2.3, G).

Ours: every other rate, from the eight that E.2.1 searches; which one won is not printed, so sweep
them. Clipping at 1, which neither the paper nor the protocol it follows has: no run has shown that
0.01 holds without it. ``replay`` where the paper has its algorithm 1 (docs/presets.md). llama3-1b's
steps: 15.6B tokens. The micro-batch: a power of 2 that takes at most 64 GiB, state included, in
fp32 (13b: in bf16). The corpus is the default one. tiny's rate comes from the grid in LOG.md.

``PAPER`` has the paper's own runs, by table: the same models on its corpus, in its precision, with
its recomputation and without our clipping. ``paper.protocol`` says of every key where it is from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from crnet.architectures.mla import MLAOptions
from crnet.architectures.qwen3_moe import Qwen3MoeOptions
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


def _with_experts(*args: Any, **model: Any) -> RunConfig:
    """As ``_published``, Qwen-3's experts. Table 7's dense width, 2736, is of layers that there are
    none of: with them the totals of E.3 do not come out."""
    made = _published(
        *args,
        architecture="qwen3-moe",
        num_kv_heads=8,
        vocab_size=151_936,
        rope_theta=1_000_000.0,
        qwen3_moe=Qwen3MoeOptions(num_experts=24, num_active=4),
        **model,
    )
    return replace(made, model=replace(made.model, rank="224"))


def _with_latents(*args: Any) -> RunConfig:
    """As ``_published``, DeepSeek's attention: latents of half and a third of the width. Ranks of
    ours: where a latent is one side, about half the rank at which a map costs what a dense one
    does."""
    made = _published(
        *args,
        architecture="mla",
        mla=MLAOptions(q_lora_rank=384, kv_lora_rank=256),
    )
    rank = "192/q_a=128/q_b=128/kv_a=96/kv_b=96"
    return replace(made, model=replace(made.model, rank=rank))


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
    "qwen3-moe-1.8b": (
        "table 7: 24 experts of width 704, 4 active, r 224; 7.8B tokens (E.3)",
        _with_experts("qwen3-moe-1.8b", (1024, 704, 16, 28), 60_000, 5e-3, 32),
    ),
    "mla-130m": (
        "no table: 130M with latent attention, the paper's future work (section 6)",
        _with_latents("mla-130m", (768, 2048, 12, 12), 20_000, 1e-2, 256),
    ),
}


PREFIX = "paper/"
"""Of the names of the paper's own runs."""
RATES = (3e-4, 6e-4, 1e-3, 5e-3, 1e-2, 1.2e-2, 1.5e-2, 2e-2)
"""That E.2.1 searches, each for 10% of the steps; which one won is printed for 350M alone."""
ROWS_A_BATCH = 512
LONG_ROW = 2048


def _on_c4(name: str, steps: int | None = None, length: int = 256) -> RunConfig:
    """A preset's model under the paper's protocol for C4 (5.1, E.2.1).

    Rows of ``length`` tokens, 131,072 tokens a batch. 7B and 13B recompute as 5.1 and E.2.3 say: by
    algorithm 1, every 8th block kept, no guard.
    """
    recipe = PRESETS[name][1]
    train, steps = recipe.train, steps or recipe.train.steps
    shorter = length // recipe.data.sequence_length
    batch_size = ROWS_A_BATCH // shorter
    recomputes: dict[str, Any] = {}
    if train.recompute != "none":
        recomputes = {
            "recompute": "invert",
            "recompute_layers": "every-8",
            "invert_tolerance": 1e30,
        }
    assert train.micro_batch_size is not None
    return replace(
        recipe,
        preset=f"{PREFIX}{name}" + ("" if shorter == 1 else f"-{length}"),
        data=replace(
            recipe.data,
            source=("allenai/c4",),
            subset="en",
            tokenizer="t5-base",
            rows="document",
            sequence_length=length,
            max_documents=steps * batch_size,  # one pass
        ),
        optimizer=replace(recipe.optimizer, clip_norm=0.0),
        train=replace(
            train,
            steps=steps,
            batch_size=batch_size,
            micro_batch_size=max(1, train.micro_batch_size // shorter),
            precision="bf16",
            bf16_update="plain",
            **recomputes,
        ),
    )


def _with_tokens(name: str, tokenizer: str) -> RunConfig:
    """``_on_c4`` with a model's own tokenizer."""
    made = _on_c4(name)
    return replace(made, data=replace(made.data, tokenizer=tokenizer))


def _of_table_8(
    name: str, model: ModelConfig, tokenizer: str, steps: int, lr: float, **more: Any
) -> RunConfig:
    """A run on TinyShakespeare; ``more``: batch, length, evaluations, steps of warm-up."""
    batch_size, length, every = more["batch_size"], more["length"], more["every"]
    warmup = more.get("warmup", 500)
    return RunConfig(
        preset=f"{PREFIX}{name}",
        model=model,
        data=DataConfig(source=("input.txt",), tokenizer=tokenizer, sequence_length=length),
        optimizer=OptimizerConfig(lr=lr, warmup_frac=min(1.0, warmup / steps), clip_norm=0.0),
        train=TrainConfig(
            steps=steps, batch_size=batch_size, micro_batch_size=8, eval_every_steps=every
        ),
    )


_LLAMA3_8B = ModelConfig(
    linear="full",
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    rope_theta=500_000.0,
    norm_eps=1e-5,
)
_GPT2_SMALL = ModelConfig(
    architecture="gpt2",
    linear="full",
    hidden_size=768,
    intermediate_size=3072,
    num_layers=12,
    num_heads=12,
    norm_eps=1e-5,
)
_QWEN3_TOKENS = "Qwen/Qwen3-0.6B"
_AS_LLAMA3 = {"batch_size": 128, "length": 64, "every": 20}
_LLAMA3_TOKENS, _GPT2_TOKENS = "meta-llama/Meta-Llama-3-8B", "gpt2"

PAPER: dict[str, tuple[str, RunConfig]] = {
    "paper/llama-60m": ("tables 3, 10: 60M on C4", _on_c4("llama-60m")),
    "paper/llama-130m": ("tables 3, 10: 130M on C4", _on_c4("llama-130m")),
    "paper/llama-350m": ("tables 3, 6, 10, 13: 350M on C4", _on_c4("llama-350m")),
    "paper/llama-1b": ("tables 3, 10, 11: 1B on C4", _on_c4("llama-1b")),
    "paper/llama-7b": ("table 4: 7B, printed up to step 80,000", _on_c4("llama-7b")),
    "paper/llama-13b": ("tables 5, 12: 13B, printed up to step 40,000", _on_c4("llama-13b")),
    "paper/llama3-1b": ("table 17: grouped-query attention", _on_c4("llama3-1b")),
    "paper/llama-130m-2048": (
        "table 15: 2,048 tokens a row, 2.9B tokens",
        _on_c4("llama-130m", 22_100, LONG_ROW),
    ),
    "paper/llama-350m-2048": (
        "table 15: 2,048 tokens a row, 8.0B tokens",
        _on_c4("llama-350m", 61_000, LONG_ROW),
    ),
    "paper/llama-1b-2048": (
        "table 15: 2,048 tokens a row, 29.5B tokens",
        _on_c4("llama-1b", 225_100, LONG_ROW),
    ),
    "paper/table-8-llama3-8b": (
        "table 8: LLaMA-3 8B is fine-tuned on TinyShakespeare",
        _of_table_8("table-8-llama3-8b", _LLAMA3_8B, _LLAMA3_TOKENS, 2000, 1e-5, **_AS_LLAMA3),
    ),
    "paper/table-8-llama3-8b-start": (
        "table 8: the first 100 steps of LLaMA-3 8B, of 500 of warm-up",
        _of_table_8(
            *("table-8-llama3-8b-start", _LLAMA3_8B, _LLAMA3_TOKENS, 100, 2e-6), **_AS_LLAMA3
        ),
    ),
    "paper/qwen3-moe-1.8b": ("table 18: Qwen-3 MoE", _with_tokens("qwen3-moe-1.8b", _QWEN3_TOKENS)),
    "paper/table-8-qwen3-moe-start": (
        "table 8: the first 100 steps of Qwen-3 MoE, of 1,000 of warm-up",
        _of_table_8(
            "table-8-qwen3-moe-start",
            replace(PRESETS["qwen3-moe-1.8b"][1].model, linear="full", rank=ModelConfig.rank),
            _QWEN3_TOKENS,
            *(100, 2.5e-4),
            batch_size=256,
            length=256,
            every=500,
            warmup=1000,
        ),
    ),
    "paper/table-8-gpt2": (
        "table 8: GPT-2 small is fine-tuned on TinyShakespeare",
        _of_table_8(
            *("table-8-gpt2", _GPT2_SMALL, _GPT2_TOKENS, 2000, 1e-5),
            batch_size=1024,
            length=512,
            every=10,
        ),
    ),
}
"""The runs of the paper; ``paper.protocol`` says where their keys are from."""


def get(name: str) -> RunConfig:
    """The recipe of that name. Raises ``ConfigError`` with the known names if there is none."""
    known = PRESETS | PAPER
    if name not in known:
        raise ConfigError(f"no preset is named {name!r}; known: {', '.join(known)}")
    return known[name][1]
