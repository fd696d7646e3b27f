"""Numbers: the tests of tests/gpu, each kernel against fp64, waits, recompilations."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from crnet.config.sections import ModelConfig
from crnet.kernels import elementwise, loss, naive
from crnet.kernels.carried import carried_lowrank
from gpu import models
from gpu.adapters import KERNELS, kernels
from gpu.bench import Bench, Entry, first_line
from gpu.models import made
from gpu.training import POLICIES, graphs

ROOT = Path(__file__).parents[2]
TESTS_S = 120


def numerics(bench: Bench) -> Iterator[Entry]:
    """Errors of each kernel; whether a micro-batch waits for the GPU; graphs of equal blocks; and
    every test of tests/gpu."""
    for mode in KERNELS:
        with kernels(mode):
            yield f"errors, {mode} kernels", _errors(bench)
    if bench.is_gpu:
        yield "waits", {name: _waits(bench, train) for name, train in POLICIES.items()}
        yield "graphs of the layout of 130M", _recompilations(bench)
    yield "tests", _tests(bench)


def _errors(bench: Bench) -> dict[str, float]:
    """By kernel: the largest error of values and gradients over their largest item, fp64 being
    right; operands are rounded first."""
    rows, width, rank, out = (32, 16, 4, 24) if bench.tiny else (4096, 1024, 256, 2736)
    vocab_size = 64 if bench.tiny else 32_000
    target = torch.randint(0, vocab_size, (rows,), device=bench.device)
    cos, sin = (bench.randn(rows, 1, 8) for _ in range(2))
    flat = {  # the plain formula's tables have no axis of heads
        torch.float64: (cos[:, 0].double(), sin[:, 0].double()),
    }
    cases: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = {
        "carried_lowrank": (
            carried_lowrank,
            naive.carried_lowrank,
            [
                bench.randn(1, rows, width),
                bench.randn(width, rank) / width**0.5,
                bench.randn(rank, out) / rank**0.5,
                bench.randn(1, rows, out),
                bench.randn(1),
            ],
        ),
        "rms_norm": (
            lambda x, weight: elementwise.rms_norm(x, weight, 1e-6),
            lambda x, weight: naive.rms_norm(x, weight, 1e-6),
            [bench.randn(1, rows, width), bench.randn(width)],
        ),
        "swiglu": (
            elementwise.swiglu,
            naive.swiglu,
            [bench.randn(1, rows, out), bench.randn(1, rows, out)],
        ),
        "rotate": (
            lambda x: elementwise.rotate(x, cos, sin),
            lambda x: naive.rotate(x, *flat[x.dtype]),
            [bench.randn(1, rows, 2, 16)],
        ),
        "linear_cross_entropy": (
            lambda x, weight: loss.linear_cross_entropy(x, weight, target),
            lambda x, weight: naive.linear_cross_entropy(x, weight, target),
            [bench.randn(rows, width), 0.05 * bench.randn(vocab_size, width)],
        ),
    }
    return {name: _error(*case) for name, case in cases.items()}


def _error(fast: Callable[..., Tensor], slow: Callable[..., Tensor], operands: list[Tensor]):
    ours = [each.detach().clone().requires_grad_() for each in operands]
    exact = [each.detach().double().requires_grad_() for each in operands]
    y, wanted = fast(*ours), slow(*exact)
    dy = torch.randn_like(wanted).to(y.dtype)
    y.backward(dy)
    wanted.backward(dy.double())
    pairs = [(y, wanted), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    return max(
        float((a.double() - b).abs().max() / b.abs().max())
        for a, b in pairs
        if a is not None and b is not None
    )


def _waits(bench: Bench, train: dict[str, Any]) -> str:
    """``none``, or where a micro-batch waits for the GPU."""
    size = "tiny" if bench.tiny else "130m"
    _, run = made(bench, size, "crnet", batch_size=2, **train)
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def _recompilations(bench: Bench) -> dict[str, int]:
    """12 blocks of three kinds (no carry; rank 192; rank 224), an evaluation between steps."""
    toy = dataclasses.replace(bench, tiny=True)
    config = models.config_of(toy, "tiny", "crnet")
    layout = ModelConfig(
        hidden_size=32, intermediate_size=48, num_layers=12, num_heads=2, vocab_size=64
    )
    model = dataclasses.replace(layout, rank="8x3,16x8")
    work = models.workload(dataclasses.replace(config, model=model))
    run = models.MicroBatches(toy, work, models.drawn(toy, work))
    run.model.compile_blocks()
    before = graphs()
    for each in (run.forward, run, run, run.forward, run):
        each()
    return {"graphs": graphs() - before, "blocks": 12, "kinds": 3}


def _tests(bench: Bench) -> dict[str, Any]:
    """The tests that need the device (in a dry run a few of those that run on a CPU)."""
    report = bench.out / "tests.xml"
    which = ["-m", "gpu"] if bench.is_gpu else ["-m", "slow", "-k", "rotate and cpu"]
    # Without plugins that the settings of the project name: the machine may lack them.
    options = ["-o", "addopts=-q", "-W", "ignore::pytest.PytestConfigWarning"]
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider"]
    command += [*options, *which, f"--junitxml={report.resolve()}"]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=TESTS_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"longer than {TESTS_S} s"}
    if not report.exists():
        return {"error": (done.stdout + done.stderr)[-1500:]}
    return read_junit(report)


def read_junit(report: Path) -> dict[str, Any]:
    """How many tests there were, and what failed with which message."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = {
        case.get("name", "?"): (each.get("message") or "")[:400]
        for case in cases
        for each in case
        if each.tag in ("failure", "error")
    }
    skipped = {
        case.get("name", "?"): (each.get("message") or "")[:120]
        for case in cases
        for each in case
        if each.tag == "skipped"
    }
    return {"number": len(cases), "failed": bad, "skipped": skipped}
