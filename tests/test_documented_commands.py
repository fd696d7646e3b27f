"""Every command that a document or the Makefile names is run, in a short form.

The lines are taken from the documents, none is listed here. What is listed is how a command is made
short: flags that replace the documented ones, by command or for one line. A line of a kind that is
not known here fails, so that a new one gets its short form.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from crnet.cli.app import COMMANDS, build_app
from test_programs import PROGRAMS

ROOT = Path(__file__).parents[1]
FIRST = ("README.md", "CONTRIBUTING.md", "AGENTS.md")
DOCUMENTS = [*(ROOT / name for name in FIRST), *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

Changes = dict[str, str | None]
"""Flag -> its value in the short form; None: left out."""

SHAPE: Changes = {
    "--model.hidden-size": "32",
    "--model.intermediate-size": "48",
    "--model.num-layers": "3",
    "--model.num-heads": "2",
    "--model.rank": "8",
}
DATA: Changes = {
    "--data.source": "corpus.txt",
    "--data.documents": "paragraph",
    "--data.vocab-size": "300",
    "--data.sequence-length": "16",
    "--data.validation-tokens": "64",
}
STEPS: Changes = {
    "--train.steps": "2",
    "--train.batch-size": "4",
    "--train.micro-batch-size": "2",
    "--train.threads": "1",
    "--train.device": "cpu",
}
SHORT: dict[str, Changes] = {
    "train": SHAPE | DATA | STEPS,
    "finetune": {"--data.source": "books/*.txt", "--data.documents": "paragraph"}
    | {"--train.epochs": "1", "--train.batch-size": "64", "--train.eval-every-steps": "0"},
    "profile": SHAPE | STEPS | {"--rounds": "1"},
    "prepare": {"--data.vocab-size": "300"},
    "evaluate": {},
    "generate": {"--max-tokens": "4"},
    "observe": {},
    "consolidate": {},
    "export": {},
    "report": {},
    "watch": {},
    "list": {},
    "cost": {},
    "plan": {},
    "timeline": {},
    "paper": {},
    "protocol": {},
    "check-plugin": {},
    "sweep": SHAPE | DATA | STEPS | {"--train.steps": "8"},
    "compare": {"--dry-run": ""},
    "demo": {"--quick": "", "--steps": "2", "--out": "demo"},
}
"""By command. What costs nothing is run as it stands."""
RESUMED: Changes = {"--train.steps": "3"}
ONE_LINE: dict[str, Changes] = {
    "crnet train paper/llama-60m": {"--data.tokenizer": "train"},
    # A corpus from the network; and ranks that fit their shape.
    "crnet train llama-130m --model.rank 192x3,224x8": {
        "--data.subset": None,
        "--data.tokenizer": None,
        "--data.max-documents": "100",
        "--model.rank": "12x3,16x8",
        "--model.num-layers": "12",
    },
    "crnet compare mine.toml --out mine --report": {"--dry-run": "", "--report": None},
    "crnet train --data.source 'books/*.txt'": {"--data.source": "books/*.txt"},
    # Conversations, of which a row of 16 tokens would hold no answer.
    "crnet finetune run --data.source talks.jsonl": {
        "--data.source": "talks.jsonl",
        "--data.documents": None,
        "--data.sequence-length": "96",
    },
}
"""Beginning of a line -> what else is changed."""
NOT_RUN = {
    "pip install -c constraints.txt '.[plot]'": "takes packages from the network; make does too",
    "pip install 'crnet[eval]'": "takes a package from the network",
    "pip install -c constraints.txt '.[plot,data]'": "takes packages from the network",
    "pip install triton": "takes a package from the network",
    "pip install 'crnet[hf]'": "takes packages from the network",
    "pip install 'crnet[serve]'": "takes packages from the network",
    "make clean": "removes the environment that runs the tests",
    "make golden": "writes the golden losses anew; tests/test_golden.py runs what it calls",
    "make check": "is lint, types and test",
}
MAKE = {
    "help": [],
    "demo": ["DEMO=--quick --steps 2 --out {tmp}/demo"],
    "test": ["PYTEST=--collect-only tests/test_house.py"],
    "test-slow": ["PYTEST=--collect-only tests/test_programs.py"],
    "test-hostile": ["PYTEST=--collect-only"],
    "test-gpu": ["PYTEST=--collect-only"],
    "faults": ["FAULTS=--help"],
    "lint": [],
    "types": [],
    "docs": ["SITE={tmp}/site"],
    "bench": ["BENCH=--quick"],
}
"""Target -> variables that make it short."""


def lines_of(document: Path) -> list[str]:
    """The commands of a document in their order: lines of indented and fenced blocks, and what
    stands between backticks and says more than a command's name."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.M | re.S)
    text = fenced.sub(lambda found: re.sub("^", "    ", found[1], flags=re.M), text)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    pattern = re.compile(
        r"^    (?:\$ )?((?:crnet|make|pip|python3?|\./?[\w./]+) [^\n]*)$"
        r"|`((?:crnet|make|pip|python3?) [^`\n]+)`",
        re.M,
    )
    found = [first or second for first, second in pattern.findall(text)]
    return [" ".join(re.sub(r"\s#.*", "", line).split()) for line in found]


def words_of(line: str) -> list[str]:
    """The short form of a ``crnet`` line, without ``crnet``."""
    words = shlex.split(line)[1:]
    if "--help" in words:
        return words
    changes = dict(SHORT[words[0]])
    if words[0] == "train" and "--resume" in words:
        changes = dict(RESUMED)
    for beginning, more in ONE_LINE.items():
        if line.startswith(beginning):
            changes |= more
    return changed(words, changes)


def changed(words: list[str], changes: Changes) -> list[str]:
    """The words with other values behind some flags, and more flags at their end."""
    kept: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word not in changes:
            kept.append(word)
            continue
        if left and not left[0].startswith("--"):
            left.pop(0)
    more = {flag: value for flag, value in changes.items() if value is not None}
    return [*kept, *(word for pair in more.items() for word in pair if word)]


def is_known(line: str) -> bool:
    words = shlex.split(line)
    if line in NOT_RUN or (words[0] == "make" and words[1] in MAKE):
        return True
    if words[0] == "crnet":
        return words[1] in {*SHORT, "--version"}
    return words[0].startswith("python") and any(
        str(it.relative_to(ROOT)) in line for it in PROGRAMS
    )


def test_lines_are_found() -> None:
    readme = lines_of(ROOT / "README.md")
    assert "crnet train --resume --out run" in readme
    assert any(line.endswith("--train.precision bf16-mixed") for line in readme)  # two lines in one
    assert "pip install -c constraints.txt '.[plot]'" in readme
    assert sum(len(lines_of(document)) for document in DOCUMENTS) > 30


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_line_has_a_short_form(document: Path) -> None:
    assert [line for line in lines_of(document) if not is_known(line)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_line_is_understood(document: Path) -> None:
    """Its flags exist and have values, also where a sentence names it: told without running it."""
    for line in dict.fromkeys(lines_of(document)):
        program, command, *words = shlex.split(line)
        if program != "crnet" or command not in SHORT or not words:
            continue
        if {"--help", "--plugins"} & set(words):
            continue  # a plugin brings flags of its own
        try:
            build_app(command).parse_args([command, *words], exit_on_error=False, print_error=False)
        except CycloptsError as error:
            pytest.fail(f"{line}: {error}")


def test_every_command_has_a_short_form() -> None:
    assert set(SHORT) == set(COMMANDS)


def test_every_short_form_is_of_a_line() -> None:
    every = [line for document in DOCUMENTS for line in lines_of(document)]
    assert [it for it in ONE_LINE if not any(line.startswith(it) for line in every)] == []
    documented = [it for it in NOT_RUN if not it.startswith("make")]
    assert [it for it in documented if it not in every] == []


def test_every_target_is_known() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    targets = re.findall(r"^([a-z-]+):", MAKEFILE, re.M)
    assert set(phony.split()) == set(targets)
    left_out = {name.split()[1] for name in NOT_RUN if name.startswith("make ")}
    assert set(MAKE) | left_out == set(targets)
    ci = re.findall(r"^make ([a-z- ]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
    assert ci
    assert {word for line in ci for word in line.split()} <= set(targets)


def run(command: list[str], folder: Path, timeout: int = 600) -> str | None:
    """What went wrong, if anything did."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode == 0:
        return None
    return f"{shlex.join(command)}\n  exit code {done.returncode}: {done.stderr[-1500:]}"


@pytest.fixture
def folder(tmp_path: Path, corpus: Path) -> Path:
    """What the documents take for granted: corpora, files of settings, the page's own method."""
    zstandard = pytest.importorskip("zstandard")
    text = corpus.read_text(encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "books").mkdir()
    for name in ("corpus.txt", "books/one.txt", "books/two.txt", "held-out.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    records = "".join(f'{{"text": "Record {number} of a corpus."}}\n' for number in range(500))
    (tmp_path / "corpus.jsonl.zst").write_bytes(zstandard.compress(records.encode()))
    talks = "".join(f'{{"prompt": "Is {i} a number?", "completion": "Yes."}}\n' for i in range(300))
    (tmp_path / "talks.jsonl").write_text(talks, encoding="utf-8")
    blocks = code_blocks(ROOT / "README.md", "yaml")
    (tmp_path / "mine.yaml").write_text(blocks[0], encoding="utf-8")
    (study,) = code_blocks(ROOT / "docs" / "compare.md", "toml")
    (tmp_path / "mine.toml").write_text(study, encoding="utf-8")
    (tmp_path / "tonight.toml").write_text("[train]\nlog_every_steps = 1\n", encoding="utf-8")
    page = code_blocks(ROOT / "docs" / "adding_a_method.md", "python")
    for each in ("examples", "runs/studies"):
        shutil.copytree(ROOT / each, tmp_path / each)
    (tmp_path / "diagonal.py").write_text(page[0], encoding="utf-8")
    return tmp_path


def code_blocks(document: Path, language: str) -> list[str]:
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_a_document_run(document: Path, folder: Path) -> None:
    """In their order, in one folder: what one writes, the next one reads."""
    failed = []
    for line in dict.fromkeys(lines_of(document)):
        words = shlex.split(line)
        if words[0] != "crnet":
            continue  # make's are run below
        if len(words) == 2 and words[1] not in ("train", "list", "demo"):
            continue  # a name in a sentence: the command wants more
        failed.append(run([sys.executable, "-m", "crnet", *words_of(line)], folder))
    assert [each for each in failed if each] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", MAKE)
def test_target_runs(target: str, tmp_path: Path) -> None:
    tools = Path(sys.executable).parent
    words = [each.format(tmp=tmp_path) for each in MAKE[target]]
    stamps = [word for name in ("base", "dev", "docs") for word in ("-o", f".venv/{name}.stamp")]
    command = ["make", *stamps, target, f"BIN={tools}", *words]
    assert run(command, ROOT) is None


def documented_lines(program: Path) -> Iterator[list[str]]:
    """The lines of a program's docstring that start it; optional parts are parts."""
    text = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or ""
    text = re.sub(r"\n +(?=\[)", " ", text)
    for line in re.findall(r"^ +python ((?:benchmarks|runs)/.*)$", text, re.M):
        yield re.sub(r"[\[\]]|\s#.*", "", line).split()


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_flags_of_a_docstring_exist(program: Path) -> None:
    """Its short form is run by test_programs.py; the other lines name no flag that is not there."""
    lines = list(documented_lines(program))
    assert lines
    for path, *words in lines:
        assert (ROOT / path) == program
        part = [word for word in words[:1] if re.fullmatch("[a-z]+", word)]
        command = [sys.executable, str(program), *part, "--help"]
        text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        usage = text.partition("\n\n")[0]
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", usage), (path, flag)
