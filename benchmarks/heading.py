"""What the report of a benchmark begins with, and how it is written."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from crnet.parallel.cores import num_cores
from crnet.storage.manifest import describe_code, describe_device


def heading(
    benchmark: str, given: argparse.Namespace, device: str = "cpu", hidden: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Which program, when, how, where. ``hidden``: options that say nothing, beside --out."""
    left_out = ("out", *hidden)
    return {
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%d"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "options": {key: value for key, value in vars(given).items() if key not in left_out},
        "processor": describe_device(torch.device(device)),
        "cores": num_cores(),
        "code": describe_code(),
    }


def write(report: dict[str, Any], out: Path | None) -> None:
    """As JSON; None: nowhere."""
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
