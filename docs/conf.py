"""The pages as a site: ``make docs``, or ``sphinx-build -c docs . site``.

The pages are plain Markdown and read well without it. The source folder is the repository, so that
a link to README.md, to a program or to a file of figures leads somewhere in the site too. The order
of the pages is that of the lists in index.md: nothing is listed a second time.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import crnet

project = "crnet"
copyright = "the crnet contributors"
version = release = crnet.__version__
extensions = ["myst_parser"]
myst_heading_anchors = 4
root_doc = "docs/index"
include_patterns = ["docs/*.md", "docs/methods/*.md", "*.md"]
exclude_patterns = [".*", "AGENTS.md", "src", "tests", "benchmarks", "runs", "site", "examples"]
html_theme = "furo"
html_title = f"crnet {release}"
html_static_path: list[str] = []
html_copy_source = False
highlight_language = "none"
suppress_warnings = ["myst.header"]  # LOG.md and others begin below the first level
nitpicky = True


def listed(text: str) -> list[str]:
    """Pages that the lists of index.md lead to, in their order, from the source folder."""
    targets = re.findall(r"^- \[[^\]]+\]\(([\w./]+)\.md\)", text, re.M)
    return [os.path.normpath(f"docs/{each}") for each in targets]


def add_order(app: Any, name: str, source: list[str]) -> None:
    """Behind index.md comes the order that its lists say, behind methods.md that of its tables."""
    pages = {root_doc: ["README", *listed(source[0])]} if name == root_doc else {}
    if name == "docs/methods":
        pages[name] = [f"docs/{it}" for it in re.findall(r"\((methods/[\w-]+)\.md\)", source[0])]
    if name in pages:
        order = "\n".join(f"/{page}" for page in pages[name])
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{order}\n```\n"


def setup(app: Any) -> None:
    app.connect("source-read", add_order)
    if not Path(app.srcdir, "docs", "index.md").exists():
        raise SystemExit("build from the repository: sphinx-build -c docs . site")
