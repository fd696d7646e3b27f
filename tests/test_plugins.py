"""docs/adding_a_method.md, run as a reader would: its file, its commands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_a_method.md").read_text()
SMALL = (
    "--model.hidden-size 32 --model.intermediate-size 48 --model.num-layers 2 --model.num-heads 2 "
    "--model.rank 4 --data.vocab-size 300 --data.sequence-length 16 --data.validation-tokens 500 "
    "--train.batch-size 2 --train.steps 4 --train.threads 1 --train.save-every-steps 2 "
    "--data.documents line"
)


def crnet(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "crnet", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (folder / "diagonal.py").write_text(blocks[0])
    return folder


def commands() -> list[list[str]]:
    return [shlex.split(line)[1:] for line in re.findall(r"^    (crnet [^\n]+)$", PAGE, re.M)]


@pytest.fixture(scope="module")
def run(folder: Path, corpus: Path) -> Path:
    """The run of the page: every command of it, in its order, on a small model."""
    shown = commands()
    assert {words[0] for words in shown} == {"train", "evaluate", "cost", "check-plugin"}
    for words in shown:
        more = []
        if words[0] == "train" and "--resume" not in words:
            more = [*shlex.split(SMALL), "--data.source", str(corpus)]
        done = crnet(folder, *words, *more)
        assert done.returncode == 0, (words, done.stderr)
    return folder / "run"


@pytest.mark.slow
def test_the_page_runs(run: Path):
    manifest = json.loads((run / "run.json").read_text())
    assert [plugin["name"] for plugin in manifest["plugins"]] == ["crnet_plugin_diagonal"]
    assert manifest["config"]["model"]["diagonal"] == {"start": 0.5}


@pytest.mark.slow
def test_a_changed_file_cannot_resume(folder: Path, run: Path):
    file = folder / "diagonal.py"
    text = file.read_text()
    file.write_text(text + "\n# changed\n")
    try:
        done = crnet(
            folder, "train", "--plugins", "diagonal.py", "--resume", "--out", "run",
            "--train.steps", "6",
        )  # fmt: skip
    finally:
        file.write_text(text)
    assert done.returncode == 2
    assert "diagonal.py" in done.stderr
    done = crnet(folder, "train", "--resume", "--out", "run", "--train.steps", "6")
    assert done.returncode == 2, "without the plugin"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_broken_method_fails_the_contract(folder: Path):
    text = (folder / "diagonal.py").read_text()
    broken = folder / "broken.py"
    broken.write_text(text.replace("kept_bytes=2 * rows", "kept_bytes=3 * rows"))
    done = crnet(folder, "check-plugin", "broken.py")
    assert done.returncode == 1
    assert re.search(r"failed +diagonal, kept bytes: .*declared", done.stdout)
