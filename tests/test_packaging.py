"""What is handed out: wheel, source archive, completion, and the files that describe them."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import crnet
from crnet.cli.app import COMMANDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive."""
    pytest.importorskip("hatchling", reason="building needs hatchling")
    out = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-d", out, cwd=ROOT)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment where the wheel is installed; what it depends on is
    this environment's."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home)
    (packages,) = home.glob("lib/python*/site-packages")
    others = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (packages / "others.pth").write_text("\n".join(others), encoding="utf-8")
    (wheel,) = built.glob("*.whl")
    words = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel]
    run(sys.executable, "-m", "pip", "--python", home / "bin" / "python", *words)
    return home / "bin"


def clean() -> dict[str, str]:
    """The environment without what leads to this checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    described = f"crnet-{crnet.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"crnet", described}
    assert "crnet/py.typed" in names
    source = ROOT / "src" / "crnet"
    files = [path for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {f"crnet/{path.relative_to(source).as_posix()}" for path in files} <= set(names)
    told = zipfile.ZipFile(wheel).read(f"{described}/METADATA").decode()
    extras = set(re.findall(r"^Provides-Extra: (.*)$", told, re.M))
    assert extras == set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.slow
def test_the_installed_wheel_runs(installed: Path, tmp_path: Path) -> None:
    program = installed / "crnet"
    assert run(program, "--version", env=clean(), cwd=tmp_path).strip() == crnet.__version__
    assert "--model.hidden-size" in run(program, "train", "--help", env=clean(), cwd=tmp_path)
    where = "import crnet, crnet.model.build; print(crnet.__file__)"
    found = run(installed / "python", "-c", where, env=clean(), cwd=tmp_path).strip()
    assert Path(found).is_relative_to(installed.parent)
    assert "bf16-mixed" in run(program, "cost", "llama-1b", "--device", "h100", env=clean())


@pytest.mark.slow
def test_the_source_archive_holds_what_its_tests_need(built: Path, tmp_path: Path) -> None:
    """It is every file that git tracks, and the tests that read the repository's files pass."""
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    if (ROOT / ".git").exists() and shutil.which("git"):
        tracked = run("git", "ls-files", cwd=ROOT).splitlines()
        assert len(tracked) > 300
        assert [each for each in tracked if not (folder / each).exists()] == []
    environment = clean() | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    readers = [f"tests/test_{name}.py" for name in ("examples", "readme")]
    words = ["-m", "pytest", "-p", "no:cacheprovider", *readers]
    assert "passed" in run(sys.executable, *words, cwd=folder, env=environment)


@pytest.fixture(scope="module")
def completion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``crnet --install-completion`` writes into a home."""
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"HOME": str(home)}
    words = ["-m", "crnet", "--install-completion", "--shell", "bash"]
    assert "crnet" in run(sys.executable, *words, env=environment)
    return home / ".local" / "share" / "bash-completion" / "completions" / "crnet"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (("crnet", "ev"), {"evaluate"}),
        (("crnet", "train", "--model.hid"), {"--model.hidden-size"}),
        (("crnet", "train", "--model.crnet.init", ""), {"balanced", "zero-b", "spectral"}),
        (("crnet", ""), set(COMMANDS)),
    ],
)
def test_words_are_completed(completion: Path, words: tuple[str, ...], completed: set[str]) -> None:
    typed = " ".join(f"'{word}'" for word in words)
    script = (
        f"source {completion}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _crnet; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    found = set(run("bash", "-c", script).split())
    assert completed <= found
    assert len(words[-1]) == 0 or found == completed


def test_completion_is_documented() -> None:
    assert "crnet --install-completion" in (ROOT / "docs" / "start.md").read_text(encoding="utf-8")


def test_every_pin_is_one() -> None:
    """A version for each, each once, in the order of the names."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    names = [re.sub(r"[-_.]+", "-", line.partition("==")[0].lower()) for line in lines]
    assert len(names) == len(set(names))
    project = PROJECT["project"]
    wanted = project["dependencies"].copy()
    wanted += [each for extra in project["optional-dependencies"].values() for each in extra]
    needed = {re.split(r"[^\w-]", each)[0].lower().replace("_", "-") for each in wanted}
    assert needed - set(names) <= {"crnet", "triton"}  # triton comes with a GPU's torch


def test_citation() -> None:
    """The fields that the format asks for, of this version, and the paper's."""
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(told)
    assert told["cff-version"] == "1.2.0"
    project = PROJECT["project"]
    assert (told["title"], told["version"]) == (project["name"], crnet.__version__)
    assert (told["license"], project["version"]) == (project["license"], crnet.__version__)
    paper = told["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    assert "arXiv:2509.18993" in paper["identifiers"][0]["value"]
    page = (ROOT / "docs" / "cite.md").read_text(encoding="utf-8")
    people = [f"{each['family-names']}, {each['given-names']}" for each in paper["authors"]]
    assert " and ".join(people) in page


def test_llms_txt() -> None:
    """A heading, a summary, lists of links; every page is among them."""
    text = (ROOT / "llms.txt").read_text(encoding="utf-8")
    assert re.match(r"# crnet\n\n> \S", text)
    targets = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): \S", text, re.M)
    assert [each for each in targets if not (ROOT / each).exists()] == []
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} - {"docs/index.md"}
    assert sorted(pages - set(targets)) == [], "add it to llms.txt"
