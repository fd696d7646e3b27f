"""What the program crnet sets around itself: the environment of its process, once, over nobody's
own values, with everything else as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crnet.cli import environment
from crnet.cli.app import main
from crnet.cli.environment import MALLOC, MARK, SWITCH, missing, take_flag
from crnet.parallel.cores import _granted, num_cores
from crnet.storage.manifest import VARIABLES, describe_environment
from test_cli import train_words
from test_train import rows_of, weights_of

ROOT = Path(__file__).parents[1]
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
BOTH = PASSIVE | {"GLIBC_TUNABLES": MALLOC}
GLIBC = environment.glibc() >= environment.FIRST_GLIBC
EXPECTED = BOTH if GLIBC else PASSIVE

# A plugin is the first that runs after the environment is set: it tells what it finds.
PROBE = """
import json, os, re, sys
block = bytearray(1 << 26)
heap = 0
if os.path.exists("/proc/self/maps"):
    for line in open("/proc/self/maps"):
        if line.rstrip().endswith("[heap]"):
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            heap += last - first
print(json.dumps({
    "variables": {name: os.environ.get(name) for name in %r},
    "pid": os.getpid(), "words": sys.orig_argv, "heap": heap, "stdin": sys.stdin.read(),
    "warn": sys.warnoptions, "utf8": sys.flags.utf8_mode, "no_user_site": sys.flags.no_user_site,
}), flush=True)
raise SystemExit(3)
"""


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    path = tmp_path / "probe.py"
    path.write_text(PROBE % (VARIABLES,), encoding="utf-8")
    return path


def started(
    *words: str, environ: dict[str, str] | None = None, start: list[str] | None = None
) -> tuple[dict[str, Any], subprocess.Popen[str]]:
    """What a plugin finds in the program that was started with these words, and the process."""
    clean = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, SWITCH)}
    process = subprocess.Popen(
        [*(start or [sys.executable, "-m", "crnet"]), *words],
        env=clean | (environ or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = process.communicate("three\nwords\n", timeout=60)
    assert "Traceback" not in err
    return json.loads(out), process


def set_there(found: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in found["variables"].items() if value is not None}


few_cores = pytest.mark.skipif(
    num_cores() > environment.MOST_CORES, reason="many cores: nothing is set"
)


@few_cores
def test_the_program_sets_its_environment(probe: Path) -> None:
    found, process = started("train", "--plugins", str(probe))
    assert set_there(found) == EXPECTED | {MARK: ",".join(EXPECTED)}
    assert found["pid"] == process.pid
    assert found["stdin"] == "three\nwords\n"
    assert process.returncode == 2  # the plugin's end is bad input, as without a second execution
    assert found["words"].count("crnet_executed") == GLIBC


@few_cores
@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_malloc_keeps_large_blocks(probe: Path) -> None:
    """64 MiB lie in the heap, which is what lets them be used again."""
    for flags, inside in (([], True), (["--no-tune-process"], False)):
        found, _ = started("train", "--plugins", str(probe), *flags)
        assert (found["heap"] >= 1 << 26) == inside


@few_cores
def test_options_of_the_interpreter_stay(probe: Path) -> None:
    start = [sys.executable, "-W", "ignore::UserWarning", "-X", "utf8", "-s", "-m", "crnet"]
    found, _ = started("train", "--plugins", str(probe), start=start)
    assert set_there(found) == EXPECTED | {MARK: ",".join(EXPECTED)}
    assert found["warn"] == ["ignore::UserWarning"]
    assert (found["utf8"], found["no_user_site"]) == (1, 1)


@few_cores
def test_the_installed_script(probe: Path, tmp_path: Path) -> None:
    script = tmp_path / "crnet"
    script.write_text("import sys\nfrom crnet.cli.app import main\nsys.exit(main())\n")
    start = [sys.executable, str(script)]
    found, process = started("--plugins", str(probe), "evaluate", "run", start=start)
    assert set_there(found) == EXPECTED | {MARK: ",".join(EXPECTED)}
    assert (found["pid"], process.returncode) == (process.pid, 2)


@few_cores
@pytest.mark.parametrize(
    ("own", "added"),
    [
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["GLIBC_TUNABLES"]),
        ({"GOMP_SPINCOUNT": "77"}, ["GLIBC_TUNABLES"]),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, ["OMP_WAIT_POLICY"]),
        ({"MALLOC_ARENA_MAX": "1"}, ["OMP_WAIT_POLICY"]),
        (EXPECTED, []),
    ],
    ids=lambda value: ",".join(value),
)
def test_values_of_the_user_stay(probe: Path, own: dict[str, str], added: list[str]) -> None:
    added = [name for name in added if name in EXPECTED]
    found, _ = started("train", "--plugins", str(probe), environ=own)
    marked = {MARK: ",".join(added)} if added else {}
    assert set_there(found) == own | {name: BOTH[name] for name in added} | marked


@pytest.mark.parametrize(
    ("words", "environ"),
    [
        (["train", "--no-tune-process"], {}),
        (["train"], {SWITCH: "0"}),
        (["list"], {}),
        (["cost", "tiny"], {}),
        (["train", "--help"], {}),
    ],
)
def test_nothing_is_set(probe: Path, words: list[str], environ: dict[str, str]) -> None:
    found, _ = started(*words, "--plugins", str(probe), environ=environ)
    assert set_there(found) == {}
    assert "crnet_executed" not in found["words"]


def test_nothing_happens_to_who_imports_the_package(probe: Path) -> None:
    program = "from crnet.cli.app import main; main()"
    found, _ = started("train", "--plugins", str(probe), start=[sys.executable, "-c", program])
    assert set_there(found) == {}


@few_cores
@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_an_environment_that_is_lost_is_no_endless_loop(probe: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nfor name in {[*BOTH, MARK]}: os.environ.pop(name, None)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    found, _ = started("train", "--plugins", str(probe), environ={"PYTHONPATH": path})
    assert set_there(found) == PASSIVE | {MARK: "OMP_WAIT_POLICY"}


def test_a_switch_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SWITCH, "yes")
    monkeypatch.setattr(sys, "argv", ["crnet", "train"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"{SWITCH} is 'yes'; it must be 0 or 1" in capsys.readouterr().err


def test_the_flag_is_refused_where_it_has_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["list", "--no-tune-process"])
    assert ended.value.code
    assert "--no-tune-process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platform", "libc", "cores", "environ", "names"),
    [
        ("linux", (2, 36), 2, {}, ["OMP_WAIT_POLICY", "GLIBC_TUNABLES"]),
        ("linux", (2, 36), 8, {}, ["OMP_WAIT_POLICY", "GLIBC_TUNABLES"]),
        ("linux", (2, 36), 9, {}, []),
        ("linux", (2, 34), 2, {}, ["OMP_WAIT_POLICY"]),
        ("linux", (), 2, {}, ["OMP_WAIT_POLICY"]),  # musl
        ("darwin", (), 2, {}, ["OMP_WAIT_POLICY"]),
        ("linux", (2, 36), 2, {"LD_PRELOAD": "libjemalloc.so"}, ["OMP_WAIT_POLICY"]),
        ("linux", (2, 36), 2, {"KMP_BLOCKTIME": "0"}, ["GLIBC_TUNABLES"]),
    ],
)
def test_missing(
    platform: str, libc: tuple[int, ...], cores: int, environ: dict[str, str], names: list[str]
) -> None:
    assert list(missing(environ, platform, libc, cores)) == names


@pytest.mark.parametrize(
    ("content", "cores"),
    [("max 100000", None), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1)],
)
def test_cores_of_a_control_group(tmp_path: Path, content: str, cores: int | None) -> None:
    file = tmp_path / "cpu.max"
    assert _granted(file) is None
    file.write_text(content)
    assert _granted(file) == cores


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("train --no-tune-process tiny", "train tiny"),
        ("--plugins a.py train --no-tune-process", "--plugins a.py train"),
        ("generate run -- --no-tune-process", "generate run -- --no-tune-process"),
        ("cost --no-tune-process", "cost --no-tune-process"),
    ],
)
def test_the_flag_is_taken_from_the_words(words: str, kept: str) -> None:
    assert take_flag(words.split()) == kept.split()


@pytest.mark.slow
@few_cores
def test_a_run_says_what_was_set_and_has_the_same_numbers(corpus: Path, tmp_path: Path) -> None:
    """Bit for bit: the environment is a matter of time alone."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    run_with: Callable[[Path, list[str]], Any] = lambda out, flags: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "crnet", *train_words(corpus, out, train__threads="2"), *flags],
        env=clean,
        check=True,
        capture_output=True,
    )
    tuned, plain = tmp_path / "tuned", tmp_path / "plain"
    run_with(tuned, [])
    run_with(plain, ["--no-tune-process"])
    said = [json.loads((out / "run.json").read_text())["environment"] for out in (tuned, plain)]
    assert said == [EXPECTED | {MARK: ",".join(EXPECTED)}, {}]
    ours, theirs = weights_of(tuned), weights_of(plain)
    assert all(weight.equal(theirs[name]) for name, weight in ours.items())
    assert rows_of(tuned)[-1] == rows_of(plain)[-1]


def test_only_named_variables_are_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "x")
    monkeypatch.setenv("OMP_PLACES", "cores")
    said = describe_environment()
    assert said["OMP_PLACES"] == "cores"
    assert set(said) <= set(VARIABLES)
