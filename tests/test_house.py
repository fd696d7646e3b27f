"""The house itself: layers, cycles, lengths, the map from the paper, the README's commands."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from crnet.cli.commands import app

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "crnet"

# A module may import from its own layer's entries to the left of it and from lower layers only.
LAYERS = [
    ["registry", "errors"],
    ["kernels"],
    ["config", "linears", "optimizers"],
    ["cost", "paper"],
    ["recompute"],
    ["model"],
    ["data"],
    ["storage", "inference", "report", "measure"],
    ["train"],
    ["compare"],
    ["cli"],
    ["__main__"],
]


def layer(module: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if module in names)


def top_level_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports when it is imported (not inside functions)."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("crnet"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("crnet.")}
    return found - {"__version__"}


def modules() -> list[tuple[str, Path]]:
    return [
        (path.relative_to(SOURCE).parts[0].removesuffix(".py"), path)
        for path in sorted(SOURCE.rglob("*.py"))
        if path != SOURCE / "__init__.py"
    ]


def test_every_module_has_a_layer():
    assert {name for name, _ in modules()} == {name for names in LAYERS for name in names}


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: str(value))
def test_imports_go_downwards(name, path):
    for imported in top_level_imports(path) - {name}:
        if name in ("inference", "measure") and imported == "cost":
            continue
        assert layer(imported) <= layer(name), f"{path.name} imports {imported}"


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: str(value))
def test_files_are_short(name, path):
    assert len(path.read_text().splitlines()) <= 720, "split it, or say in its header why not"


def test_nothing_above_the_seams_names_a_method():
    methods = re.compile(r"""==\s*["'](crnet|lowrank|full|adamw)["']""")
    for name, path in modules():
        if name not in ("linears", "optimizers"):
            assert not methods.search(path.read_text()), path


def test_names_of_the_paper_map_exist():
    rows = re.findall(
        r"^\|.*\| `([\w]+)` \| `(src/[\w/.]+)` \|$", (ROOT / "docs/paper_map.md").read_text(), re.M
    )
    assert len(rows) >= 20
    for word, path in rows:
        assert re.search(rf"\b{word}\b", (ROOT / path).read_text()), (word, path)


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_links_of_the_documents_lead_somewhere():
    for document in documents():
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    return re.findall(r"^    (crnet [^\n#]+?)\s*(?:#.*)?$", text, re.M)


def test_the_readme_shows_commands():
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_readme_parse(command):
    """Every flag exists and every value has the right type; nothing is run."""
    words = shlex.split(command)[1:]
    function, _, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    assert function is app[words[0]].default_command


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make ([a-z-]+)", (ROOT / "README.md").read_text(), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "crnet", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == __import__("crnet").__version__
