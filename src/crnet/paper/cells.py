"""One figure of a table of the paper beside the same figure recomputed, and when the two agree."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One figure, or one formula, of a table."""

    row: str
    column: str
    formula: str
    value: float | str
    """Recomputed, in the unit that is printed; text where the paper prints a formula."""
    printed: str
    why: str = ""
    """Where the two differ: which input gives the print, or that none was found."""
    reproduced: float | None = None
    """Recomputed with the input that ``why`` names: it reads as printed."""

    @property
    def agrees(self) -> bool:
        """Whether the value, rounded to the printed digits, is what is printed."""
        if isinstance(self.value, str):
            return self.value == self.printed
        return reads_as(self.value, self.printed)


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper, cell by cell; the notes say which equations are used."""

    title: str
    notes: tuple[str, ...]
    cells: tuple[Cell, ...]


def read_number(text: str) -> tuple[float, float]:
    """The first number in a text, ``1.005 x 10^13`` or ``13.1K``, and a unit of its last digit."""
    match = re.search(r"(\d[\d,]*)(?:\.(\d+))?(K\b)?(?: x 10\^(\d+))?", text)
    assert match, f"no number in {text!r}"
    whole, digits, thousand, power = match.groups()
    scale = 10.0 ** int(power or 0) * (1000 if thousand else 1)
    return float(f"{whole.replace(',', '')}.{digits or 0}") * scale, scale / 10 ** len(digits or "")


def reads_as(value: float, printed: str) -> bool:
    """Whether a value, rounded to the digits of the printed number, is that number."""
    wanted, unit = read_number(printed)
    return abs(value - wanted) <= unit / 2 * (1 + 1e-9)
