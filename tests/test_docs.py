"""The pages: every link and anchor leads somewhere, every page is in the index, the site builds."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from crnet.compare import study
from crnet.config.presets import PRESETS
from crnet.config.serialize import override
from crnet.cost.parameters import num_parameters
from crnet.cost.workload import workload
from test_hardware_document import DOCUMENT as HARDWARE
from test_hardware_document import memory_gib, work_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def prose(page: Path) -> str:
    """Without blocks of code and what stands between backticks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"^ {4}.*$", "", text, flags=re.M)


def anchors(page: Path) -> set[str]:
    """Those of the headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    lost = []
    for link in links(page):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_a_lost_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `thing`: two\n\n[a](b.md) [c](#one-thing-two) `[no](x.md)`\n", encoding="utf-8"
    )
    assert links(page) == ["b.md", "#one-thing-two"]
    assert anchors(page) == {"one-thing-two"}


def test_every_page_is_in_the_index() -> None:
    named = [link for link in links(DOCS / "index.md") if link.endswith(".md")]
    listed = set(named)
    assert len(named) == len(listed), "a page is in it twice"
    pages = {page.name for page in DOCS.glob("*.md")} - {"index.md"}
    assert sorted(pages - listed) == [], "add it to docs/index.md"


def test_pages_of_methods_are_what_the_code_says() -> None:
    written = runpy.run_path(str(DOCS / "method_pages.py"))
    there = {each.relative_to(DOCS) for each in DOCS.glob("methods/*.md")} | {Path("methods.md")}
    meant = dict(written["pages"]())
    assert set(meant) == there, "run docs/method_pages.py"
    stale = [path for path, text in meant.items() if (DOCS / path).read_text("utf-8") != text]
    assert stale == [], "run docs/method_pages.py"


def test_every_method_says_where_it_is_from() -> None:
    """Its page names a source, or says that there is none."""
    said = re.compile(r"\*\*Source\*\*|arXiv:\d|\(\w+ et al\. \d{4}\)|torch's own")
    told = {page.name: page.read_text(encoding="utf-8") for page in DOCS.glob("methods/*.md")}
    silent = [name for name, text in told.items() if not said.search(text)]
    assert silent == []


def test_every_extra_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = re.findall(r"^\| `([\w-]+)` \|", (DOCS / "start.md").read_text(encoding="utf-8"), re.M)
    assert set(table) == set(project["optional-dependencies"])


def test_the_study_of_the_page_on_comparing_can_be_run() -> None:
    text = (DOCS / "compare.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```toml\n(.*?)^```", text, re.M | re.S)
    assert set(study.parse("mine", block).rows) == {"full", "crnet", "lowrank"}
    shown = re.search(r"^    title = .*?\n\n(?=A row)", study.__doc__ or "", re.M | re.S)
    assert shown
    assert study.parse("docstring", textwrap.dedent(shown[0])).compat


def test_cards_of_the_page_on_hardware() -> None:
    """What each card is said to be enough for, and not enough for the next size."""
    text = HARDWARE.read_text(encoding="utf-8")
    for card, told in (("8 GiB", "350M"), ("24 GiB", "1B"), ("80 GB", "7B")):
        assert re.search(rf"^- \*\*{card}\*\*.*: up to {told}\b", text, re.M)

    def at(preset: str, **train) -> float:
        return memory_gib(work_of(preset, "crnet", **train), "replay")

    assert at("llama-350m", micro_batch_size=1) < 8 < at("llama-1b", micro_batch_size=1)
    assert at("llama-1b") < 24 < at("llama-7b", micro_batch_size=1)
    assert at("llama-7b") < 74 < at("llama-13b", micro_batch_size=1)
    assert at("llama-13b", precision="bf16", bf16_update="stochastic") < 74


def test_parameters_of_the_page_on_mathematics() -> None:
    text = (DOCS / "mathematics.md").read_text(encoding="utf-8")
    row = "| parameters of a block | `4 h h + 3 h f` | `11 h r + 3 f r` | `11 h r + 3 f r + 7` |"
    assert row in text
    config = override(PRESETS["llama-350m"][1], model={"rank": "64"})
    h, f, r = config.model.hidden_size, config.model.intermediate_size, 64
    dense, low = 4 * h * h + 3 * h * f, 11 * h * r + 3 * f * r
    blocks = config.model.num_layers
    expected = {"full": blocks * dense, "lowrank": blocks * low}
    expected["crnet"] = dense + (blocks - 1) * (low + 7)
    for linear, number in expected.items():
        counts = num_parameters(workload(override(config, model={"linear": linear})).spec)
        outside = counts["embedding"] + counts["head"] + counts["norms"]
        assert counts["total"] - outside == number, linear


class Targets(HTMLParser):
    """Where a page's links lead, and which anchors it has."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if target := values.get("href" if tag in ("a", "link") else "src"):
            self.links.append(target)
        if name := values.get("id"):
            self.anchors.add(name)


def read(page: Path) -> Targets:
    found = Targets()
    found.feed(page.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    """Every link inside it leads to a file and an anchor; nothing is loaded from elsewhere."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="the site needs the extra docs")
    site = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-c",
        "docs",
        ".",
        str(site),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {page.resolve(): read(page) for page in site.rglob("*.html")}
    assert {f"{page.stem}.html" for page in DOCS.glob("*.md")} <= {page.name for page in pages}
    lost = []
    for page, found in pages.items():
        for link in found.links:
            path, _, anchor = link.partition("#")
            path = path.partition("?")[0]
            if re.match(r"(https?:|data:|mailto:)", link):
                continue
            target = (page.parent / path).resolve() if path else page
            known = pages.get(target)
            if not target.exists() or (anchor and known and anchor not in known.anchors):
                lost.append((page.name, link))
    assert lost == []
    loaded = re.compile(r"<(?:script|img|link)[^>]*(?:src|href)=\"https?:")
    assert [page.name for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []
