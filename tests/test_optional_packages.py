"""A package that only some uses need may be missing: then its use says what to install."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from crnet.cli.app import main

ROOT = Path(__file__).parents[1]
USES = {
    "datasets": ("data", "prepare --data.source allenai/c4 --data.max-documents 5"),
    "pyarrow": ("data", "prepare --data.source records.parquet"),
    "zstandard": ("data", "prepare --data.source records.jsonl.zst"),
    "sentencepiece": ("data", "prepare --data.source corpus.txt --data.tokenizer pieces.model"),
    "transformers": ("data", "prepare --data.source corpus.txt --data.tokenizer t5-base"),
    "matplotlib": ("plot", "cost tiny --plot picture"),
    "scipy": ("compare", "compare smoke"),
    "peft": ("hf", "train --data.source corpus.txt --train.init-from run --train.adapter lora"),
    "tensorboard": ("track", "train --data.source corpus.txt --train.trackers tensorboard"),
    "trackio": ("track", "train --data.source corpus.txt --train.trackers trackio"),
    "wandb": ("track", "train --data.source corpus.txt --train.trackers wandb"),
}
"""Package -> the extra that brings it, and a command that needs it."""


def packages(extra: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {re.split(r"[^\w-]", each)[0] for each in project["optional-dependencies"][extra]}


@pytest.fixture
def _folder(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of every kind to work in; what is in them is not reached."""
    text = corpus.read_text(encoding="utf-8")
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    for name in ("records.parquet", "records.jsonl.zst", "pieces.model"):
        (tmp_path / name).write_bytes(b"not reached")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("package", USES)
def test_a_missing_package_is_named_with_its_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extra, line = USES[package]
    assert package in packages(extra)
    hidden = [name for name in sys.modules if name.split(".")[0] == package]
    for name in {package, *hidden}:
        monkeypatch.setitem(sys.modules, name, None)  # its import fails
    with pytest.raises(SystemExit) as end:
        main(line.split())
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    (message,) = re.findall(r"^crnet: (.*)$", said, re.M)
    assert package in message
    assert f"pip install 'crnet[{extra}]'" in message


def test_every_package_of_the_extra_data_is_tried() -> None:
    assert packages("data") - set(USES) == {
        "protobuf"
    }  # transformers reads some tokenizers with it
