"""docs/comparison.md says what the JSON of its studies says."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from crnet.compare import study
from crnet.config.serialize import flags

ROOT = Path(__file__).parents[1]
PAGE = runpy.run_path(str(ROOT / "docs" / "comparison_page.py"))
TEXT = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
FILES = {
    name: ROOT / "benchmarks" / file
    for name, file in PAGE["STUDIES"].items()
    if (ROOT / "benchmarks" / file).exists()
}


def found(name: str) -> dict[str, Any]:
    return json.loads(FILES[name].read_text(encoding="utf-8"))


def of_study(name: str) -> study.Study:
    file = "abstracts" if name == "abstracts" else f"abstracts-{name}"
    return study.read(str(ROOT / "runs" / "studies" / f"{file}.toml"))


def test_the_tables_are_the_program_s() -> None:
    assert PAGE["page"](TEXT) == TEXT, "run docs/comparison_page.py"
    for name in FILES:
        assert f"<!-- finals {name} -->" in TEXT
        assert PAGE["finals"](found(name)) in TEXT


@pytest.mark.parametrize("name", FILES)
def test_the_study_is_the_one_that_was_run(name: str) -> None:
    """Its rows, their settings and ranks, tuned on one grid; every run says its commit."""
    rows, given = found(name)["rows"], of_study(name)
    for row, figures in rows.items():
        known = dict(flags(given.rows[row].config))
        assert figures["settings"], "rows differ in something"
        assert {key: known[key] for key in figures["settings"]} == figures["settings"]
        assert all(run["commit"] for run in figures["runs"] if run["val_loss"])
        aligned = given.rows[row].alignment
        if aligned is not None and aligned.kind == "parameters" and aligned.other in rows:
            assert abs(figures["parameters"] / rows[aligned.other]["parameters"] - 1) < 0.01


def test_a_table_that_is_not_the_results_is_noticed() -> None:
    first = PAGE["finals"](found("abstracts")).splitlines()[2]
    changed = TEXT.replace(first, first.replace("| 451,392 |", "| 451,393 |"))
    assert changed != TEXT
    assert PAGE["page"](changed) == TEXT
