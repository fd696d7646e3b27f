"""What the suite is to show: each goal, what was measured, and whether it is met.

Goals are for an H100 or H200, rows of 256 tokens, bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Report = dict[str, Any]
STEP_RATIOS = {"130m": 0.95, "350m": 0.80, "1b": 0.62, "7b": 0.53}


@dataclass(frozen=True)
class Goal:
    """One figure and its bound."""

    name: str
    bound: float
    is_most: bool
    """Whether the bound is the most that it may be; else the least."""
    read: Callable[[Report], float | None]

    def row(self, report: Report) -> dict[str, Any]:
        try:
            value = self.read(report)
        except (KeyError, TypeError, ZeroDivisionError, ValueError):  # its section is not there
            value = None
        met = None
        if value is not None:
            met = value <= self.bound if self.is_most else value >= self.bound
        wanted = f"{'at most' if self.is_most else 'at least'} {self.bound:g}"
        return {"goal": self.name, "wanted": wanted, "measured": value, "met": met}


SIZES = (("350m", "crnet", 0.28), ("7b", "crnet", 0.45), ("7b", "full", 0.55))
"""Size, method and the MFU that it is to reach."""


def goals(report: Report) -> list[dict[str, Any]]:
    """A row for each goal; ``measured`` is None where the section did not get that far."""
    return [goal.row(report) for goal in _all()]


def _all() -> Iterator[Goal]:
    for size, bound in STEP_RATIOS.items():
        yield Goal(
            f"step time, CR-Net to full rank, both at their best, {size}",
            bound,
            True,
            lambda it, size=size: _least_ms(it, size, "crnet") / _least_ms(it, size, "full"),
        )
    for size, linear, bound in SIZES:
        yield Goal(
            f"MFU, {linear}, {size}",
            bound,
            False,
            lambda it, size=size, linear=linear: _most_mfu(it, size, linear),
        )
    yield Goal("head over its products, 350m", 1.4, True, _head)
    yield Goal(
        "kernels a block, CR-Net 350m",
        60,
        True,
        lambda it: min(each["kernels_a_block"] for each in _entries(it, "kernels", "350m")),
    )
    yield Goal(
        "share of a micro-batch in which no kernel runs",
        0.03,
        True,
        lambda it: min(each["idle_frac"] for each in _entries(it, "kernels", "350m")),
    )
    yield Goal(
        "policies whose micro-batch waits for the GPU",
        0,
        True,
        lambda it: sum(each != "none" for each in it["numerics"]["waits"].values()),
    )
    yield Goal("replay to none, time, 350m", 1.15, True, lambda it: _policy(it, "ms"))
    yield Goal("replay to none, peak, 350m", 0.30, True, lambda it: _policy(it, "peak_bytes"))
    yield Goal("peak to prediction, farthest from 1", 0.05, True, _peak_error)
    yield Goal("reserved to allocated, the most", 1.1, True, _reserved)
    yield Goal(
        "tests of tests/gpu that fail", 0, True, lambda it: len(it["numerics"]["tests"]["failed"])
    )
    yield Goal(
        "decoding 7B, CR-Net, tokens a second", 350, False, lambda it: _tokens(it, "7b, crnet")
    )
    yield Goal(
        "decoding 7B, CR-Net to full rank",
        2.2,
        False,
        lambda it: _tokens(it, "7b, crnet") / _tokens(it, "7b, full"),
    )
    yield Goal(
        "seconds to evaluate 10M tokens, 1B",
        100,
        True,
        lambda it: it["decode"]["1b, evaluation"]["crnet"]["s_of_10M_tokens"],
    )


def _entries(report: Report, section: str, size: str) -> list[Any]:
    """Of a section, all that speak of a size."""
    return [each for key, each in report[section].items() if key.startswith(f"{size},")]


def _sides(report: Report, size: str, linear: str) -> list[Any]:
    """A method's figures without the compiler, and with it."""
    found = [each[linear] for each in _entries(report, "eager", size)]
    found += [
        each for key, each in report.get("compiled", {}).items() if key == f"{size}, {linear}"
    ]
    return [each for each in found if "mfu" in each]


def _least_ms(report: Report, size: str, linear: str) -> float:
    return min(each["ms"] for each in _sides(report, size, linear))


def _most_mfu(report: Report, size: str, linear: str) -> float:
    return max(each["mfu"] for each in _sides(report, size, linear))


def _head(report: Report) -> float:
    times = {key: each["ms"] for key, each in report["loss"]["350m"].items() if "ms" in each}
    return min(each for key, each in times.items() if key != "products") / times["products"]


def _policy(report: Report, key: str) -> float:
    found = report["policies"]
    return found["350m, replay"][key] / found["350m, none"][key]


def _with_memory(report: Report) -> list[Any]:
    sides = [
        each
        for entry in report["eager"].values()
        if isinstance(entry, dict)
        for each in entry.values()
    ]
    return [each for each in sides if "peak_bytes" in each]


def _peak_error(report: Report) -> float:
    return max(
        abs(each["peak_bytes"] / each["predicted_peak_bytes"] - 1) for each in _with_memory(report)
    )


def _reserved(report: Report) -> float:
    return max(each["reserved_bytes"] / each["allocated_bytes"] for each in _with_memory(report))


def _tokens(report: Report, key: str) -> float:
    return report["decode"][key]["greedy"]["tokens_per_s"]


def table(report: Report) -> str:
    """A few lines for a terminal: sections, step times, goals."""
    lines = [
        f"{name:10} {each['status']:40} {each['elapsed_s']:6} s"
        for name, each in report["sections"].items()
    ]
    lines += ["", f"{'micro-batch':36} {'ms':>9} {'tokens/s':>10} {'MFU':>6} {'GiB':>6}"]
    for section in ("eager", "policies", "compiled", "peers"):
        for key, entry in report["sections"].get(section, {}).items():
            sides = entry if isinstance(entry, dict) else {}
            sides = {"": sides} if "ms" in sides else sides
            lines += [
                _line(f"{key} {name}", each)
                for name, each in sides.items()
                if isinstance(each, dict) and "tokens_per_s" in each
            ]
    lines += ["", f"{'goal':58} {'wanted':>16} {'measured':>10}"]
    for row in report["goals"]:
        value = "-" if row["measured"] is None else f"{row['measured']:.3g}"
        mark = {None: "", True: " met", False: " missed"}[row["met"]]
        lines.append(f"{row['goal']:58} {row['wanted']:>16} {value:>10}{mark}")
    return "\n".join(lines)


def _line(name: str, each: Report) -> str:
    peak = each.get("peak_bytes", 0) / 2**30
    return (
        f"{name:36} {each['ms']:9.2f} {each['tokens_per_s']:10.0f} {each['mfu']:6.3f} {peak:6.1f}"
    )
