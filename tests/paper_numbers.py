"""The paper's shapes, ranks and counts written out, for the tests of ``crnet.paper``.

Nothing here is read from the package: what the tests expect is computed from numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from crnet.paper.cells import reads_as

GIB = 2**30
SHAPES = {  # table 9: L, h, f
    "60M": (8, 512, 1376),
    "130M": (12, 768, 2048),
    "350M": (24, 1024, 2736),
    "1B": (24, 2048, 5461),
    "7B": (32, 4096, 11008),
    "13B": (40, 5120, 13653),
    "70B": (80, 8192, 21845),
}
RANKS = {  # table 10, layer 2 first
    ("60M", "parameters"): [96] * 3 + [112] * 4,
    ("130M", "parameters"): [192] * 3 + [224] * 8,
    ("350M", "parameters"): [224] * 15 + [256] * 8,
    ("1B", "parameters"): [448] * 23,
    ("60M", "memory"): [96] * 3 + [112] * 4,
    ("130M", "memory"): [192] * 3 + [256] * 8,
    ("350M", "memory"): [384] * 23,
    ("1B", "memory"): [768] * 23,
}


def full(s: int, h: int, f: int, attention: int = 12) -> int:
    """FLOPs of a full-rank layer."""
    return 24 * s * h * h + attention * s * s * h + 18 * s * h * f


def low(s: int, h: int, f: int, r: int, attention: int = 12) -> int:
    """FLOPs of a low-rank layer."""
    return 48 * s * h * r + attention * s * s * h + 18 * s * r * (h + f)


def all_parameters(size: str, ranks: Sequence[int] | None = None, embedding: int = 32_000) -> int:
    """Eq. 8, embedding, head and norms; betas: one a map from layer 2 on.

    As many ranks as layers are CoLA's, one less CR-Net's; None is full rank.
    """
    layers, h, f = SHAPES[size]
    rest = 2 * embedding * h + (2 * layers + 1) * h
    if ranks is None:
        return layers * (4 * h * h + 3 * h * f) + rest
    low_rank = sum(11 * h * r + 3 * f * r for r in ranks)
    if len(ranks) == layers:
        return low_rank + rest
    return 4 * h * h + 3 * h * f + low_rank + 7 * (layers - 1) + rest


def misread(figures: Iterable[tuple[float, str]]) -> list[str]:
    """The figures that do not read as printed; every one, for a message that shows them all."""
    return [f"{value} is not {text}" for value, text in figures if not reads_as(value, text)]
