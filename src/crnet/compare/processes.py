"""Runs side by side: each is ``crnet train`` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crnet.config.check import check
from crnet.config.sections import RunConfig
from crnet.config.serialize import command_line, override
from crnet.data.prepare import prepare
from crnet.errors import ConfigError, ReportedError
from crnet.inference.load import pick_device
from crnet.parallel.cores import num_cores
from crnet.train.signals import Stop, signals

PROGRAM = __name__.partition(".")[0]


def train_all(
    configs: Mapping[str, RunConfig], out: Path, *, progress: bool = True
) -> dict[str, dict[str, Any]]:
    """Train every run, and return what ``crnet train --json`` says of each.

    On a CPU as many at a time as it has cores, which they share: a small model gains little from a
    second thread. On a GPU one after the other.

    Args:
        configs: by name, on the same corpus; ``out / name`` is the folder of a run.
    Raises:
        ConfigError: a configuration is wrong; a run was refused or failed (it has said why on
            stderr); or a signal stopped them: each has saved, and ``crnet train --resume`` goes on.
    """
    for config in configs.values():
        check(config)  # here: a process of its own would say it again
    names = list(configs)
    first = configs[names[0]]
    prepare(first.data, progress=progress)  # once, and the runs find it
    on_cpu = pick_device(first.train.device).type == "cpu"
    at_once = min(num_cores(), len(names)) if on_cpu else 1
    ended: dict[str, dict[str, Any]] = {}
    with signals() as stop:
        for start in range(0, len(names), at_once):
            some = {name: configs[name] for name in names[start : start + at_once]}
            ended |= _together(some, out, num_cores() // at_once, progress, stop)
    return ended


def _together(
    configs: Mapping[str, RunConfig], out: Path, threads: int, progress: bool, stop: Stop
) -> dict[str, dict[str, Any]]:
    """These runs at the same time, each with so many threads."""
    if progress:
        steps = " and ".join(f"{name} ({it.train.steps} steps)" for name, it in configs.items())
        print(f"training {steps}", file=sys.stderr)
    started: dict[str, subprocess.Popen[str]] = {}
    try:
        for line, (name, config) in enumerate(configs.items()):
            started[name] = _start(config, out / name, threads, line, progress)
        while None in (codes := [each.poll() for each in started.values()]):
            if stop.requested or any(codes):
                break
            time.sleep(0.1)
    finally:
        for each in started.values():
            if each.poll() is None:
                each.send_signal(signal.SIGTERM)  # it saves
        outputs = {name: each.communicate()[0] for name, each in started.items()}
    if stop.requested:
        raise ConfigError(f"{stop.requested} stopped it; start it once more, in another folder")
    if any(each.returncode for each in started.values()):
        raise ReportedError("a run has failed")
    return {name: json.loads(text) for name, text in outputs.items()}


def _start(
    config: RunConfig, folder: Path, threads: int, line: int, progress: bool
) -> subprocess.Popen[str]:
    """Start a run whose progress bar is on so many lines below the first one's."""
    config = override(config, train={"threads": config.train.threads or threads})
    command = [sys.executable, "-m", PROGRAM, *command_line(config), "--out", str(folder), "--json"]
    told = {"OMP_NUM_THREADS": str(threads), "TQDM_POSITION": str(line), "TQDM_DESC": folder.name}
    told |= {} if progress else {"TQDM_DISABLE": "1"}
    # A session of its own: Ctrl-C reaches it once, from here.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | told, start_new_session=True
    )
