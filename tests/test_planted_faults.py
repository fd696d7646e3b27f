"""That every planted fault (``make faults``) can still be planted: the sources move under it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import planted_faults
from planted_faults import ROOT, Fault


@pytest.mark.parametrize("fault", planted_faults.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: Fault) -> None:
    text = (ROOT / "src" / "crnet" / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.text) == 1
    assert fault.replacement != fault.text
    for test in fault.tests:
        file, _, name = test.partition("::")
        source = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name.partition('[')[0]}\(", source, re.M) or not name, test
