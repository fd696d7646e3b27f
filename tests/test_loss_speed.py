"""crnet's head and loss are not slower than all logits and cross_entropy, at any preset's shape.

Slow: it times. The sides take turns on one thread, and the processor's time counts, not the wall's:
other programs take the cores away, and disturb it little. The figure is the median of the ratios
within a round, and the least of up to three attempts counts: what disturbs a machine makes one
attempt look slow, and does not make a slow loss look quick three times.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

from crnet.config import presets

ROOT = Path(__file__).parents[1]
BOUND = 1.1
ATTEMPTS = 3

Shape = tuple[int, int, int]


def shapes() -> dict[Shape, str]:
    """(rows, width, vocabulary) -> the presets that have it. Rows: two chunks, or one where a
    product takes seconds."""
    found: dict[Shape, str] = {}
    for name, (_, recipe) in presets.PRESETS.items():
        width = recipe.model.hidden_size
        shape = (512 if width <= 1024 else 256, width, recipe.data.vocab_size)
        found[shape] = f"{found[shape]},{name}" if shape in found else name
    return found


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])


def test_every_preset_is_among_the_shapes() -> None:
    named = {name for names in shapes().values() for name in names.split(",")}
    assert named == set(presets.PRESETS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: shapes()[shape])
def test_loss_is_not_slower_than_the_plain_one(shape: Shape) -> None:
    import peers

    rounds = 7 if shape[1] <= 1024 else 3 if shape[1] <= 4096 else 1
    ratios: list[float] = []
    while len(ratios) < ATTEMPTS and min(ratios, default=BOUND + 1) > BOUND:
        times = peers.take_turns(peers.loss_sides(*shape), rounds)
        pairs = zip(times["crnet"], times["plain"], strict=True)
        ratios.append(statistics.median(ours / plain for (_, ours), (_, plain) in pairs))
    assert min(ratios) <= BOUND, ratios
