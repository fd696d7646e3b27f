"""The job files under examples/ are well formed, and the runs in them could start."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

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
