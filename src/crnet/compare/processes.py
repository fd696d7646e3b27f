"""Runs side by side: each is ``crnet train`` in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from crnet.config.check import check
from crnet.config.sections import RunConfig
from crnet.config.serialize import command_line, override
from crnet.data.prepare import prepare
from crnet.errors import ConfigError, ReportedError, TrainingError
from crnet.inference.load import pick_device
from crnet.parallel.cores import num_cores
from crnet.train import run as training
from crnet.train.folders import resumed_run
from crnet.train.signals import signals

PROGRAM = __name__.partition(".")[0]
FRAME = "╭╮╰╯│─ "
"""What stands around an error on a terminal."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    figures: dict[str, Any]
    """What ``crnet train --json`` says; empty: it failed."""
    problem: str | None = None
    """What it said on stderr when it failed."""


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
    found = {}
    mend = "start it once more, in another folder"
    runs = ended(configs, out, jobs=None, mend=mend, bars=progress)
    with contextlib.closing(runs):
        for name, each in runs:
            if each.problem is not None:
                raise ReportedError("a run has failed")
            found[name] = each.figures
    return {name: found[name] for name in configs}


def ended(
    configs: Mapping[str, RunConfig],
    out: Path,
    *,
    jobs: int | None,
    mend: str,
    bars: bool = False,
    goes_on: bool = False,
) -> Generator[tuple[str, Ended], None, None]:
    """Train every run, so many at a time; each as soon as it has ended.

    Closed before its end, by an error of the caller's too, it asks those that run to save and stop.

    Args:
        configs: by name; ``out / name`` is the folder of a run.
        jobs: None: ``jobs_of``.
        mend: what to do after a signal.
        bars: show the progress and the errors of each run on stderr; else its errors are kept for
            ``Ended.problem``.
        goes_on: go on with what was begun in a folder.
    Raises:
        ConfigError: a configuration is wrong, or a signal stopped them.
    """
    for config in configs.values():
        check(config)  # here: a process of its own would say it again
    for data in {repr(each.data): each.data for each in configs.values()}.values():
        prepare(data, progress=bars)  # once, and the runs find it
    jobs = jobs or jobs_of(next(iter(configs.values())), len(configs))
    threads = max(num_cores() // jobs, 1)
    waiting, running = list(configs.items()), list[_Run]()
    if bars:
        steps = " and ".join(f"{name} ({each.train.steps} steps)" for name, each in waiting)
        print(f"training {steps}", file=sys.stderr)
    with signals() as stop:
        try:
            while (waiting or running) and stop.requested is None:
                while waiting and len(running) < jobs:
                    name, config = waiting.pop(0)
                    free = next(iter({*range(jobs)} - {each.line for each in running}))
                    words = [*command(config, threads), "--out", str(out / name)]
                    words += ["--resume", "auto"] if goes_on else []
                    running.append(_Run(name, words, threads, free, bars))
                for each in [each for each in running if each.process.poll() is not None]:
                    running.remove(each)
                    yield each.name, each.ended()
                time.sleep(0.05)
        finally:
            for each in running:
                each.process.send_signal(signal.SIGTERM)  # it saves
            for each in running:
                each.process.wait()
                each.ended()
        if stop.requested is not None:
            raise ConfigError(f"{stop.requested} stopped it; {mend}")


def here(
    configs: Mapping[str, RunConfig], out: Path, *, mend: str
) -> Generator[tuple[str, Ended], None, None]:
    """``ended`` without processes: one run after the other in this one, so that nothing is imported
    or read twice. Each goes on with what was begun in its folder.

    Args:
        configs: by name; ``out / name`` is the folder of a run.
        mend: what to do after a signal.
    Raises:
        ConfigError: a configuration is wrong, or a signal stopped them: the last one has saved.
    """
    for config in configs.values():
        check(config)
    with signals() as stop:  # a run has its own while it lasts
        for name, config in configs.items():
            folder, whole = out / name, config.train.stop_after_steps or config.train.steps
            try:
                begun = resumed_run("auto", folder) is not None
                result = training.run(config, folder, resume=begun, progress=False)
            except (ConfigError, TrainingError) as error:
                yield name, Ended({}, str(error))
                continue
            if stop.requested is not None or result.step < whole:
                raise ConfigError(f"{stop.requested or 'a signal'} stopped it; {mend}")
            yield name, Ended({"step": result.step, "tokens": result.tokens})


def jobs_of(config: RunConfig, num_runs: int) -> int:
    """Runs at a time where nothing is said: a core each on a CPU, one on a GPU."""
    on_cpu = pick_device(config.train.device).type == "cpu"
    return min(num_cores(), num_runs) if on_cpu else 1


def command(config: RunConfig, threads: int) -> list[str]:
    """The words that train a run and print its result as JSON."""
    config = override(config, train={"threads": config.train.threads or threads})
    return [sys.executable, "-m", PROGRAM, *command_line(config), "--json"]


class _Run:
    """A process, and the files that it writes its output to."""

    def __init__(self, name: str, words: list[str], threads: int, line: int, bar: bool):
        self.name, self.line = name, line
        """Its progress bar is so many lines below the first one's."""
        self._output = _file()
        self._errors = None if bar else _file()
        told = {"OMP_NUM_THREADS": str(threads), "TQDM_POSITION": str(line), "TQDM_DESC": name}
        told |= {} if bar else {"TQDM_DISABLE": "1"}
        # A session of its own: Ctrl-C reaches it once, from here.
        self.process = subprocess.Popen(
            words,
            stdout=self._output,
            stderr=self._errors,
            env=os.environ | told,
            start_new_session=True,
        )

    def ended(self) -> Ended:
        """What it wrote."""
        printed = _read(self._output)
        problem = message(_read(self._errors)) if self._errors else ""
        if self.process.returncode == 0:
            return Ended(json.loads(printed))
        return Ended({}, problem or f"exit code {self.process.returncode}")


def _file() -> IO[str]:
    """One without a name, that is gone once it is closed."""
    return tempfile.TemporaryFile("w+", encoding="utf-8")


def _read(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()


def message(errors: str) -> str:
    """The last paragraph of what crnet wrote to stderr, without its name and the frame around."""
    last: list[str] = []
    for line in reversed([each.strip(FRAME) for each in errors.splitlines()]):
        if line:
            last.insert(0, line)
        elif last:
            break
    return " ".join(last[-4:]).removeprefix(f"{PROGRAM}: ")
