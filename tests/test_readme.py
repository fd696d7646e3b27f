"""What the first page says is what the package, the cost model and the benchmarks' files say.

Its commands are run by ``test_documented_commands.py``; what it promises is held by the tests that
stand behind each line: here are its tables, its figures and its drawing.
"""

from __future__ import annotations

import json
import math
import re
import runpy
import statistics
from pathlib import Path
from typing import Any

import pytest

from crnet import architectures, linears, optimizers, schedules, streams
from crnet.compare.demo import sides_of
from crnet.cost.parameters import num_parameters
from test_hardware_document import flops, work_of

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def report(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))


def test_every_method_is_in_the_table() -> None:
    flags = {
        "--model.linear": linears,
        "--model.stream": streams,
        "--model.architecture": architectures,
        "--optimizer.name": optimizers,
        "--optimizer.schedule": schedules,
    }
    for flag, seam in flags.items():
        (row,) = re.findall(rf"^\| `{flag}` \| (.*) \|$", TEXT, re.M)
        assert set(re.findall("`([^`]+)`", row)) == set(seam.names())


def test_the_share_of_low_rank_methods() -> None:
    """Those that leave fewer trained parameters than dense maps have."""
    names = linears.names()
    dense = {"full", "value-resformer", "velora"}
    assert dense < set(names)
    assert f"{len(names) - len(dense)} of {len(names)} parameterizations" in TEXT


def test_shares_of_full_rank() -> None:
    shares = []
    for preset in ("llama-1b", "llama-60m"):
        mine, dense = (work_of(preset, linear) for linear in ("crnet", "full"))
        parameters = num_parameters(mine.spec)["total"] / num_parameters(dense.spec)["total"]
        shares += [f"{parameters:.2f}", f"{flops(mine)['step'] / flops(dense)['step']:.2f}"]
    words = " ".join(TEXT.split())
    told = "{} of the parameters and {} of the FLOPs of a LLaMA of the same shape at 1B, {} and {}"
    assert told.format(*shares) in words


@pytest.mark.parametrize("name", ["full", "lowrank", "cola", "crnet", "crnet-above"])
def test_comparison(name: str) -> None:
    suffix = "-cola" if name == "cola" else ""
    rows = report(f"2026-11-27-abstracts-embedding{suffix}.json")["rows"]
    cells = [name.replace("-above", ", o and down not carried"), f"{rows[name]['parameters']:,}"]
    for each in (rows[name], rows[f"{name}-embedding"]):
        losses, perplexities = (
            [run[key] for run in each["runs"]] for key in ("val_loss", "val_perplexity")
        )
        cells += [" / ".join(f"{loss:.4f}" for loss in losses), f"{statistics.mean(losses):.4f}"]
        cells.append(f"{statistics.mean(perplexities):.2f}")
    row = f"| {' | '.join(cells)} |"
    assert row in TEXT, row


@pytest.mark.parametrize(
    ("name", "precision", "told"),
    [
        (
            "2026-11-26-peers.json",
            "fp32",
            "full rank {}, CR-Net **{}** at {} of the FLOPs, low rank {}",
        ),
        ("2026-11-26-peers-quiet.json", "fp32", "sets it, {}, {} and {}"),
        ("2026-11-27-peers-xeon.json", "fp32", "Intel Xeon {}, {} and {}"),
        ("2026-11-27-peers-xeon.json", "bf16-mixed", "in bf16-mixed {}, {} and {}"),
    ],
)
def test_times_beside_transformers(name: str, precision: str, told: str) -> None:
    sides = report(name)["step"][precision]
    ratios = {side: f"{each['time_to_transformers']:.2f}" for side, each in sides.items()}
    values = [ratios["full"], ratios["crnet"], ratios["lowrank"]]
    if told.count("{}") == 4:
        values.insert(2, f"{sides['crnet']['flops_to_transformers']:.2f}")
    assert told.format(*values) in " ".join(TEXT.split())


def test_recomputation() -> None:
    memory = report("2026-11-20-recomputation-memory.json")
    time = report("2026-11-20-recomputation-time-130m.json")
    assert "Xeon" in memory["device"]
    assert "Xeon" in time["device"]
    names = {
        "block": "`block`: vanilla checkpointing",
        "invert": "`invert`: the paper's algorithm 1",
    }
    for policy in ("none", "block", "invert", "replay"):
        side = memory["sides"][policy]
        mib = [round(side[what]["closed_form"] / 2**20) for what in ("kept", "peak")]
        ratio = time["sides"][policy]["time_ratio_median_of_rounds"]
        name = names.get(policy, f"`{policy}`")
        row = f"| {name} | {mib[0]} | {mib[1]} | {ratio:.3g} |"
        assert row in TEXT, row


@pytest.mark.parametrize("name", ["crnet", "full", "lowrank"])
def test_the_demo_s_table(name: str) -> None:
    (rate, scale, after) = re.findall(
        rf"^\| {name} \| [\d,]+ \| (\S+) \| (\S+) \| [\d,.]+ \| ([\d.]+) \|", TEXT, re.M
    )[0]
    config = sides_of([name])[name]
    assert (float(rate), float(scale)) == (config.optimizer.lr, config.model.init_std)
    (best, *_) = report("2026-11-27-demo-rates.json")["sides"][name]["ranked"]
    assert float(after) == pytest.approx(math.exp(best["val_loss"]), abs=0.06)


def test_the_drawing_is_that_of_its_program() -> None:
    drawing = runpy.run_path(str(ROOT / "docs" / "block_drawing.py"))["drawing"]()
    assert (ROOT / "docs" / "block.svg").read_text(encoding="utf-8") == drawing
    assert "prefers-color-scheme: dark" in drawing
