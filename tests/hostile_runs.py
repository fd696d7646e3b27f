"""Attempts on what surrounds a command: streams, paths, locale, disk, other processes, death."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hostile_bench import (
    TABLE,
    TINY,
    Attempt,
    Bench,
    Unexpected,
    attempt,
    contents,
    last_wins,
    untouched,
)

# Standard output and error

SMALL = "--model.hidden-size=16 --model.intermediate-size=24 --model.num-layers=2 "
SMALL += "--model.num-heads=2 --model.rank=4 --data.sequence-length=16 --data.vocab-size=300"
METHOD = "crnet"


def json_words(command: str, bench: Bench) -> list[str]:
    """The words of every command that prints JSON, with a result of some lines."""
    run = str(bench.trained())
    return {
        "train": [*bench.tiny("new")],
        "cost": ["cost", *SMALL.split()],
        "profile": ["profile", *SMALL.split(), "--train.batch-size=2", "--rounds=1"],
        "plan": ["plan", "--flops-frac", "0.5"],
        "timeline": [
            *("timeline", *SMALL.split()),
            *("--parallel.pipeline=2", "--train.micro-batch-size=2"),
        ],
        "prepare": ["prepare", *TINY[10:20], "--data.source", str(bench.corpus)],
        "evaluate": ["evaluate", run],
        "generate": ["generate", run, "--max-tokens", "5"],
        "observe": ["observe", run],
        "consolidate": ["consolidate", run, "--out", str(bench.folder / "handed on")],
        "export": ["export", run, "--out", str(bench.folder / "exported")],
        "finetune": [
            *("finetune", run, "--data.source", str(bench.corpus), *TINY[10:20]),
            *("--train.epochs", "1", "--out", str(bench.folder / "tuned")),
        ],
        "report": ["report", run, "--no-samples", "--out", str(bench.folder / "page.html")],
        "protocol": ["protocol", "paper/llama-60m"],
        "list": ["list"],
        "paper": ["paper", "2"],
        "check-plugin": ["check-plugin", str(Path(__file__).parent / "no_plugin.py")],
        "demo": ["demo", "--quick", "--steps", "2", "--out", "demo"],
        "compare": ["compare", "smoke", "--dry-run", "--out", str(bench.folder / "compared")],
        "sweep": [
            *("sweep", *bench.tiny("swept")[1:], "--over", "optimizer.lr=1e-3,3e-3"),
        ],
    }[command]


def try_json(command: str, bench: Bench) -> None:
    """Standard output is one JSON document to the letter of the standard, and nothing else."""
    done = bench.call(*json_words(command, bench), "--json", seconds=60)
    if command == "check-plugin":
        done.refused("no_plugin.py")
    else:
        done.ends(0).json()


def commands() -> list[str]:
    from crnet.cli.app import COMMANDS

    return list(COMMANDS)


for command in sorted(set(commands()) - {"watch"}):  # a picture in the terminal
    TABLE.append(Attempt("streams", f"{command} --json", partial(try_json, command)))


@attempt("streams", "figures that JSON has no word for")
def _(bench: Bench) -> None:
    words = [*bench.tiny(), "--optimizer.lr=1e30", "--json", "--train.steps=3"]
    done = bench.call(*words)
    done.json() if done.code == 0 else done.ends(1, "crnet: ")
    rows = bench.folder / "run" / "metrics.jsonl"
    for line in rows.read_text().splitlines():

        def refuse(word: str, line: str = line) -> None:
            raise Unexpected(f"{word} is not JSON: {line}")

        json.loads(line, parse_constant=refuse)


@attempt("streams", "a reader that has seen enough")
def _(bench: Bench) -> None:
    for words in (["list"], ["cost", "llama-7b"], ["paper", "--markdown"], ["--help"]):
        for after in ("| head -c 1 >/dev/null", "| true"):
            bench.program(*words, after=after).ends(0)


@attempt("streams", "standard output that is full")
def _(bench: Bench) -> None:
    run = bench.trained()
    for words in (
        ["list"],
        ["list", "--json"],
        ["train", "--help"],
        ["--version"],
        ["paper", "--markdown"],
        ["generate", run, "--max-tokens", "3"],
        ["evaluate", run, "--json"],
    ):
        bench.call(*words, stdout="/dev/full").ends(2, "standard output", "No space left")
    bench.program("list", after=">/dev/full").ends(2, "standard output", "No space left")
    done = bench.call(*bench.tiny("full"), stdout="/dev/full")
    done.ends(2, "standard output", "whole")
    bench.call("evaluate", bench.folder / "full", "--json").ends(0).json()


@attempt("streams", "closed streams")
def _(bench: Bench) -> None:
    run = bench.trained()
    for number, after in enumerate((">&-", "2>&-", "<&-", ">&- 2>&-", ">&- 2>&- <&-")):
        words = [*bench.tiny(f"closed-{number}"), "--json"]
        done = bench.program(*words, after=after).ends(0)
        if ">&-" not in after:
            done.json()
        if after == "2>&-":
            done.json()
        rows = (bench.folder / f"closed-{number}" / "metrics.jsonl").read_text()
        if not all(line.startswith("{") for line in rows.splitlines()):
            raise Unexpected(f"{after}: something else was written into metrics.jsonl")
    bench.program("evaluate", run, after=">&- 2>&-").ends(0)
    bench.program("train", "--train.steps=x", after="2>&-").ends(2)


@attempt("streams", "standard error that is full")
def _(bench: Bench) -> None:
    done = bench.program(*bench.tiny("full"), "--json", after="2>/dev/full").ends(0)
    done.json()
    bench.program("train", "--train.steps=x", after="2>/dev/full").ends(2)


@attempt("streams", "a terminal that is gone")
def _(bench: Bench) -> None:
    """The terminal closes while a run goes on: the run is finished, or saved, and goes on."""
    ours, theirs = pty.openpty()
    words = last_wins([*bench.tiny("run"), "--train.steps=400", "--train.eval-every-steps=0"])
    process = subprocess.Popen(
        [sys.executable, "-m", "crnet", *words],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env=bench.environment(),
        cwd=bench.folder,
        start_new_session=True,
    )
    os.close(theirs)
    log = bench.folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("loss") > 2) and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.01)[0]:
            with contextlib.suppress(OSError):  # it has ended already
                os.read(ours, 4096)
        if process.poll() is not None:
            break
    os.close(ours)
    code = process.wait(timeout=60)
    if code not in (0, 2):
        raise Unexpected(f"exit code {code}")
    bench.call(*words, "--resume", "--json").ends(0)


# Text and encodings

LOCALES: dict[str, dict[str, str]] = {
    "C without UTF-8": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "POSIX": {"LC_ALL": "POSIX"},
    "one that is not there": {"LC_ALL": "xx_XX.nowhere"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "utf-16": {"PYTHONIOENCODING": "utf-16"},
}


def try_locale(name: str, bench: Bench) -> None:
    run = bench.trained()
    env = LOCALES[name]
    words = ["generate", run, "--prompt", "Žluťoučký kůň — 漢字 🙂", "--max-tokens", "20"]
    bench.program(*words, env=env).ends(0)
    bench.program("list", env=env).ends(0)
    said = () if name == "utf-16" else ("crnet: ", "ert")
    bench.program("train", "--model.linear", "čert", env=env).ends(2, *said)
    bench.program("evaluate", run, "--json", env=env).ends(0)


for name in LOCALES:
    TABLE.append(Attempt("locales", f"locale {name}", partial(try_locale, name)))


@attempt("locales", "a prompt that is no text")
def _(bench: Bench) -> None:
    run = bench.trained()
    bench.call("generate", run, "--prompt", "a\udcff").refused("prompt", "UTF-8")
    bench.call("generate", run, "--prompt", "\udced\udca0\udc80").refused("prompt", "UTF-8")
    bench.call("generate", run, "--prompt", "x" * 4_000, "--max-tokens", "1").ends((0, 2))


# Paths

PATHS = {
    "with blanks": "a  folder with  blanks",
    "with a line end": "line\nend",
    "with quotes": 'it\'s "quoted" $HOME `x` \\',
    "with a leading dash": "-out",
    "with a leading dash and an equals sign": "--out=x",
    "with a glob": "a[b]*?",
    "with braces and percent": "{tmp}%s{0}",
    "that is no UTF-8": "caf\udce9-\udcff",
    "of other scripts": "漢字-žluť-🙂",
    "of 255 bytes": "x" * 255,
    "with a tilde": "~",
    "with a colon": "a:b",
    "with dots": "...",
}


def try_path(kind: str, bench: Bench) -> None:
    """A folder of any name holds the corpus, the cache, the settings and the run."""
    base = bench.folder / PATHS[kind]
    base.mkdir()
    source = base / f"corpus{PATHS[kind][:40]}.txt".replace("/", "_")
    shutil.copy(bench.corpus, source)
    settings = base / "settings.yaml"
    settings.write_text("train: {seed: 3}\n")
    run = base / "run"
    words = [*bench.tiny(f"--out={run}"), "--data.cache-dir", base / "cache", "--config", settings]
    at = words.index("--out")
    words[at : at + 2] = [f"--out={run}"]
    at = words.index("--data.source")
    words[at : at + 2] = [f"--data.source={source}"]
    done = bench.call(*words, "--json").ends(0).json()
    if done["run"] != str(run):
        raise Unexpected(f"the run is {done['run']!r}")
    bench.call("evaluate", run).ends(0)
    bench.call("evaluate", run, "--json").ends(0).json()
    bench.call("generate", run, "--max-tokens", "3").ends(0)
    bench.call("train", f"--out={run}", "--resume", "--train.steps=6").ends(0)
    bench.call("train", f"--out={run}", "--config", settings).refused("a run is there already")
    bench.program(*words).ends(2, "a run is there already")
    if not (run / "checkpoints" / "step_6").is_dir():
        raise Unexpected("the run is not where it should be")


for kind in PATHS:
    TABLE.append(Attempt("paths", kind, partial(try_path, kind)))


@attempt("paths", "longer than the system takes")
def _(bench: Bench) -> None:
    for name in ("x" * 256, "x/" * 2100, "a/" * 100 + "x" * 300):
        for words in (
            [*bench.tiny(), f"--out={name}"],
            [*bench.tiny(), f"--data.source={name}"],
            [*bench.tiny(), f"--data.cache-dir={name}"],
            [*bench.tiny(), f"--data.tokenizer={name}.json"],
            ["evaluate", name],
            ["generate", name],
            ["cost", f"--plot={name}/x"],
            ["list", f"--plugins={name}.py"],
        ):
            done = bench.call(*words)
            if not (done.code == 0 and "x/x" in name):
                done.ends(2, "crnet: ")
        shutil.rmtree(bench.folder / name.split("/")[0], ignore_errors=True)


@attempt("paths", "through what is no folder, or cannot be written")
def _(bench: Bench) -> None:
    (bench.folder / "file").write_text("x")
    (bench.folder / "circle").symlink_to("circle")
    (bench.folder / "gone").symlink_to("nowhere/at/all")
    with untouched(bench.folder):
        for name in ("file", "file/run", "circle", "circle/run", "/proc/run", "/dev/null/run"):
            bench.call(*bench.tiny(name)).refused("crnet: ")
            bench.call("cost", *SMALL.split(), "--plot", f"{name}/x").ends(2, "--plot")
    bench.call(*bench.tiny("gone/run")).ends((0, 2))


@attempt("paths", "a run that is moved goes on")
def _(bench: Bench) -> None:
    run = bench.trained()
    run.rename(bench.folder / "elsewhere")
    words = ["train", "--resume", "--out", "elsewhere", "--train.steps=6", "--json"]
    if bench.call(*words).ends(0).json()["step"] != 6:
        raise Unexpected("not six steps")


@attempt("paths", "the working folder is gone")
def _(bench: Bench) -> None:
    script = 'mkdir here && cd here && rmdir "$PWD";'
    bench.program("list", before=script).ends(2, "crnet: ", "gone")
    bench.program(*bench.tiny("run"), before=script).ends(2, "crnet: ", "gone")


# Disk

LIMITS = (0, 100, 3_000, 20_000, 60_000)


def try_limit(size: int, bench: Bench) -> None:
    """No file may pass a size: what cannot be written is said, what was there is whole."""
    run = bench.trained()
    cache = bench.folder / "cache"
    limits = {"RLIMIT_FSIZE": size}
    words = [*bench.tiny(run), "--train.steps=8", "--resume"]
    before = contents(run / "checkpoints" / "step_4")
    done = bench.call(*words, limits=limits)
    if done.code != 0:  # standard error is a file, too
        done.ends(2, *["crnet: "][: size > 100])
    if contents(run / "checkpoints" / "step_4") not in (before, {}):
        raise Unexpected("step_4 has changed")
    bench.call(*words).ends(0)
    done = bench.call(*bench.tiny("new"), "--data.cache-dir", cache, limits=limits)
    if done.code == 0:
        return
    done.ends(2, *["crnet: ", "ritten"][: 2 * (size > 100)])
    if cache.exists() and [path for path in cache.iterdir() if path.name.startswith(".")]:
        raise Unexpected("half-made tokens were left")
    again = ["--resume"] if (bench.folder / "new" / "run.json").exists() else []
    bench.call(*bench.tiny("new"), "--data.cache-dir", cache, *again).ends(0)
    bench.call("cost", *SMALL.split(), "--plot", "plot", limits=limits).ends((0, 2))


for size in LIMITS:
    TABLE.append(Attempt("disk", f"files of {size:,} bytes at most", partial(try_limit, size)))


@contextlib.contextmanager
def small_disk(bench: Bench, size_kb: int) -> Iterator[Path | None]:
    """A file system of that size; None where mounting is not allowed."""
    folder = bench.folder / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def try_disk(size_kb: int, bench: Bench) -> None:
    with small_disk(bench, size_kb) as disk:
        if disk is None:
            return
        words = [*bench.tiny(disk / "run"), "--train.steps=30", "--train.keep-checkpoints=0"]
        done = bench.call(*words).ends((0, 2))
        if done.code == 2 and "No space left" not in done.err:
            raise Unexpected(done.err[-400:])
        if not (disk / "run" / "run.json").exists():
            return
        steps = sorted(path.name for path in disk.glob("run/checkpoints/step_*"))
        for step in steps:
            bench.call("evaluate", disk / "run" / "checkpoints" / step).ends(0)
        remount = ["mount", "-o", "remount,size=50m", str(disk)]
        subprocess.run(remount, capture_output=True, check=True)
        bench.call(*words, "--resume").ends(0)


for size_kb in (4, 40, 120, 300):
    TABLE.append(Attempt("disk", f"a disk of {size_kb} kB", partial(try_disk, size_kb)))


# More than one process


@attempt("processes", "two runs into one folder")
def _(bench: Bench) -> None:
    """One trains, the other is refused, and what is there is a run as if it had been alone."""
    bench.call(*bench.tiny("first")).ends(0)  # the tokens are prepared
    words = [*bench.tiny("both"), "--train.steps=60"]
    both = [bench.start(*words) for _ in range(2)]
    codes = sorted(map(bench.wait, both))
    if codes != [0, 2]:
        raise Unexpected(f"exit codes {codes}")
    bench.call(*bench.tiny("alone"), "--train.steps=60").ends(0)
    same_weights(bench.folder / "both", bench.folder / "alone", 60)


@attempt("processes", "two that resume one run")
def _(bench: Bench) -> None:
    bench.call(*bench.tiny("both")).ends(0)
    words = [*bench.tiny("both"), "--train.steps=60", "--resume"]
    both = [bench.start(*words) for _ in range(2)]
    codes = sorted(map(bench.wait, both))
    if codes not in ([0, 2], [0, 0]):  # the second may come when the first is done
        raise Unexpected(f"exit codes {codes}")
    bench.call(*bench.tiny("alone"), "--train.steps=60").ends(0)
    lines = (bench.folder / "both/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    if steps != sorted(steps):
        raise Unexpected(f"rows of two runs: {steps}")


@attempt("processes", "four preparations of one corpus")
def _(bench: Bench) -> None:
    cache = bench.folder / "cache"
    words = ["prepare", *TINY[10:20], "--data.source", str(bench.corpus)]
    words += ["--data.cache-dir", str(cache)]
    codes = [*map(bench.wait, [bench.start(*words) for _ in range(4)])]
    if codes != [0] * 4:
        raise Unexpected(f"exit codes {codes}")
    if len(list(cache.iterdir())) != 1:
        raise Unexpected(f"in the cache: {list(cache.iterdir())}")
    if "preparing" in bench.call(*words).ends(0).err:
        raise Unexpected("it was prepared again")


def same_weights(one: Path, other: Path, step: int) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        ours, theirs = (run / "checkpoints" / f"step_{step}" / name for run in (one, other))
        if ours.read_bytes() != theirs.read_bytes():
            raise Unexpected(f"{name} of step {step} differs from that of an undisturbed run")


@attempt("processes", "killed while preparing")
def _(bench: Bench) -> None:
    cache = bench.folder / "cache"
    source = bench.folder / "a.txt"
    source.write_text(bench.corpus.read_text() * 40)
    words = ["prepare", "--data.source", str(source), "--data.cache-dir", str(cache)]
    words += ["--data.vocab-size", "300", "--data.documents", "line"]
    chance = random.Random(0)
    for _ in range(4):
        pid = bench.start(*words)
        deadline = time.monotonic() + 30
        while not (cache.exists() and any(cache.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.5)
        os.kill(pid, signal.SIGKILL)
        bench.wait(pid)
    bench.call(*words).ends(0)
    found = [path for path in cache.iterdir() if not path.name.startswith(".")]
    if len(found) != 1:
        raise Unexpected(f"in the cache: {found}")
    undisturbed = bench.folder / "undisturbed"
    bench.call(*[str(undisturbed) if word == str(cache) else word for word in words]).ends(0)
    (other,) = undisturbed.iterdir()
    ours, theirs = (contents(folder) for folder in (found[0], other))
    if {**ours, "verified.json": b""} != {**theirs, "verified.json": b""}:
        raise Unexpected("the tokens differ from those of an undisturbed preparation")


KILLS = 30
STEPS = 600


@attempt("processes", f"killed {KILLS} times and resumed")
def _(bench: Bench) -> None:
    """At random moments, also while saving; at the end as if nothing had happened, to the bit."""
    chance = random.Random(1)
    words = [*bench.tiny("killed"), f"--train.steps={STEPS}", "--train.save-every-steps=5"]
    words += ["--train.eval-every-steps=50"]
    bench.call(*bench.tiny("first")).ends(0)  # the tokens are prepared
    run = bench.folder / "killed"
    hits = 0
    for number in range(KILLS):
        resume = ["--resume"] if (run / "run.json").exists() else []
        pid = bench.start(*words, *resume)
        target = STEPS * (number + 1) // (KILLS + 2)
        deadline = time.monotonic() + 60
        saving = number % 2 == 0
        while time.monotonic() < deadline and bench.ended(pid) is None:
            names = os.listdir(run / "checkpoints") if (run / "checkpoints").exists() else []
            steps = [int(name[5:]) for name in names if name.startswith("step_")]
            unfinished = any(name.startswith(".") for name in names)
            if max(steps, default=0) >= target and (unfinished or not saving):
                time.sleep(chance.choice((0, 0, 0.001, 0.01, 0.03)))
                os.kill(pid, signal.SIGKILL)
                hits += bench.wait(pid) == -signal.SIGKILL
                break
    bench.call(*words, "--resume").ends(0)
    bench.call(*[word.replace("killed", "whole") for word in words]).ends(0)
    same_weights(run, bench.folder / "whole", STEPS)
    rows = [
        [
            {
                key: value
                for key, value in json.loads(line).items()
                if key not in ("tokens_per_s", "peak_bytes")
            }
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (run, bench.folder / "whole")
    ]
    if rows[0] != rows[1]:
        raise Unexpected("metrics.jsonl differs from that of an undisturbed run")
    if hits < KILLS * 2 // 3:
        raise Unexpected(f"only {hits} of {KILLS} kills met a living run")


@attempt("processes", "asked to stop at random moments")
def _(bench: Bench) -> None:
    """SIGTERM, at any moment, ends with 0 and a run that goes on, or before there is a run."""
    words = [*bench.tiny("asked"), "--train.steps=200", "--json"]
    bench.call(*bench.tiny("first")).ends(0)
    for number in range(8):
        resume = ["--resume"] if (bench.folder / "asked" / "run.json").exists() else []
        done = bench.call(*words, *resume, term_s=0.25 + 0.1 * number)
        if done.code == 0:
            done.json()
        elif done.code != -signal.SIGTERM:
            raise Unexpected(f"exit code {done.code}: {done.err[-300:]}")
    resume = ["--resume"] if (bench.folder / "asked" / "run.json").exists() else []
    bench.call(*words, *resume).ends(0)
    bench.call(*bench.tiny("whole"), "--train.steps=200").ends(0)
    same_weights(bench.folder / "asked", bench.folder / "whole", 200)
