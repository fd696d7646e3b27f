"""Attempts on the words of the command line: every number of every option, and files of settings.

The options are read off the configuration's own classes, so a new key is tried by itself.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import signal
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from crnet import architectures, linears, optimizers, schedules, streams
from crnet.cli import app
from crnet.config.sections import SECTIONS, RunConfig, field_name
from crnet.inference.sampling import Sampling
from hostile_bench import TABLE as TABLE
from hostile_bench import Attempt, Bench, Unexpected, attempt, untouched

VALUES = ("0", "-1", "nan", "inf", "-inf", "1e308", "-1e308", str(2**63), str(2**64))
CHOICES = {
    # seam: the section and the key by which one of its methods is chosen
    linears: ("model", "linear"),
    architectures: ("model", "architecture"),
    streams: ("model", "stream"),
    optimizers: ("optimizer", "name"),
    schedules: ("optimizer", "schedule"),
}


def numeric(cls: Any, before: str) -> Iterator[tuple[str, bool]]:
    """(flag, whether it is a whole number) of every number of a dataclass, nested ones too."""
    hints = typing.get_type_hints(cls)
    for each in dataclasses.fields(cls):
        flag = f"{before}{each.name.replace('_', '-')}"
        hint = hints[each.name]
        kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
        if dataclasses.is_dataclass(kinds[0]):
            yield from numeric(kinds[0], f"{flag}.")
        elif int in kinds or float in kinds:
            yield flag, int in kinds


def choosing(flag: str) -> list[str]:
    """The words that choose the method whose option a flag is; none for a key of a section."""
    section, *method = flag.removeprefix("--").split(".")[:-1]
    for seam, (where, key) in CHOICES.items():
        for name in seam.names():
            if section == where and [field_name(name).replace("_", "-")] == method:
                return [f"--{section}.{key}", name]
    return []


def try_number(words: Callable[[Bench], list[Any]], flag: str, whole: bool, bench: Bench) -> None:
    """No value may end in a traceback, hang, or pass for a number where it is none."""
    for value in VALUES:
        done = bench.call(*words(bench), f"{flag}={value}", term_s=6, seconds=25)
        name = flag.removeprefix("--").split("=")[0]
        if (
            not math.isfinite(float(value))
            or (whole and not value.lstrip("-").isdigit())
            or done.code == 2
        ):
            done.refused(name if not math.isfinite(float(value)) else name.rpartition(".")[0])
        elif done.code == 1:
            done.ends(1, "crnet: ")
        else:  # a profile of rounds without number goes on until it is asked to end
            done.ends((0, -signal.SIGTERM) if flag == "--rounds" else 0)


def training(flag: str, bench: Bench) -> list[Any]:
    return [*bench.tiny(f"run-{len(bench.outcomes)}"), "--train.steps", "2", *choosing(flag)]


def on_trained(command: str, bench: Bench) -> list[Any]:
    run = bench.folder / "run"
    return [command, run if run.exists() else bench.trained()]


for section in SECTIONS:
    kind = typing.get_type_hints(RunConfig)[section]
    for flag, whole in numeric(kind, f"--{section}."):
        act = partial(try_number, partial(training, flag), flag, whole)
        TABLE.append(Attempt(f"numbers of {section}", flag, act))
for flag, whole in numeric(Sampling, "--"):
    act = partial(try_number, partial(on_trained, "generate"), flag, whole)
    TABLE.append(Attempt("numbers of commands", f"generate {flag}", act))


def numbers_of(command: str) -> Iterator[tuple[str, bool]]:
    """(flag, whether whole) of the numbers among a command's own parameters."""
    function = app.command(command).function
    hints = typing.get_type_hints(function)
    for name in inspect.signature(function).parameters:
        kinds = typing.get_args(hints[name]) or (hints[name],)
        if int in kinds or float in kinds:
            yield f"--{name.replace('_', '-')}", int in kinds


def of_command(command: str, bench: Bench) -> list[Any]:
    small = ["--model.hidden-size", "16", "--model.intermediate-size", "24"]
    small += ["--model.num-layers", "2", "--model.num-heads", "2", "--model.rank", "4"]
    if command == "demo":
        return ["demo", "--quick", "--out", bench.folder / f"demo-{len(bench.outcomes)}"]
    if command == "evaluate":
        return [*on_trained("evaluate", bench), "--protocol", "sliding"]
    if command == "watch":
        return [*on_trained("watch", bench), "--once"]
    if command == "profile":
        small += ["--data.sequence-length", "16", "--data.vocab-size", "300"]
    return [command, *small]


for command in app.COMMANDS:
    for flag, whole in numbers_of(command):
        act = partial(try_number, partial(of_command, command), flag, whole)
        TABLE.append(Attempt("numbers of commands", f"{command} {flag}", act))


# Ranks, layers and other words with a grammar

WORDS = {
    "--model.rank": (
        *("", "x", "4x", "x4", "0", "-4", "4x0", "4x-1", "0.25", "nan", "nanh", "infh", "1e308h"),
        *(
            "4,",
            ",4",
            "4/",
            "4/q",
            "4/q=",
            "4/q=0",
            "4/z=4",
            "4/q=4/q=3",
            "4x99999999999",
            "9" * 30,
        ),
        *(
            "4x99999999999999999999",
            "0h",
            "-0.5h",
            "99h",
            "4.5",
            "\uff14",
            "4\n",
            "4/q=nanh",
            "1e-320h",
        ),
    ),
    "--train.recompute-layers": ("", "0", "-1", "99", "every-0", "every-", "1,,2", "9" * 30, "a"),
    "--train.device": (
        "",
        "meta",
        "cpu:99",
        "cuda:-1",
        "cuda:999",
        "xla",
        "cpu:x",
        "vulkan",
        "mps",
    ),
    "--data.text-key": ("", ",", " , ,", "\n"),
    "--data.subset": ("", "../.."),
    "--data.tokenizer": ("", ".", "/", "..", "/dev/null", "x\0y", "-", "a/b/c", "train/"),
    "--data.source": (
        "",
        ".x",
        "\n",
        "/dev/zero",
        "/dev/null",
        "/proc/self/mem",
        "~nobody/x",
        "**",
    ),
    "--data.cache-dir": ("", "/proc/x", "/dev/null", "/dev/null/x", "x" * 5000),
    "--data.documents": ("", "lines"),
    "--train.precision": ("", "fp64"),
    "--model.tie-embeddings": ("maybe", "2"),
}


def try_words(flag: str, bench: Bench) -> None:
    more = ["--train.recompute", "replay"] if "layers" in flag else []
    for number, word in enumerate(WORDS[flag]):
        if "\0" in word:
            continue  # no command line can hold it
        out = bench.folder / f"run-{number}"
        words = bench.tiny(out)
        done = bench.call(*words, *more, f"{flag}={word}", "--train.steps=1")
        if done.code == 0:
            continue
        done.refused("crnet: " if "crnet: " in done.err else flag)
        if out.exists():
            raise Unexpected(f"{flag}={word!r}: a run folder was left behind")


for flag in WORDS:
    TABLE.append(Attempt("words", flag, partial(try_words, flag)))


@attempt("words", "a device that holds no numbers")
def _(bench: Bench) -> None:
    bench.call(*bench.tiny(), "--train.device", "meta").refused("--train.device meta", "say cpu")
    run = bench.trained()
    bench.call("generate", run, "--device", "meta").refused("meta", "say cpu")
    bench.call("evaluate", run, "--device", "meta").refused("meta", "say cpu")


@attempt("words", "more memory than there is")
def _(bench: Bench) -> None:
    wide = ["--model.hidden-size=200000", "--model.num-heads=2", "--model.intermediate-size=200000"]
    done = bench.call(*bench.tiny(), *wide)
    done.ends((1, 2), "memory", "crnet cost")
    bench.call("cost", *wide).ends(0)


# Files of settings


def laughs() -> str:
    """A few lines of YAML that stand for a thousand million words."""
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join([*lines, "model: {rank: *a9}", ""])


DEEP = 100_000
SETTINGS: dict[str, tuple[str, str | bytes, tuple[str, ...]]] = {
    # what it is: file name, content, what the message holds
    "YAML that is too deep": ("a.yaml", "[" * DEEP, ("a.yaml",)),
    "YAML that is somewhat deep": ("a.yaml", "model: " + "[" * 300 + "]" * 300, ("a.yaml",)),
    "JSON that is too deep": ("a.json", '{"model":' * DEEP, ("a.json",)),
    "JSON lists that are too deep": ("a.json", "[" * DEEP + "]" * DEEP, ("a.json",)),
    "TOML that is too deep": ("a.toml", "model = " + "[" * DEEP + "]" * DEEP, ("a.toml",)),
    "YAML that holds itself": ("a.yaml", "model: &m\n  linear: *m\n", ("a.yaml",)),
    "YAML whose list holds itself": ("a.yaml", "model: {rank: &m [*m]}\n", ("a.yaml",)),
    "YAML whose top holds itself": ("a.yaml", "&m\nmodel: *m\n", ("a.yaml",)),
    "a billion laughs": ("a.yaml", laughs(), ("a.yaml",)),
    "YAML with a key twice": ("a.yaml", "train:\n  steps: 1\n  steps: 2\n", ("a.yaml", "steps")),
    "YAML with a section twice": (
        "a.yaml",
        "train: {steps: 1}\ntrain: {seed: 2}\n",
        ("a.yaml", "train", "twice"),
    ),
    "JSON with a key twice": ("a.json", '{"train":{"steps":1,"steps":2}}', ("a.json", "steps")),
    "TOML with a key twice": ("a.toml", "[train]\nsteps=1\nsteps=2\n", ("a.toml",)),
    "YAML that makes an object": (
        "a.yaml",
        "train: !!python/object/apply:os.system [echo]\n",
        ("a.yaml", "not well-formed"),
    ),
    "two YAML documents": ("a.yaml", "train: {steps: 1}\n---\ntrain: {steps: 2}\n", ("a.yaml",)),
    "YAML with a date": ("a.yaml", "train:\n  seed: 2020-01-01\n", ("seed", "2020-01-01")),
    "YAML with a binary": ("a.yaml", "train:\n  seed: !!binary aGk=\n", ("a.yaml", "seed")),
    "YAML with a set": ("a.yaml", "model:\n  rank: !!set {a, b}\n", ("a.yaml", "rank")),
    "YAML with a number for a key": ("a.yaml", "train: {1: 2}\n", ("a.yaml", "1")),
    "YAML with a list for a key": ("a.yaml", "train: {[1, 2]: 2}\n", ("a.yaml",)),
    "YAML with null for a key": ("a.yaml", "train: {null: 2}\n", ("a.yaml",)),
    "YAML with a number for a section": ("a.yaml", "1: {a: 2}\n", ("a.yaml", "1")),
    "YAML with nothing for a section": ("a.yaml", "train:\n", ("a.yaml", "train")),
    "YAML with nothing for a number": ("a.yaml", "train: {steps: }\n", ("steps",)),
    "YAML with yes for a number": ("a.yaml", "train: {steps: yes}\n", ("steps",)),
    "YAML with a list for a number": ("a.yaml", "train: {steps: [1, 2]}\n", ("steps",)),
    "YAML with a section for a number": ("a.yaml", "train: {steps: {a: 1}}\n", ("steps",)),
    "YAML with a tab": ("a.yaml", "train:\n\tsteps: 1\n", ("a.yaml", "not well-formed")),
    "YAML with a NUL": ("a.yaml", "train:\0\n", ("a.yaml",)),
    "YAML with not-a-number": ("a.yaml", "optimizer: {lr: .nan}\n", ("lr", "nan")),
    "JSON with not-a-number": ("a.json", '{"optimizer":{"lr":NaN}}', ("lr", "nan")),
    "JSON with infinity": ("a.json", '{"optimizer":{"lr":1e999}}', ("lr", "inf")),
    "JSON with a long number": ("a.json", '{"train":{"steps":' + "9" * 5000 + "}}", ("a.json",)),
    "YAML with a long number": ("a.yaml", "train: {steps: " + "9" * 5000 + "}", ("a.yaml",)),
    "YAML with a fraction that is whole": ("a.yaml", "train: {steps: 2.0}\n", ("steps", "2.0")),
    "settings in UTF-16": ("a.yaml", "train: {steps: 1}".encode("utf-16-be"), ("a.yaml",)),
    "settings that are a program": ("a.json", b"\x7fELF\0\0\1", ("a.json",)),
    "settings with half a pair": ("a.json", '{"data":{"source":["\\ud800"]}}', ("source",)),
    "a key of no section": ("a.yaml", "preset: llama-7b\n", ("a.yaml", "preset")),
    "a flag of the command": ("a.yaml", "resume: true\n", ("a.yaml", "resume")),
    "the folder of the command": ("a.yaml", "out: elsewhere\n", ("a.yaml", "out")),
    "files in a file": ("a.yaml", "config: [b.yaml]\n", ("a.yaml", "config")),
    "the inner name of sections": ("a.yaml", "settings: {train: {steps: 1}}\n", ("settings",)),
    "no source": ("a.yaml", "data: {source: []}\n", ("source",)),
}


def try_settings(kind: str, bench: Bench) -> None:
    name, content, holds = SETTINGS[kind]
    path = bench.folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = bench.tiny()
    # What the file speaks of is not on the command line, which would win.
    for flag in ("--train.steps", "--model.rank", "--data.source"):
        at = words.index(flag)
        if flag.split(".")[1] in str(content):
            del words[at : at + 2]
    with untouched(bench.folder):
        done = bench.call(*words, "--config", path, seconds=20)
        done.refused(*holds)
    if len(done.err) > 3000:
        raise Unexpected(f"the message is {len(done.err)} characters long")


for kind in SETTINGS:
    TABLE.append(Attempt("settings", kind, partial(try_settings, kind)))


@attempt("settings", "settings that are a folder, a pipe, or lead in a circle")
def _(bench: Bench) -> None:
    import os

    here = bench.folder
    (here / "folder.yaml").mkdir()
    (here / "circle.yaml").symlink_to("circle.yaml")
    (here / "gone.yaml").symlink_to("nowhere")
    os.mkfifo(here / "pipe.yaml")
    for name in ("folder.yaml", "circle.yaml", "gone.yaml", "pipe.yaml", "none.yaml/x.yaml"):
        words = [*bench.tiny(), "--config", here / name]
        bench.call(*words, seconds=10).refused("--config", name)
    long = "x" * 300 + ".yaml"
    bench.call(*bench.tiny(), "--config", long).refused("--config", "too long")


@attempt("settings", "a byte order mark is no part of the settings")
def _(bench: Bench) -> None:
    for name, text in (
        ("a.yaml", "train: {steps: 1}"),
        ("a.json", '{"train": {"steps": 1}}'),
        ("a.toml", "[train]\nsteps = 1"),
    ):
        path = bench.folder / name
        path.write_text("\ufeff" + text)
        words = bench.tiny(bench.folder / f"run-{name}")
        at = words.index("--train.steps")
        del words[at : at + 2]
        done = bench.call(*words, "--config", path, "--json").ends(0)
        if done.json()["step"] != 1:
            raise Unexpected(f"{name}: {done.json()['step']} steps, not 1")


@attempt("settings", "anchors of YAML may be used")
def _(bench: Bench) -> None:
    path = bench.folder / "a.yaml"
    path.write_text("train: {steps: &n 1, seed: *n}\n")
    words = bench.tiny()
    at = words.index("--train.steps")
    del words[at : at + 2]
    if bench.call(*words, "--config", path, "--json").ends(0).json()["step"] != 1:
        raise Unexpected("not one step")


@attempt("words", "one problem or all of them, each once")
def _(bench: Bench) -> None:
    done = bench.call(*bench.tiny(), "--train.steps=-1", "--optimizer.lr=nan", "--data.source=")
    done.refused("--train.steps is -1", "--optimizer.lr is nan")
    if done.err.count("lr is nan") != 1:
        raise Unexpected(f"said more than once: {done.err}")


@attempt("words", "plugins that are none")
def _(bench: Bench) -> None:
    for name, content in (
        ("folder.py", None),
        ("binary.py", b"\xff\xfe\0"),
        ("nul.py", b"x = '\0'"),
        ("deep.py", b"x = " + b"(" * 10_000),
        ("exit.py", b"import sys; sys.exit(0)"),
        ("text.txt", b""),
    ):
        path = bench.folder / name
        path.mkdir() if content is None else path.write_bytes(content)
        bench.call("list", "--plugins", path).refused("--plugins", name)
    Path(bench.folder / "circle.py").symlink_to("circle.py")
    bench.call("list", "--plugins", "circle.py").refused("--plugins", "circle.py")
