"""The perplexities that the paper prints, as data: table, model, method, when, perplexity.

Of arXiv:2509.18993. Validation perplexity on C4 in English. ``step`` is where it is printed: None,
the end of the run. Table 18 is left out: its figures are table 12's (errata). Table 14, which is of
fine-tuning, is on other corpora and left out too.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A perplexity as printed."""

    table: int
    model: str
    """A name of ``config.presets.PAPER`` without its prefix."""
    method: str
    perplexity: float
    step: int | None = None


_SIZES = ("llama-60m", "llama-130m", "llama-350m", "llama-1b")
_TABLE_3 = {
    "full": "34.06 24.36 18.80 15.56",
    "LoRA": "34.99 33.92 25.58 19.21",
    "ReLoRA": "37.04 29.37 29.08 18.33",
    "VeLoRA": "34.35 25.88",
    "FLoRA": "33.76 25.29",
    "SLTrain": "34.15 26.04 19.42 16.14",
    "CoLA": "34.04 24.48 19.40 15.52",
    "LORO": "33.96 24.59 18.84 15.19",
    "CR-Net, aligned parameters": "32.76 24.31 18.95 15.22",
    "GaLore": "34.88 25.36 18.95 15.64",
    "RSO": "34.55 25.34 18.87 15.86",
    "APOLLO": "31.55 22.94 16.85 14.20",
    "CR-Net, aligned memory": "32.76 23.74 17.08 14.05",
}
_BY_STEP = {  # (table, model, method): steps -> perplexity
    (4, "llama-7b", "8-bit Adam"): {40_000: 18.09, 80_000: 15.47},
    (4, "llama-7b", "8-bit GaLore"): {10_000: 26.87, 40_000: 17.94, 80_000: 15.39},
    (4, "llama-7b", "APOLLO"): {40_000: 17.55, 80_000: 14.39},
    (4, "llama-7b", "CoLA-M"): {10_000: 22.76, 40_000: 16.21, 65_000: 14.59, 80_000: 13.82},
    (4, "llama-7b", "CR-Net"): {10_000: 23.11, 40_000: 16.01, 65_000: 14.47, 80_000: 13.72},
    (12, "llama-13b", "8-bit Adam"): {10_000: 24.31, 20_000: 20.53, 30_000: 18.84, 40_000: 17.85},
    (12, "llama-13b", "CR-Net"): {10_000: 25.99, 20_000: 21.73, 30_000: 19.32, 40_000: 18.12},
    (17, "llama3-1b", "GaLore"): {40_000: 19.29, 80_000: 16.89, 100_000: 16.47, 110_000: 16.40},
    (17, "llama3-1b", "CR-Net"): {40_000: 18.29, 80_000: 16.05, 100_000: 15.70, 110_000: 15.65},
}
_ENDS = (
    Published(6, "llama-350m", "CR-Net, low-rank first layer", 19.68),
    Published(13, "llama-350m", "CR-Net, NF4 activations", 19.32),
    Published(15, "llama-130m-2048", "GaLore", 25.14),
    Published(15, "llama-130m-2048", "CR-Net", 23.73),
    Published(15, "llama-350m-2048", "GaLore", 18.87),
    Published(15, "llama-350m-2048", "CR-Net", 18.86),
    Published(15, "llama-1b-2048", "GaLore", 15.03),
    Published(15, "llama-1b-2048", "CR-Net", 14.79),
)

PERPLEXITIES: tuple[Published, ...] = (
    *(
        Published(3, model, method, float(figure))
        for method, figures in _TABLE_3.items()
        for model, figure in zip(_SIZES, figures.split(), strict=False)
    ),
    *(
        Published(table, model, method, perplexity, step)
        for (table, model, method), figures in _BY_STEP.items()
        for step, perplexity in figures.items()
    ),
    *_ENDS,
)
"""Table 5 is the last column of table 12, table 11 has 1B of table 3."""
