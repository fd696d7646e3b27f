"""The bench on which ``tests/hostile.py`` tries the command line: a process for every attempt.

A server imports the package once and forks a child for each command, so that a command is as alone
as in a shell (its own folder, environment, limits and streams) without importing torch each time.
``Bench.program`` starts a whole interpreter, where that is what is tried.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Words = Sequence[str | Path]

TINY = (
    "--model.hidden-size 16 --model.intermediate-size 24 --model.num-layers 2 --model.num-heads 2 "
    "--model.rank 4 --data.documents paragraph --data.vocab-size 300 --data.sequence-length 16 "
    "--data.validation-tokens 200 --data.validation-frac 0.2 "
    "--train.batch-size 4 --train.steps 4 --train.threads 1 "
    "--train.device cpu --train.log-every-steps 1 --train.eval-every-steps 2 "
    "--train.save-every-steps 2"
).split()
"""A run of less than a second."""

MEMORY_BYTES = 3 << 30
"""What a command may take above what the package itself has mapped."""


def patience() -> float:
    """How much longer than on an idle machine a command may take."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Unexpected(AssertionError):
    """An attempt did not end as it says."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    words: list[str]
    code: int
    """Exit code; minus the signal that ended it."""
    out: bytes
    err: str
    """Without the frames of the messages and with single blanks."""
    hung: bool
    seconds: float

    @property
    def text(self) -> str:
        return self.out.decode(errors="replace")

    def json(self) -> Any:
        """Standard output as one JSON document, by the letter of the standard."""
        try:
            return json.loads(self.out, parse_constant=_no_constant)
        except ValueError as error:
            raise Unexpected(f"standard output is no JSON ({error}): {self.out[:200]!r}") from None

    def ends(self, code: int | tuple[int, ...], *holds: str) -> Outcome:
        """Raise ``Unexpected`` unless it ended with that code, and said that."""
        codes = (code,) if isinstance(code, int) else code
        if self.code not in codes:
            raise Unexpected(f"exit code {self.code}, not {code}: {self.err[-600:]}")
        for part in holds:
            if part not in self.err:
                raise Unexpected(f"the message lacks {part!r}: {self.err[-600:]}")
        return self

    def refused(self, *holds: str) -> Outcome:
        """Bad input: exit code 2, a message that holds the words, nothing on standard output."""
        self.ends(2, *holds)
        if self.out:
            raise Unexpected(f"standard output holds {self.out[:200]!r}")
        return self


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


@dataclass
class Bench:
    """What an attempt works with: an empty folder, a corpus, a trained run, the command line."""

    root: Path
    outcomes: list[Outcome] = field(default_factory=list)
    _server: subprocess.Popen[str] | None = None
    _number: int = 0
    _started: int = 0
    _said: dict[int, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.corpus = self.root / "corpus.txt"
        if not self.corpus.exists():
            self.corpus.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:24_000])

    def begin(self) -> None:
        """Give the next attempt its own folder."""
        self._number += 1
        self.outcomes.clear()
        self.folder = self.root / f"attempt-{self._number}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    # Commands

    def call(self, *words: str | Path, **options: Any) -> Outcome:
        """Run a command in a child of the server.

        Args:
            options: ``env``, ``cwd``, ``seconds`` (most that it may take), ``term_s`` (SIGTERM
                then), ``limits`` (resource name -> bytes), ``stdout`` (a path).
        """
        order = self._order([os.fspath(word) for word in words], options)
        answer = self._ask({"run": order})
        out = b"" if "stdout" in options else Path(order["stdout"]).read_bytes()
        return self._keep(order["words"], answer["code"], out, Path(order["stderr"]), answer)

    def program(self, *words: str | Path, **options: Any) -> Outcome:
        """Run a command as a program of its own; ``before``: shell text in front of it, ``after``:
        behind it; ``env``, ``cwd``, ``seconds``."""
        order = self._order([os.fspath(word) for word in words], options)
        line = f'{options.get("before", "")} {{ {sys.executable} -m crnet "$@"; }}'
        script = f"set -o pipefail; {line} {options.get('after', '')}"
        start_s = time.monotonic()
        with open(order["stdout"], "wb") as out, open(order["stderr"], "wb") as err:
            done = subprocess.run(
                ["bash", "-c", script, "bash", *order["words"]],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**self.environment(), **order["env"]},
                cwd=order["cwd"],
                timeout=order["seconds"],
                check=False,
            )
        answer = {"hung": False, "seconds": time.monotonic() - start_s}
        out_bytes = Path(order["stdout"]).read_bytes()
        return self._keep(order["words"], done.returncode, out_bytes, Path(order["stderr"]), answer)

    def start(self, *words: str | Path) -> int:
        """Start a command in a child of the server and return its process's id at once."""
        self._started += 1
        order = self._order([os.fspath(word) for word in words], {})
        order["stdout"], order["stderr"] = os.devnull, str(self.root / f"err-{self._started}")
        pid = self._ask({"start": order})["pid"]
        self._said[pid] = Path(order["stderr"])
        return pid

    def ended(self, pid: int) -> int | None:
        """The exit code of a command that was started; None while it runs."""
        return self._ask({"ended": pid})["code"]

    def wait(self, pid: int, seconds: float = 120) -> int:
        """The exit code of a command that was started, once it has ended."""
        deadline = time.monotonic() + seconds
        while (code := self.ended(pid)) is None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        if code != -signal.SIGKILL and "Traceback" in (said := self._said[pid].read_text()):
            raise Unexpected(f"a traceback: {said[-500:]}")
        return code

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._server is None:
            self._server = self._launch()
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "400",
            "XDG_CACHE_HOME": str(self.root / "cache"),
            "MPLCONFIGDIR": os.path.expanduser("~/.cache/matplotlib"),  # its list of fonts
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }

    def _order(self, words: list[str], options: dict[str, Any]) -> dict[str, Any]:
        return {
            "words": last_wins(words),
            "env": options.get("env", {}),
            "cwd": os.fspath(options.get("cwd", self.folder)),
            "seconds": options.get("seconds", 30) * patience(),
            "term_s": options["term_s"] * patience() if "term_s" in options else None,
            "limits": {"RLIMIT_AS": MEMORY_BYTES} | options.get("limits", {}),
            "stdout": os.fspath(options.get("stdout", self.root / "out")),
            "stderr": str(self.root / "err"),
        }

    def _keep(
        self, words: list[str], code: int, out: bytes, err: Path, answer: dict[str, Any]
    ) -> Outcome:
        said = err.read_text(encoding="utf-8", errors="replace")
        for sign in "╭╮╰╯│─":
            said = said.replace(sign, " ")
        said = " ".join(said.split())
        found = Outcome(words, code, out, said, answer["hung"], answer["seconds"])
        self.outcomes.append(found)
        return found

    def _launch(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment(),
        )

    def close(self) -> None:
        if self._server is not None:
            with self._server as server:  # closes its pipes, which ends it, and waits
                assert server.stdin is not None
                server.stdin.close()
                server.wait(timeout=30)
            self._server = None

    # What commands work on

    def tiny(self, out: str | Path = "run", source: str | Path | None = None) -> list[str]:
        """The words of a tiny training run."""
        return [
            "train",
            *TINY,
            "--data.source",
            os.fspath(source or self.corpus),
            "--out",
            str(out),
        ]

    def trained(self) -> Path:
        """A copy of a trained run, in the attempt's folder."""
        master = self.root / "trained"
        if not master.exists():
            self.call(*self.tiny(master)).ends(0)
        copy = self.folder / "run"
        shutil.copytree(master, copy)
        return copy

    def cached(self) -> tuple[Path, list[str]]:
        """A prepared corpus of the attempt's own, and the words that find it again."""
        cache = self.folder / "cache"
        words = [*TINY[10:20], "--data.cache-dir", str(cache)]
        words += ["--data.source", str(self.corpus)]
        self.call("prepare", *words).ends(0)
        (found,) = (path for path in cache.iterdir() if not path.name.startswith("."))
        return found, words


def last_wins(words: list[str]) -> list[str]:
    """The words without the pairs ``--flag value`` of ``TINY`` that come again with another."""
    flags = [word.partition("=")[0] for word in words]
    kept: list[str] = []
    at = 0
    while at < len(words):
        given = (*TINY, "--out", "--data.source")
        if words[at] in given and words[at].startswith("--") and words[at] in flags[at + 1 :]:
            at += 2
        else:
            kept.append(words[at])
            at += 1
    return kept


def contents(folder: Path) -> dict[str, Any]:
    """Every file below a folder by name; of a symbolic link, where it leads."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


@contextlib.contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Raise ``Unexpected`` where what is inside changes the files of a folder."""
    before = [contents(folder) for folder in folders]
    yield
    for folder, was in zip(folders, before, strict=True):
        now = contents(folder)
        if changed := sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k)):
            raise Unexpected(f"{folder}: {', '.join(changed)} changed")


# The table

Act = Callable[[Bench], None]


@dataclass(frozen=True)
class Attempt:
    """One row of the table."""

    group: str
    name: str
    act: Act
    """Raises ``Unexpected`` where a command does not end as it should."""


TABLE: list[Attempt] = []


def attempt(group: str, name: str) -> Callable[[Act], Act]:
    """Enter a function into the table."""

    def enter(act: Act) -> Act:
        TABLE.append(Attempt(group, name, act))
        return act

    return enter


def result_of(bench: Bench, each: Attempt) -> dict[str, Any]:
    """Make an attempt. A traceback, a hung command and a death by signal are always wrong."""
    start_s = time.monotonic()
    wrong = []
    bench.begin()
    try:
        each.act(bench)
    except Unexpected as error:
        wrong.append(str(error))
    except Exception:  # noqa: BLE001  the table goes on
        wrong.append(traceback.format_exc(limit=-3))
    for outcome in bench.outcomes:
        shown = " ".join(outcome.words)[-150:]
        if "Traceback (most recent call last)" in outcome.err:
            wrong.append(f"{shown}: a traceback: {outcome.err[-500:]}")
        if "Exception ignored" in outcome.err:
            wrong.append(f"{shown}: an ignored exception: {outcome.err[-300:]}")
        if outcome.hung:
            wrong.append(f"{shown}: still running after {outcome.seconds:.0f} s")
    commands = len(bench.outcomes)
    if not wrong:
        shutil.rmtree(bench.folder, ignore_errors=True)
    return {
        "group": each.group,
        "name": each.name,
        "commands": commands,
        "seconds": round(time.monotonic() - start_s, 2),
        "wrong": wrong,
    }


# The server


def serve() -> None:
    """Import what commands import, then fork a child for every order on standard input."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot  # noqa: F401

    import crnet.cli.app
    import crnet.data.prepare
    import crnet.inference.generate
    import crnet.measure.profile
    import crnet.report.cost_plot
    import crnet.train.run

    for name in crnet.cli.app.COMMANDS:
        crnet.cli.app.command(name)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for words in (["train", "--train.steps=x"], ["train", "--train.steps=-1"], ["list"]):
            _main(words)  # what is imported, or kept, when a command is parsed or refused
    ended: dict[int, int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(_answer(question, ended)), flush=True)


def _answer(question: dict[str, Any], ended: dict[int, int]) -> dict[str, Any]:
    if pid := question.get("ended"):
        if pid not in ended:
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                return {"code": None}
            ended[pid] = os.waitstatus_to_exitcode(status)
        return {"code": ended[pid]}
    order, start_s = question.get("run") or question["start"], time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(order)
    if "start" in question:
        ended.pop(pid, None)
        return {"pid": pid}
    code, hung = _wait(pid, order, start_s)
    return {"code": code, "hung": hung, "seconds": time.monotonic() - start_s}


def _wait(pid: int, order: dict[str, Any], start_s: float) -> tuple[int, bool]:
    term_s, hung = order["term_s"], False
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), hung
        passed = time.monotonic() - start_s
        if term_s is not None and passed > term_s:
            os.kill(pid, signal.SIGTERM)
            term_s = None
        if passed > order["seconds"] and not hung:
            os.kill(pid, signal.SIGKILL)
            hung = True
        time.sleep(0.002)


def _child(order: dict[str, Any]) -> None:
    code = 1
    try:
        os.environ.update(order["env"])
        os.chdir(order["cwd"])
        streams = (os.devnull, order["stdout"], order["stderr"])
        for number, path in enumerate(streams):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(path, flags), number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for name, size in order["limits"].items():
            size += mapped if name == "RLIMIT_AS" else 0
            resource.setrlimit(getattr(resource, name), (size, size))
        code = _main(order["words"])
    finally:
        os._exit(code)


def _main(words: list[str]) -> int:
    from crnet.cli.app import main

    sys.argv = ["crnet", *words]
    code: Any = 0
    try:
        main(words)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  as the interpreter would
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code if isinstance(code, int) else 0 if code is None else 1


if __name__ == "__main__":
    serve()
