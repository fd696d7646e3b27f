"""Methods from the folder of a seam, from files and from installed packages."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from crnet import registry
from crnet.errors import ConfigError
from crnet.registry import Plugin, discover, find, load_plugins, plugin_methods, plugins

CONTRACT = """
class Seam:
    def __init__(self, name):
        self.name = name
"""
PLUGIN = """
from {package} import Seam
METHODS = [Seam({name!r})]
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry that knows no plugin, and no trace of this test's in the next."""
    modules = set(sys.modules)
    monkeypatch.setattr(registry, "_loaded", {})
    discover.cache_clear()
    registry._load_entry_points.cache_clear()
    yield
    discover.cache_clear()
    registry._load_entry_points.cache_clear()
    for name in set(sys.modules) - modules:
        if name.startswith(("toy_", "crnet_plugin_")):
            del sys.modules[name]


@pytest.fixture
def seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package whose contract is ``Seam``, with one method, plain."""
    folder = tmp_path / "toy_seam"
    folder.mkdir()
    (folder / "__init__.py").write_text(CONTRACT)
    (folder / "plain.py").write_text(PLUGIN.format(package="toy_seam", name="plain"))
    (folder / "_shared.py").write_text("raise AssertionError('a shared part is no method')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "toy_seam"


def base(seam: str) -> type:
    return sys.modules[seam].Seam


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_a_folder_is_known_but_for_its_shared_parts(seam: str) -> None:
    assert list(discover(seam)) == ["plain"]
    assert find(seam, "plain").name == "plain"
    with pytest.raises(ValueError, match="toy_seam has no 'plane'; known: plain"):
        find(seam, "plane")


def test_a_file_adds_its_methods_to_the_seam_that_they_derive_from(
    seam: str, tmp_path: Path
) -> None:
    content = PLUGIN.format(package=seam, name="mine") + (
        "class Other: name = 'of another seam'\nMETHODS += [Other(), Seam('second')]\n"
    )
    path = text(tmp_path / "my_methods.py", content)
    load_plugins([path])
    assert list(discover(seam, base(seam))) == ["plain", "mine", "second"]
    assert find(seam, "mine", base(seam)) is plugin_methods(path)[0]
    assert list(discover(seam)) == ["plain"]
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert plugins() == (Plugin("crnet_plugin_my_methods", path, digest),)
    assert plugin_methods(path) == sys.modules["crnet_plugin_my_methods"].METHODS


def test_a_file_that_comes_after_an_answer_is_in_the_next(seam: str, tmp_path: Path) -> None:
    discover(seam)
    assert list(discover(seam, base(seam))) == ["plain"]
    load_plugins([text(tmp_path / "a.py", PLUGIN.format(package=seam, name="late"))])
    assert list(discover(seam, base(seam))) == ["plain", "late"]


def test_a_file_is_executed_once(
    seam: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = text(tmp_path / "a.py", PLUGIN.format(package=seam, name="mine"))
    monkeypatch.chdir(tmp_path)
    load_plugins([path, Path("a.py")])
    first = plugin_methods(path)
    load_plugins([path])
    assert plugin_methods(path) is first
    assert len(plugins()) == 1


def test_a_dataclass_of_a_file_knows_its_module(tmp_path: Path) -> None:
    """Its annotations are what the file says: those of strings only where it asks for them."""
    content = (
        "import dataclasses, typing\n@dataclasses.dataclass\nclass Options:\n    rank: int = 3\n"
        "class M:\n    name = 'm'\n    hints = typing.get_type_hints(Options)\n"
        "    rank = Options.__dataclass_fields__['rank'].type\nMETHODS = [M()]\n"
    )
    path = text(tmp_path / "a.py", content)
    load_plugins([path])
    (method,) = plugin_methods(path)
    assert (method.hints, method.rank) == ({"rank": int}, int)


@pytest.mark.parametrize("name", ["plain", "mine"])
def test_a_name_that_is_taken_is_an_error_that_names_both(
    seam: str, tmp_path: Path, name: str
) -> None:
    files = [
        text(tmp_path / f"{stem}.py", PLUGIN.format(package=seam, name=it))
        for stem, it in (("a", "mine"), ("b", name))
    ]
    load_plugins(files)
    with pytest.raises(ConfigError) as caught:
        discover(seam, base(seam))
    (problem,) = caught.value.problems
    first = "toy_seam.plain" if name == "plain" else str(files[0])
    assert problem == (
        f"toy_seam has two methods named {name!r}: of {first} and of {files[1]}; rename one"
    )


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    # kind: (the file, what the message says)
    "missing": (lambda at: at / "none.py", "cannot be read (No such file or directory); check"),
    "a folder": (lambda at: text(at / "a.py" / "x", "").parent, "cannot be read (Is a directory)"),
    "another ending": (lambda at: text(at / "a.txt", ""), "is no Python file; name one that ends"),
    "no Python": (lambda at: text(at / "a.py", "METHODS = [\n"), "is not valid Python ("),
    "an exception": (
        lambda at: text(at / "a.py", "1 / 0"),
        "fails when it is loaded (ZeroDivisionError: division by zero); mend it there",
    ),
    "an exit": (lambda at: text(at / "a.py", "raise SystemExit(0)"), "(SystemExit: 0); mend"),
    "a missing import": (
        lambda at: text(at / "a.py", "import no_such_module"),
        "(ModuleNotFoundError: No module named 'no_such_module')",
    ),
    "no METHODS": (lambda at: text(at / "a.py", ""), "has no METHODS; list its methods"),
    "empty METHODS": (lambda at: text(at / "a.py", "METHODS = []"), "METHODS is empty; list its"),
    "METHODS that is no list": (
        lambda at: text(at / "a.py", "METHODS = 3"),
        "is 3; make it a list",
    ),
    "a class": (
        lambda at: text(at / "a.py", "class M: name = 'm'\nMETHODS = [M]"),
        "METHODS holds the class M; list an instance, M()",
    ),
    "no name": (lambda at: text(at / "a.py", "METHODS = [3]"), "3 in METHODS has no name"),
    "a question for the methods": (
        lambda at: text(at / "a.py", "import crnet.registry as r\nr.discover('crnet.linears')"),
        "asks for the methods of crnet.linears, while its own are not yet known; import it inside",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    make, says = BAD[kind]
    path = make(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_plugins([path])
    (problem,) = caught.value.problems
    assert problem.startswith(f"--plugins {path}: ")
    assert says in problem
    assert plugins() == ()
    assert "crnet_plugin_a" not in sys.modules


def test_two_files_of_one_stem(tmp_path: Path) -> None:
    content = "class M: name = 'm'\nMETHODS = [M()]"
    first, second = (text(tmp_path / folder / "a.py", content) for folder in "xy")
    with pytest.raises(ConfigError, match="is loaded as crnet_plugin_a already; rename one"):
        load_plugins([first, second])
    first.write_text(content + "\n")
    with pytest.raises(ConfigError, match="has changed since it was loaded; start anew"):
        load_plugins([first])


def installed(folder: Path, package: str, value: str) -> None:
    """What an installer leaves of a package with one plugin."""
    info = folder / f"{package}-1.0.dist-info"
    text(info / "METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    text(info / "entry_points.txt", f"[crnet.plugins]\nmore = {value}\n")


def test_an_installed_package_is_asked_with_the_first_question(
    seam: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    entry_points = metadata.entry_points
    monkeypatch.setattr(
        metadata, "entry_points", lambda **which: asked.append(which) or entry_points(**which)
    )
    installed(tmp_path, "toy_package", "toy_package.methods")
    text(tmp_path / "toy_package" / "__init__.py", "")
    content = PLUGIN.format(package=seam, name="theirs")
    path = text(tmp_path / "toy_package" / "methods.py", content)
    discover(seam)
    assert asked == []
    mine = text(tmp_path / "a.py", PLUGIN.format(package=seam, name="mine"))
    load_plugins([mine])
    for _ in range(2):
        assert list(discover(seam, base(seam))) == ["plain", "mine", "theirs"]
    assert asked == [{"group": "crnet.plugins"}]
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert plugins()[1:] == (Plugin("toy_package.methods", path, digest),)


@pytest.mark.parametrize(
    ("value", "content", "says"),
    [
        ("toy_package", "", "has no METHODS"),
        ("toy_package", "1 / 0", "fails when it is loaded (ZeroDivisionError: division by zero)"),
        ("toy_package:METHODS", "METHODS = [3]", "is no module; name one in its entry point"),
        ("toy_nowhere", "", "(ModuleNotFoundError: No module named 'toy_nowhere')"),
    ],
)
def test_an_installed_package_that_cannot_be_used(
    seam: str, tmp_path: Path, value: str, content: str, says: str
) -> None:
    installed(tmp_path, "toy_package", value)
    text(tmp_path / "toy_package.py", content)
    discover(seam)
    with pytest.raises(ConfigError) as caught:
        discover(seam, base(seam))
    (problem,) = caught.value.problems
    assert problem.startswith(f"the plugin more ({value}) of toy_package: ")
    assert says in problem
