"""docs/comparison.md says what the JSON of its study says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from crnet.compare import results, study

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
FOUND = json.loads((ROOT / "benchmarks" / "2026-11-27-abstracts.json").read_text(encoding="utf-8"))
STUDY = study.read(str(ROOT / "runs" / "studies" / "abstracts.toml"))


def test_the_table_of_the_tuning_is_the_program_s() -> None:
    assert results.tuning_table(FOUND) in TEXT


def test_every_final_figure_is_a_run_s() -> None:
    rows = re.findall(
        r"^\| ([\w-]+) \| ([\d. /]+) \| ([\d. /]+) \| ([\d. /]+) \| ([\d,]+) ", TEXT, re.M
    )
    assert [name for name, *_ in rows] == [
        name
        for name, row in FOUND["rows"].items()
        if any(run["val_loss"] is not None for run in row["runs"])
    ]
    for name, *shown, parameters in rows:
        row = FOUND["rows"][name]
        ended = [run for run in row["runs"] if run["val_loss"] is not None]
        keys = ("val_loss", "val_perplexity", "val_bits_per_byte")
        for text, key, digits in zip(shown, keys, (4, 2, 4), strict=True):
            assert text == " / ".join(f"{run[key]:.{digits}f}" for run in ended)
        assert parameters == f"{row['parameters']:,}"


def test_the_study_is_the_one_that_was_run() -> None:
    """Its rows, their settings and ranks; nothing that has figures is missing from the file."""
    for name, row in FOUND["rows"].items():
        config = STUDY.rows[name].config
        assert row["settings"]["model.linear"] == config.model.linear
        assert row["settings"]["model.rank"] == config.model.rank
        assert all(run["commit"] for run in row["runs"] if run["val_loss"])
    parameters = {name: row["parameters"] for name, row in FOUND["rows"].items()}
    for name in ("lowrank", "cola"):
        assert abs(parameters[name] / parameters["crnet"] - 1) < 0.01
