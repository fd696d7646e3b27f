"""Words and numbers of the page, as a person reads them."""

from __future__ import annotations

import html
from typing import Any


def safe(value: Any) -> str:
    """As HTML has it."""
    return html.escape(str(value))


def count(value: float) -> str:
    """A count that is read: 3.24M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{digits(value / size)}{unit}"
    return digits(value)


def digits(value: float) -> str:
    """Three digits, no exponent below a thousand."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded == int(rounded) else f"{rounded:g}"


def exponent(value: float) -> str:
    """3.2e15"""
    return f"{value:.3g}" if value < 1e4 else f"{value:.2e}".replace("e+", "e")


def duration(value: float) -> str:
    """Seconds as a person says them."""
    if value < 90:
        return f"{value:.3g} s"
    if value < 5400:
        return f"{value / 60:.3g} min"
    return f"{value / 3600:.3g} h" if value < 172_800 else f"{value / 86_400:.3g} d"


def size(value: float) -> str:
    """Bytes."""
    return f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / 2**20:.3g} MiB"
