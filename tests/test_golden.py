"""The golden losses (``golden.py``), and that what compares them finds a difference."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest

import golden

KNOWN = "torch 9; AVX2; 1 thread; A"
ENTRIES: golden.Entries = {
    "torch 8; AVX512; 1 thread; B": {"full": {"loss": [7.0, 7.0], "val_loss": [7.0]}},
    KNOWN: {"full": {"loss": [5.1, 4.9], "val_loss": [5.0]}},
}


@pytest.mark.parametrize("method", golden.METHODS)
def test_golden_losses(tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = golden.losses(method, tmp_path)
    assert [len(found["loss"]), len(found["val_loss"])] == [10, 3]
    key, entries = golden.environment(), golden.read()
    words = golden.compare(found, key, method, entries)
    if key not in entries:
        with capsys.disabled():
            print(f"\n{words}")


def scaled(factor: float) -> golden.Losses:
    found = copy.deepcopy(ENTRIES[KNOWN]["full"])
    found["loss"][1] *= factor
    return found


def test_where_the_environment_is_known_every_bit_counts() -> None:
    found = scaled(1.0)
    assert "by bits" in golden.compare(found, KNOWN, "full", ENTRIES)
    found["val_loss"][0] = math.nextafter(found["val_loss"][0], 10)
    with pytest.raises(AssertionError, match="bit for bit"):
        golden.compare(found, KNOWN, "full", ENTRIES)


def test_elsewhere_the_nearest_entry_and_a_tolerance() -> None:
    key = "torch 9; AVX2; 1 thread; C"
    words = golden.compare(scaled(1.0001), key, "full", ENTRIES)
    assert repr(KNOWN) in words
    assert str(golden.TOLERANCE) in words
    for factor in (1.01, 0.99, math.nan):
        with pytest.raises(AssertionError, match="loss 1"):
            golden.compare(scaled(factor), key, "full", ENTRIES)
    shorter = {"loss": [5.1], "val_loss": [5.0]}
    with pytest.raises(AssertionError):
        golden.compare(shorter, key, "full", ENTRIES)
