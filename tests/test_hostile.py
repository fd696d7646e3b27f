"""The table of ``hostile.py``, a group a test: no traceback, no silent mistake, nothing lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import hostile


@pytest.mark.hostile
@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.name != "posix", reason="pipes, limits and signals of POSIX")
@pytest.mark.parametrize("group", hostile.GROUPS)
def test_every_attempt_ends_as_it_should(group: str, tmp_path: Path) -> None:
    wrong = [
        f"{row['name']}: {each}"
        for row in hostile.results(group, tmp_path)
        for each in row["wrong"]
    ]
    assert wrong == [], "\n\n".join(wrong)


def test_the_table_is_large() -> None:
    """Attempts are read off the options, the commands and the files: none may drop out unseen."""
    names = [(each.group, each.name) for each in hostile.TABLE]
    assert len(set(names)) == len(names)
    assert len(names) >= 250
    assert {"numbers of model", "numbers of train", "checkpoints", "processes"} <= {*hostile.GROUPS}
