"""The house itself: layers, cycles, lengths, names, the map from the paper, the commands."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from crnet import architectures, linears, optimizers, schedules, streams

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "crnet"

# From the bottom up. A module imports from lower lines, and from its own room.
LAYERS = [
    ["errors", "markdown", "specs"],
    ["kernels", "registry"],
    ["layers"],
    ["linears", "streams", "optimizers", "schedules", "trackers"],
    ["architectures"],
    ["recompute"],
    ["config"],
    ["model", "storage"],
    ["cost", "adapters"],
    ["paper", "data"],
    ["parallel"],
    ["convert", "inference"],
    ["report", "hub"],
    ["train", "measure", "hf"],
    ["compare"],
    ["api"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SEAMS = (architectures, linears, optimizers, schedules, streams)

# Where a method may be named: its own file, recipes and defaults, studies, the paper's tables.
NAMING = {"config/presets.py", "config/defaults.py", "compare", "paper"}


@cache
def modules() -> dict[str, Path]:
    """Dotted name in the package -> file."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return {name: path for name, path in found.items() if name}


@cache
def imports(path: Path) -> frozenset[str]:
    """Modules of the package that a file imports anywhere, also under TYPE_CHECKING and inside
    functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            base = (node.module or "").split(".")
            if base[0] == "crnet":
                for alias in node.names:
                    whole = ".".join([*base[1:], alias.name])
                    found.add(whole if whole in modules() else ".".join(base[1:]))
        elif isinstance(node, ast.Import):
            found |= {alias.name[6:] for alias in node.names if alias.name.startswith("crnet.")}
    return frozenset(name for name in found if name in modules())


def test_the_library_of_the_command_line_is_that_rooms_alone():
    """cyclopts: what a configuration is must not hang on how its words are read."""
    wrong = [
        name
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(
            each.split(".")[0] == "cyclopts"
            for each in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
        )
        and room(name) != "cli"
    ]
    assert wrong == []


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_layer():
    assert {room(name) for name in modules()} == set(LEVEL)


def test_imports_go_downwards():
    wrong = [
        f"{name} imports {imported}"
        for name, path in modules().items()
        for imported in imports(path)
        if room(imported) != room(name) and LEVEL[room(imported)] >= LEVEL[room(name)]
    ]
    assert wrong == []


def test_no_cycle():
    """Not between modules, wherever an import stands."""
    graph = {name: set(imports(path)) - {name} for name, path in modules().items()}
    # A seam's __init__ discovers its methods by their folder: it imports none of them.
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_method_imports_another():
    for seam in ("linears", "streams", "optimizers", "schedules", "architectures"):
        for name, path in modules().items():
            parts = name.split(".")
            if parts[0] != seam or len(parts) < 2 or parts[1].startswith("_"):
                continue
            others = {
                imported
                for imported in imports(path)
                if imported.startswith(f"{seam}.")
                and imported.split(".")[1] != parts[1]
                and not imported.split(".")[1].startswith("_")
            }
            assert not others, (name, others)


def functions() -> Iterator[tuple[Path, ast.FunctionDef, int]]:
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield path, node, node.end_lineno - node.lineno + 1


def test_files_are_short():
    long = [
        str(path)
        for path in modules().values()
        if len(path.read_text().splitlines()) > 500
        and "Longer than 500 lines" not in (ast.get_docstring(ast.parse(path.read_text())) or "")
    ]
    assert long == [], "split it, or say in its header why it is longer than 500 lines"


def test_functions_are_short():
    long = [f"{path.name}:{node.name} {size}" for path, node, size in functions() if size > 60]
    assert long == []
    assert statistics.median(size for _, _, size in functions()) <= 12


def owner(path: Path) -> str:
    """The method's file or folder that a file belongs to; the file itself elsewhere."""
    parts = path.relative_to(SOURCE).parts
    return "/".join(parts[:2]) if parts[0] in {seam.__name__[6:] for seam in SEAMS} else str(path)


def spellings(name: str) -> set[str]:
    """A method's name as it may stand in code: value-resformer, value_resformer, ValueResformer."""
    words = re.split(r"[-_]", name)
    return {name, "_".join(words), "".join(words), "".join(word.capitalize() for word in words)}


def test_no_method_is_named_outside_its_folder():
    """In no spelling: not as a string, a name or an attribute. Words of the language that are also
    names of methods count as strings alone; the package's own name is no method's."""
    common = {"full", "crnet", "cosine", "lost", "residual", "shared"}
    ambiguous = {"scale", "linear", "constant"}  # also keys and values of others
    homes = {}
    for seam in SEAMS:
        for name in seam.names():
            method = seam.get(name)
            homes[name] = owner(Path(sys.modules[type(method).__module__].__file__ or ""))
    wrong = []
    for path in modules().values():
        inside = path.relative_to(SOURCE).as_posix()
        if inside in NAMING or inside.split("/")[0] in NAMING:
            continue
        tree = ast.parse(path.read_text())
        strings, names = _words(tree)
        for name, home in homes.items():
            if owner(path) == home:
                continue
            found = {each for each in spellings(name) - ambiguous if each in strings}
            if name == "crnet":  # the program's name, in messages and paths
                found = (
                    set()
                    if inside.startswith(
                        (
                            "cli/",
                            "registry",
                            "train/",
                            "storage/",
                            "data/",
                            "hub/",
                            "hf/",
                            "trackers/",
                        )
                    )
                    else found
                )
            if name not in common | ambiguous:
                found |= spellings(name) & names
            wrong += [f"{inside}: {each}" for each in found]
    assert wrong == []


def _words(tree: ast.AST) -> tuple[set[str], set[str]]:
    """String constants that are no docstring, and every identifier."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings, names = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documentation:
                strings.add(node.value)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names |= {node.name, node.asname or ""}
    return strings, names


PHRASES = ("bit the same", "nats a token")
PRONOUNS = {"its", "said", "again", "theirs", "hers"}


def test_no_private_vocabulary():
    """Names and phrases that only their author understood (docs/glossary.md has the field's)."""
    wrong = []
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name | ast.arg):
                name = node.id if isinstance(node, ast.Name) else node.arg
                if name in PRONOUNS:
                    wrong.append(f"{path.name}:{node.lineno} {name}")
        wrong += [f"{path.name}: {each}" for each in PHRASES if each in path.read_text()]
    assert wrong == []


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


def test_contributing_shows_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in set(LEVEL) - {"__main__"}:
        assert re.search(rf"\b{name}\b", text), name


def test_make_targets_of_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text()
    for document in documents():
        for target in re.findall(r"^    make ([a-z-]+)", document.read_text(), re.M):
            assert re.search(rf"^{target}:", makefile, re.M), target


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "crnet", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == __import__("crnet").__version__


@pytest.mark.parametrize("name", ["kernels", "recompute", "linears"])
def test_rooms_say_what_they_are(name: str):
    text = (SOURCE / name / "__init__.py").read_text()
    assert name in ("recompute",) or ast.get_docstring(ast.parse(text))
