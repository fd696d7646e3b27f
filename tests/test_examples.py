"""Job files under examples/ are well formed and could start; the notebook runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from crnet.cli.app import build_app
from crnet.cli.layering import Sections
from crnet.config.check import check
from crnet.config.sections import num_processes

EXAMPLES = Path(__file__).parents[1] / "examples"


def assert_could_start(words: list[str], processes: int) -> None:
    """The words of ``crnet`` parse, fit together, and ask for as many processes as there are."""
    from crnet.cli import app as command_line

    app = command_line.app_for(words) if hasattr(command_line, "app_for") else build_app()
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    settings = bound.arguments["settings"]
    assert isinstance(settings, Sections)
    config = settings.of(words[1])
    check(config)
    assert num_processes(config.parallel) == processes


def test_slurm() -> None:
    path = EXAMPLES / "slurm.sh"
    if bash := shutil.which("bash"):
        subprocess.run([bash, "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if "crnet train" in line]
    assert len(lines) == 1
    words = shlex.split(lines[0].rstrip("& "))
    assert_could_start(words[words.index("crnet") + 1 :], processes=64)
    asked = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in text.splitlines()
        if line.startswith("#SBATCH") and "=" in line
    )
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == 64
    assert f"--nproc-per-node={asked['gpus-per-node']}" in words


def test_kubernetes() -> None:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((EXAMPLES / "pytorchjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    processes = worker["replicas"] * int(job["spec"]["nprocPerNode"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert worker["replicas"] * gpus == processes
    words = container["command"]
    assert all(isinstance(word, str) for word in words)
    assert_could_start(words[words.index("crnet") + 1 :], processes)
    volumes = {each["name"] for each in worker["template"]["spec"]["volumes"]}
    assert {each["name"] for each in container["volumeMounts"]} == volumes


@pytest.mark.slow
def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells run one after the other, and show what they say; none keeps an old output."""
    notebook = json.loads((EXAMPLES / "first.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in cells] == [[]] * len(cells)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    for result in names["results"].values():
        assert result.after.loss < result.before.loss
    assert len(names["betas"]) == 7 * 3
    assert any(beta != 1 for beta in names["betas"].values())
    assert len(names["axes"].lines) == 2
    names["plt"].close("all")


def test_links_of_the_notebook_lead_somewhere() -> None:
    notebook = json.loads((EXAMPLES / "first.ipynb").read_text(encoding="utf-8"))
    text = "".join(line for cell in notebook["cells"] for line in cell["source"])
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) >= 3
    assert [each for each in targets if not (EXAMPLES / each).exists()] == []
