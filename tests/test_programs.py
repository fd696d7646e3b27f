"""Every program of benchmarks/ and runs/ starts, and its short form writes what it promises."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(
    path
    for folder in ("benchmarks", "runs")
    for path in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")  # else a part of one
)
pytestmark = pytest.mark.slow


def run(program: Path, *words: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(program), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def promised(program: Path) -> dict[str, tuple[bool, list[str]]]:
    """What the docstring's ``JSON NAME: key, key.`` says: by name of a report (empty: the only
    one), whether its keys are ``by name``, that is, of each value; and the keys."""
    text = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or ""
    found = {}
    for name, by_name, keys in re.findall(r"^JSON ?(\w*): (by name )?([^.]+)\.", text, re.M):
        found[name] = bool(by_name), re.split(r",\s+", keys)
    return found


each_program = pytest.mark.parametrize(
    "program", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.stem}"
)


@each_program
def test_program_starts(program: Path):
    """It imports, has a short form, and says what it writes."""
    assert "--quick" in run(program, "--help")
    assert promised(program)


@each_program
def test_short_form_writes_what_is_promised(program: Path, tmp_path: Path):
    if program.stem == "gpu_suite":
        pytest.skip("takes minutes; tests/test_gpu_suite.py takes it to its end and reads it")
    out = tmp_path / "out"
    run(program, "--quick", "--out", str(out))
    for name, (by_name, keys) in promised(program).items():
        report = json.loads((out / f"{name}.json" if name else out).read_text(encoding="utf-8"))
        for values in report.values() if by_name else [report]:
            assert list(values) == keys
