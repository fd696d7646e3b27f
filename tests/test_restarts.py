"""runs/restarts.py compares what it says, and docs/scale.md has what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from crnet.cost.stages import cut

ROOT = Path(__file__).parents[1]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "runs")])
    import restarts

    return restarts


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/2026-11-26-restarts.json").read_text(encoding="utf-8"))


def test_stages_begin_at_the_restarts(program: Any) -> None:
    for name, starts in {"middle": [0, 4], "quarters": [0, 2, 4, 6]}.items():
        spec = program.small_study.asked(program.models(program.SHAPE, 16)[name]).spec
        stages = cut(spec, program.STAGES[name], program.small_study.LENGTH)
        assert [stage.bottom for stage in stages] == starts


@pytest.mark.parametrize("rank", [1, 16, 31])
def test_raised_ranks_have_the_parameters(program: Any, rank: int) -> None:
    """No nearer than half of what one more rank in one block brings."""
    compared = program.models(program.SHAPE, rank)
    sizes = {name: program.block_parameters(config) for name, config in compared.items()}
    h, f = program.SHAPE["hidden_size"], program.SHAPE["intermediate_size"]
    for name, other in program.RAISED.items():
        assert compared[name].crnet.restarts is None
        assert abs(sizes[name] - sizes[other]) <= (4 * 2 * h + 3 * (h + f)) / 2


def test_the_kept_report_is_of_this_program(program: Any, report: dict[str, Any]) -> None:
    assert report["models"] == program.described(program.models(program.SHAPE, 16))
    assert report["words"] == program.COMMON
    tokens = 1000 * program.small_study.ROWS * program.small_study.LENGTH
    assert {run["tokens"] for run in report["runs"].values()} == {tokens}


def test_the_document_has_what_was_measured(program: Any, report: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert "\n".join(program.table(report, program.SEEDS)) in text
