"""Attempts with files: corpora, prepared tokens, checkpoints, what else lies in a run folder."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import shutil
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hostile_bench import TABLE, Attempt, Bench, Outcome, Unexpected, attempt, untouched

TEXT = "".join(f"Paragraph {n} of a short text, with a few words in it.\n\n" for n in range(300))
RECORDS = "".join(
    json.dumps({"text": f"record number {n}, a few words"}) + "\n" for n in range(300)
)


def zst(content: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(content)


def middle(content: bytes) -> bytes:
    """With one bit of the middle flipped."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "zst": zst,
}


def prepare(bench: Bench, source: str | Path, *more: str, **options: Any) -> Outcome:
    documents = options.pop("documents", "paragraph")
    words = ["--data.vocab-size", "300", "--data.documents", documents]
    words += ["--data.cache-dir", str(bench.folder / "cache")]
    return bench.call(
        "prepare", "--json", "--data.source", source, *words, "--data.validation-frac", "0.2",
        *more, **options,
    )  # fmt: skip


def no_cache_is_left(bench: Bench) -> None:
    cache = bench.folder / "cache"
    left = [path.name for path in cache.iterdir()] if cache.exists() else []
    if left:
        raise Unexpected(f"left in the cache: {left}")


# Corpora

CORPORA: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    # what it is: file name, content, what the message holds; without words: it can be read
    "empty": ("a.txt", b"", ("a.txt", "holds no text")),
    "empty records": ("a.jsonl", b"", ("a.jsonl", "holds no text")),
    "empty .gz": ("a.txt.gz", b"", ("a.txt.gz",)),
    "empty .zst": ("a.txt.zst", b"", ("a.txt.zst",)),
    "empty .xz": ("a.txt.xz", b"", ("a.txt.xz",)),
    "empty .parquet": ("a.parquet", b"", ("a.parquet",)),
    "a .parquet that is text": ("a.parquet", TEXT.encode(), ("a.parquet",)),
    "a .gz that is text": ("a.txt.gz", TEXT.encode(), ("a.txt.gz",)),
    "a .zst that is text": ("a.txt.zst", TEXT.encode(), ("a.txt.zst",)),
    "a .xz that is text": ("a.txt.xz", TEXT.encode(), ("a.txt.xz",)),
    "a byte order mark": ("a.txt", b"\xef\xbb\xbf" + TEXT.encode(), ()),
    "a byte order mark before records": ("a.jsonl", b"\xef\xbb\xbf" + RECORDS.encode(), ()),
    "NULs": ("a.txt", TEXT.replace("few", "\0").encode(), ()),
    "UTF-16": ("a.txt", TEXT.encode("utf-16"), ("a.txt", "iconv")),
    "a cut character": ("a.txt", (TEXT + "é").encode()[:-1], ("a.txt", "byte")),
    "UTF-8 of a surrogate": ("a.txt", TEXT.encode() + b"\xed\xa0\x80", ("a.txt", "byte")),
    "line ends of three kinds": ("a.txt", TEXT.replace("\n\n", "\r\n\r\r\n").encode(), ()),
    "a text without a line end": ("a.txt", TEXT.rstrip().encode(), ()),
    "mixed records": ("a.jsonl", RECORDS.encode() + b'{"body": "x"}\n', ("a.jsonl:301", "text")),
    "records of other types": ("a.jsonl", RECORDS.encode() + b'"x"\n[1]\n', ("a.jsonl:301",)),
    "a number for a text": ("a.jsonl", b'{"text": 1}\n', ("a.jsonl:1", "int")),
    "records cut off": ("a.jsonl", RECORDS.encode()[:-9], ("a.jsonl:300", "not a JSON record")),
    "records too deep": ("a.jsonl", b'{"text": ' + b"[" * 200_000, ("a.jsonl:1",)),
    "records that close too deep": (
        "a.jsonl",
        b'{"text": "x", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        ("a.jsonl:1",),
    ),
    "a record with a long number": (
        "a.jsonl",
        b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n",
        ("a.jsonl:1",),
    ),
    "a record with half a pair": ("a.jsonl", b'{"text": "\\ud800"}\n', ("a.jsonl:1", "surrogate")),
    "a record with its text twice": (
        "a.jsonl",
        b'{"text": "x", "text": "y"}\n',
        ("a.jsonl:1", "twice"),
    ),
    "records of null": ("a.jsonl", b'{"text": null}\n' * 9, ("holds no text",)),
    "a list of records": ("a.json", b'[{"text": "x"}]', ("a.json:1", "jq")),
    "an object over many lines": ("a.json", b'{\n"text": "x"\n}\n', ("a.json:1", "jq")),
    "records with NULs": ("a.jsonl", RECORDS.replace("few", "\\u0000").encode(), ()),
    "records that are no UTF-8": ("a.jsonl", b'{"text": "\xff"}\n', ("a.jsonl", "byte 10")),
}


def try_corpus(kind: str, bench: Bench) -> None:
    name, content, holds = CORPORA[kind]
    path = bench.folder / name
    path.write_bytes(content)
    before = path.read_bytes()
    done = prepare(bench, path)
    if holds:
        done.refused(*holds)
        no_cache_is_left(bench)
    else:
        found = done.ends(0).json()
        if found["parts"]["train"]["documents"] + found["parts"]["validation"]["documents"] < 290:
            raise Unexpected(f"documents were lost: {found['parts']}")
    if path.read_bytes() != before:
        raise Unexpected("the source has changed")


for kind in CORPORA:
    TABLE.append(Attempt("corpora", kind, partial(try_corpus, kind)))


def try_packed(ending: str, bench: Bench) -> None:
    """Cut off anywhere, or with one bit flipped, a packed file is never taken for a whole one."""
    whole = PACKED[ending](TEXT.encode())
    path = bench.folder / f"a.txt.{ending}"
    path.write_bytes(whole)
    wanted = prepare(bench, path).ends(0).json()["parts"]
    for size in (1, 5, len(whole) // 2, len(whole) - 9, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:size])
        prepare(bench, path).refused(path.name, "again")
    path.write_bytes(whole + whole)
    twice = prepare(bench, path).ends(0).json()["parts"]
    if sum(p["text_bytes"] for p in twice.values()) != 2 * sum(
        p["text_bytes"] for p in wanted.values()
    ):
        raise Unexpected("a second stream in the file was not read")
    path.write_bytes(middle(whole))
    done = prepare(bench, path)
    if done.code == 0 and done.json()["parts"] == wanted:
        return  # the bit was one of no meaning
    if done.code == 0 and ending == "zst":
        return  # this file has no checksum; the format leaves it to whoever packs
    done.refused(path.name)


for ending in PACKED:
    TABLE.append(Attempt("corpora", f"a damaged .{ending}", partial(try_packed, ending)))


@attempt("corpora", "things that are no files")
def _(bench: Bench) -> None:
    here = bench.folder
    (here / "folder").mkdir()
    (here / "folder" / "a.txt").write_text(TEXT)
    os.mkfifo(here / "folder" / "pipe.txt")
    os.mkfifo(here / "pipe.txt")
    (here / "circle.txt").symlink_to("circle.txt")
    (here / "gone.txt").symlink_to("nowhere.txt")
    for source in ("folder", "pipe.txt", "circle.txt", "gone.txt", "/dev/zero", "/dev/tty"):
        prepare(bench, source, seconds=10).refused(source)
    (here / "folder" / "pipe.txt").unlink()
    (here / "folder" / "gone.txt").symlink_to("nowhere.txt")
    prepare(bench, "folder").refused("gone.txt")
    (here / "folder" / "gone.txt").unlink()
    (here / "folder" / "up").symlink_to("..")
    prepare(bench, "folder", seconds=20).refused("up")


@attempt("corpora", "a line of 200 MB, in bounded memory")
def _(bench: Bench) -> None:
    path = bench.folder / "a.txt"
    word = b"The quick brown fox jumps over the lazy dog, over and over. "
    with path.open("wb") as file:
        for _ in range(200):
            file.write(word * (1_000_000 // len(word)))
    limit = {"RLIMIT_AS": 1 << 30}
    words = ("--data.max-documents", "3000")
    done = prepare(bench, path, *words, documents="auto", limits=limit, seconds=60)
    found = done.ends(0).json()
    if sum(part["documents"] for part in found["parts"].values()) != 3000:
        raise Unexpected(f"{found['parts']}")
    path.rename(path.with_suffix(".jsonl"))
    prepare(bench, path.with_suffix(".jsonl"), seconds=60, limits=limit).refused("a.jsonl:1")


@attempt("corpora", "a source that grows while it is read")
def _(bench: Bench) -> None:
    path = bench.folder / "a.txt"
    path.write_text(TEXT * 2000)
    words = ["prepare", "--data.source", str(path), "--data.cache-dir", str(bench.folder / "cache")]
    pid = bench.start(*words, "--data.vocab-size", "300", "--data.documents", "line")
    deadline = time.monotonic() + 60
    cache = bench.folder / "cache"
    while not (cache.exists() and any(cache.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.01)
    with path.open("a") as file:
        file.write("One line more.\n")
    if (code := bench.wait(pid)) != 2:
        raise Unexpected(f"exit code {code}, not 2")
    no_cache_is_left(bench)


@attempt("corpora", "a corpus that changes between preparing, training and going on")
def _(bench: Bench) -> None:
    path = bench.folder / "a.txt"
    path.write_text(TEXT)
    held_out = bench.folder / "held-out.txt"
    held_out.write_text(TEXT)
    words = [*bench.tiny("run", path), "--data.validation-source", held_out]
    bench.call(*words).ends(0)
    words[words.index("--train.steps") + 1] = "6"
    # As many documents, tokens and bytes, and the same tokenizer: only their order differs.
    path.write_text("\n\n".join(reversed(TEXT.strip().split("\n\n"))) + "\n\n")
    with untouched(bench.folder / "run"):
        bench.call(*words, "--resume").ends(2, "corpus", "restore it")
    path.unlink()
    with untouched(bench.folder / "run"):
        bench.call(*words, "--resume").refused("a.txt", "no such file")


# Prepared tokens


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change keys of meta.json; with ``forged``, its own hash is made to fit."""

    def damage(folder: Path) -> None:
        path = folder / "meta.json"
        meta = json.loads(path.read_text())
        for key, value in changes.items():
            at = meta
            *above, last = key.split("__")
            for word in above:
                at = at[word]
            at[last] = value
        path.write_text(json.dumps(meta))

    return damage


def forged(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """Damage whose author also wrote the hash anew."""

    def act(folder: Path) -> None:
        from crnet.data.shards import _meta_hash

        damage(folder)
        path = folder / "meta.json"
        meta = json.loads(path.read_text())
        meta["sha256"] = _meta_hash(meta)
        path.write_text(json.dumps(meta))

    return act


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return act


def flip(name: str, keep_times: bool = False) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / name
        was = path.stat()
        with path.open("r+b") as file:
            content = middle(file.read())
            file.seek(0)
            file.write(content)
        if keep_times:
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))

    return act


def large_id(folder: Path) -> None:
    path = folder / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[100:102] = struct.pack("<H", 65535)
    path.write_bytes(content)


def replace_by(kind: str, name: str) -> Callable[[Path], None]:
    """A file is lost, cut, emptied, or something else has its name."""

    def act(folder: Path) -> None:
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        if kind == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif kind == "emptied":
            path.write_bytes(b"")
        elif kind == "a folder":
            path.mkdir()
        elif kind == "a link that leads nowhere":
            path.symlink_to("nowhere")
        elif kind == "a link to itself":
            path.symlink_to(name)
        elif kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a link to a like file":
            other = folder.parent / f"other-{name}"
            if name == "checksums.json":  # its middle may speak of the state, which nobody reads
                content = content.replace(b'"sha256": "', b'"sha256": "0')
            other.write_bytes(content if name == "checksums.json" else middle(content))
            path.symlink_to(other)

    return act


KINDS = ("deleted", "truncated", "emptied", "a folder", "a link that leads nowhere")
KINDS += ("a link to itself", "a pipe", "a link to a like file")

CACHE: dict[str, Callable[[Path], None]] = {
    "a token outside the vocabulary": large_id,
    "a flipped token": flip("train-00000.bin"),
    "a flipped token, times as before": flip("train-00000.bin", keep_times=True),
    "a flipped token of validation": flip("validation-00000.bin"),
    "a flipped start of a document": flip("train-00000.idx"),
    "a flipped sign of the tokenizer": flip("tokenizer.json"),
    "meta.json that is empty": write("meta.json", ""),
    "meta.json that is a list": write("meta.json", "[]"),
    "meta.json that is too deep": write("meta.json", "[" * 100_000),
    "meta.json that is binary": write("meta.json", b"\xff\0"),
    "meta.json with a key twice": write("meta.json", '{"format": 2, "format": 2}'),
    "meta.json without parts": edit(parts={}),
    "meta.json with parts of numbers": edit(parts={"train": 1, "validation": 2}),
    "meta.json with another vocabulary": edit(vocab_size=5),
    "meta.json with a word for a vocabulary": edit(vocab_size="many"),
    "meta.json with another end": edit(eos_id=7),
    "meta.json with another type": edit(dtype="float64"),
    "meta.json with fewer tokens": edit(parts__train__tokens=3),
    "meta.json with a new key": edit(more=1),
    "meta.json of another format": edit(format=99),
    "meta.json that leads out": forged(
        edit(files={"../../../corpus.txt": {"bytes": 1, "sha256": ""}})
    ),
    "meta.json whose shard leads out": forged(
        edit(parts__train__shards=[{"name": "../../x", "tokens": 1, "documents": 1}])
    ),
    "meta.json with a forged type": forged(edit(vocab_size="many", eos_id=None, parts=3)),
    "meta.json with forged numbers": forged(edit(parts__train__tokens=-1)),
    "verified.json that is broken": lambda folder: (
        write("verified.json", "{")(folder),
        flip("train-00000.bin")(folder),
    )[0],
}
for kind in KINDS:
    for name in ("meta.json", "train-00000.bin", "train-00000.idx", "tokenizer.json"):
        CACHE[f"{name} is {kind}"] = replace_by(kind, name)


def try_cache(kind: str, bench: Bench) -> None:
    """Damage is noticed, said, and mended: the tokens are made again and are what they were."""
    folder, words = bench.cached()
    if not (folder / "validation-00000.bin").exists():
        raise Unexpected("nothing is held out")
    keep = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "verified.json"}
    CACHE[kind](folder)
    done = bench.call("prepare", "--json", *words, seconds=15)
    done.ends(0, "preparing it again")
    now = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "verified.json"}
    if now != keep:
        raise Unexpected("the tokens made again are not those of before")
    done = bench.call("prepare", *words).ends(0)
    if "again" in done.err:
        raise Unexpected("prepared a third time")


for kind in CACHE:
    TABLE.append(Attempt("prepared tokens", kind, partial(try_cache, kind)))


@attempt("prepared tokens", "a copy is found whole without being made again")
def _(bench: Bench) -> None:
    folder, words = bench.cached()
    (folder / "verified.json").unlink()
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)
    if "preparing" in bench.call("prepare", *words).ends(0).err:
        raise Unexpected("made again")
    if not (folder / "verified.json").exists():
        raise Unexpected("it would be hashed at every start")


# Checkpoints

FILES = ("model.safetensors", "state.pt", "checkpoint.json", "checksums.json", "tokenizer.json")


def try_checkpoint(name: str, kind: str, bench: Bench) -> None:
    """Named itself it is refused; the run goes on from the one before, and nothing is lost."""
    run = bench.trained()
    folder = run / "checkpoints" / "step_4"
    (flip(name) if kind == "flipped" else replace_by(kind, name))(folder)
    with untouched(run):
        # An evaluation may leave alone what it does not read, the optimizer's state and its sum.
        is_left = name == "state.pt" or (name, kind) == ("checksums.json", "flipped")
        codes = (0, 2) if is_left else 2
        bench.call("evaluate", folder, seconds=15).ends(codes, *([] if codes != 2 else ["step_4"]))
        bench.call("generate", folder, "--max-tokens", "3", seconds=15).ends(codes)
    done = bench.call(*bench.tiny(run), "--train.steps=6", "--resume", "--json", seconds=20)
    done.ends(0, "step_4", "trying the one before it")
    if done.json()["step"] != 6:
        raise Unexpected(f"step {done.json()['step']}")
    want = bench.root / "trained-6"
    if not want.exists():
        shutil.copytree(bench.root / "trained", want)
        shutil.rmtree(want / "checkpoints" / "step_4")
        bench.call(*bench.tiny(want), "--train.steps=6", "--resume").ends(0)
    for each in ("model.safetensors", "tokenizer.json"):
        ours, theirs = (f / "checkpoints" / "step_6" / each for f in (run, want))
        if ours.read_bytes() != theirs.read_bytes():
            raise Unexpected(f"{each} differs from that of a run that was never damaged")


for name in FILES:
    for kind in ("flipped", *KINDS):
        act = partial(try_checkpoint, name, kind)
        TABLE.append(Attempt("checkpoints", f"{name} {kind}", act))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def with_sums(folder: Path, name: str, content: bytes) -> None:
    """Write a file and make the checksums fit: damage that a hash does not show."""
    import hashlib

    (folder / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_json(folder / "checksums.json", lambda sums: sums | {name: entry})


DESCRIPTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda found: [],
    "of another format": lambda found: found | {"format": 99},
    "without a configuration": lambda found: found | {"config": None},
    "with a configuration of another type": lambda found: found | {"config": {"model": 3}},
    "with an unknown key": lambda found: found | {"config": found["config"] | {"more": 1}},
    "with a step that is a word": lambda found: found | {"step": "four"},
    "with a step below zero": lambda found: found | {"step": -1},
    "with a step of another number": lambda found: found | {"step": 3},
    "with a huge step": lambda found: found | {"step": 10**30},
    "with a position below zero": lambda found: found | {"position": -5},
    "with tokens that are a list": lambda found: found | {"tokens": []},
    "without hashes": lambda found: found | {"extra": {}},
    "with hashes of another type": lambda found: found | {"extra": 5},
    "with another width": lambda found: _width(found, 32),
    "with a width that is a word": lambda found: _width(found, "x"),
    "with a width below zero": lambda found: _width(found, -16),
}


def _width(found: dict[str, Any], size: Any) -> dict[str, Any]:
    found["config"]["model"]["hidden_size"] = size
    return found


def try_description(kind: str, bench: Bench) -> None:
    run = bench.trained()
    folder = run / "checkpoints" / "step_4"
    found = DESCRIPTIONS[kind](json.loads((folder / "checkpoint.json").read_text()))
    with_sums(folder, "checkpoint.json", json.dumps(found).encode())
    for command in (["evaluate", folder], ["generate", folder, "--max-tokens", "2"]):
        done = bench.call(*command)
        if done.code:
            done.refused("step_4")
    done = bench.call(*bench.tiny(run), "--train.steps=6", "--resume")
    if done.code:
        done.refused("crnet: ")


for kind in DESCRIPTIONS:
    TABLE.append(
        Attempt("checkpoints", f"a forged description {kind}", partial(try_description, kind))
    )


@attempt("checkpoints", "checksums that lead out of the folder")
def _(bench: Bench) -> None:
    run = bench.trained()
    folder = run / "checkpoints" / "step_4"
    secret = bench.folder / "secret"
    secret.write_text("x")
    for name in ("../../../secret", str(secret), "..", ".", "", "a/../../../../secret", "x\0y"):
        entry = {"bytes": 1, "sha256": "0" * 64}
        copy = (folder / "checksums.json").read_text()
        edit_json(folder / "checksums.json", lambda sums, n=name, e=entry: sums | {n: e})
        bench.call("evaluate", folder).refused("checksums.json")
        (folder / "checksums.json").write_text(copy)
    if secret.read_text() != "x":
        raise Unexpected("a file outside was touched")


def other_weights(change: Callable[[dict[str, Any]], dict[str, Any]], *holds: str) -> Any:
    def act(bench: Bench) -> None:
        import safetensors.torch

        run = bench.trained()
        folder = run / "checkpoints" / "step_4"
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        with_sums(folder, "model.safetensors", safetensors.torch.save(change(weights)))
        bench.call("generate", folder, "--max-tokens", "3").refused(*holds)
        done = bench.call("evaluate", folder, "--json")
        done.json() if done.code == 0 else done.ends((1, 2), *holds[:1])

    return act


def named(weights: dict[str, Any], was: str, now: str) -> dict[str, Any]:
    return {now if name == was else name: weight for name, weight in weights.items()}


NORM, HEAD = "model.norm.weight", "lm_head.weight"
for kind, change, holds in (
    ("not a number", lambda w: w | {HEAD: w[HEAD] * float("nan")}, ("not finite", "earlier")),
    ("infinite", lambda w: w | {HEAD: w[HEAD] / 0}, ("not finite", "earlier")),
    ("of another shape", lambda w: w | {HEAD: w[HEAD][:5].clone()}, ("step_4", HEAD, "shape")),
    ("of another type", lambda w: w | {HEAD: w[HEAD].double()}, ("step_4", HEAD, "dtype")),
    ("without one", lambda w: {k: v for k, v in w.items() if k != HEAD}, ("step_4", "is missing")),
    ("named as a path", lambda w: named(w, HEAD, "../../x"), ("step_4", "../../x is unknown")),
    ("none at all", lambda w: {}, ("step_4", "is missing")),
):
    act = other_weights(change, *holds)
    TABLE.append(Attempt("checkpoints", f"weights {kind}", act))


@attempt("checkpoints", "a state that would run a program")
def _(bench: Bench) -> None:
    import pickle

    import torch

    class Attack:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {bench.folder}/attacked",)

    run = bench.trained()
    folder = run / "checkpoints" / "step_4"
    torch.save({"optimizer": Attack()}, bench.folder / "a.pt")
    for content in (pickle.dumps(Attack()), (bench.folder / "a.pt").read_bytes(), b"", b"PK\3\4x"):
        with_sums(folder, "state.pt", content)
        done = bench.call(*bench.tiny(run), "--train.steps=6", "--resume")
        done.refused("state.pt")
        if (bench.folder / "attacked").exists():
            raise Unexpected("the program was run")


@attempt("checkpoints", "a state of other things")
def _(bench: Bench) -> None:
    import io

    import torch

    run = bench.trained()
    folder = run / "checkpoints" / "step_4"
    good = torch.load(folder / "state.pt", weights_only=True)
    for state in ({}, [], {"optimizer": {}, "torch_rng": 1}, good | {"optimizer": None}):
        file = io.BytesIO()
        torch.save(state, file)
        with_sums(folder, "state.pt", file.getvalue())
        bench.call(*bench.tiny(run), "--train.steps=6", "--resume").refused("state.pt")


# What else lies in a run folder

RUN_JSON: dict[str, tuple[Callable[[dict[str, Any]], Any], bool]] = {
    # what is wrong: change, whether the run can go on all the same
    "is a list": (lambda found: [found], False),
    "has no configuration": (lambda found: {}, False),
    "has a list for a configuration": (lambda found: found | {"config": []}, False),
    "has a word for a section": (lambda found: _config(found, train="x"), False),
    "has an unknown section": (lambda found: _config(found, more={}), False),
    "has an unknown key": (lambda found: _config(found, train={"stepz": 3}), False),
    "has a word for a number": (lambda found: _config(found, train={"steps": "many"}), False),
    "has a list for a name": (lambda found: _config(found, preset=["tiny"]), False),
    "has a preset that is gone": (lambda found: _config(found, preset="gone"), False),
    "has plugins that are no list": (lambda found: found | {"plugins": 5}, False),
    "has plugins without names": (lambda found: found | {"plugins": [{}]}, False),
    "has plugins of numbers": (lambda found: found | {"plugins": [3]}, False),
    "has a plugin that is not loaded": (
        lambda found: found | {"plugins": [{"name": "x", "sha256": "y"}]},
        False,
    ),
    "has earlier starts that are no list": (lambda found: found | {"earlier_starts": 5}, True),
    "has only its configuration": (lambda found: {"config": found["config"]}, True),
    "is of another version": (lambda found: found | {"crnet": "99.0"}, True),
}


def _config(found: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return found | {"config": found["config"] | changes}


def try_run_json(kind: str, bench: Bench) -> None:
    change, goes_on = RUN_JSON[kind]
    run = bench.trained()
    edit_json(run / "run.json", change)
    before = (run / "run.json").read_text()
    words = ["train", "--resume", "--out", run, "--train.steps=6"]
    if goes_on:
        bench.call(*words).ends(0)
        return
    with untouched(run):
        bench.call(*words).refused("crnet: ")
        bench.call(*bench.tiny(run)).refused("crnet: ")
    if (run / "run.json").read_text() != before:
        raise Unexpected("run.json has changed")


for kind in RUN_JSON:
    TABLE.append(Attempt("run folders", f"run.json {kind}", partial(try_run_json, kind)))


@attempt("run folders", "run.json that is broken, too deep, or no file")
def _(bench: Bench) -> None:
    run = bench.trained()
    words = ["train", "--resume", "--out", run]
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"config": {}, "config": {}}', b"\0"):
        (run / "run.json").write_bytes(content)
        with untouched(run):
            bench.call(*words).refused("run.json")
    for kind in ("a folder", "a pipe", "a link to itself", "a link that leads nowhere"):
        path = run / "run.json"
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(b"")
        replace_by(kind, "run.json")(run)
        bench.call(*words, seconds=10).refused("crnet: ")


METRICS: dict[str, tuple[Callable[[bytes], bytes], bool]] = {
    "half a line": (lambda rows: rows[:-9], True),
    "half a line in the middle": (lambda rows: rows[:40] + b"\n" + rows[40:], False),
    "nothing": (lambda rows: b"", True),
    "bytes that are no text": (lambda rows: rows + b"\xff\xfe\n" + rows, False),
    "half a character": (lambda rows: rows + b'{"step": 1, "x": "\xc3', True),
    "NULs at its end": (lambda rows: rows + b"\0" * 512, True),
    "a list": (lambda rows: b"[1, 2]\n" + rows, False),
    "a row without a step": (lambda rows: b'{"loss": 1}\n' + rows, False),
    "a step that is a word": (lambda rows: b'{"step": "x"}\n' + rows, False),
    "rows without a loss": (lambda rows: b'{"step": 0, "val_loss": null}\n', False),
    "a row that is too deep": (lambda rows: b"[" * 100_000 + b"\n" + rows, False),
}


def try_metrics(kind: str, bench: Bench) -> None:
    change, goes_on = METRICS[kind]
    run = bench.trained()
    path = run / "metrics.jsonl"
    path.write_bytes(change(path.read_bytes()))
    words = [*bench.tiny(run), "--train.steps=6", "--resume"]
    if not goes_on:
        with untouched(run):
            bench.call(*words).refused("metrics.jsonl")
        return
    bench.call(*words).ends(0)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    if steps[-1] != 6 or not re.fullmatch(r"(\d+ )+", "".join(f"{s} " for s in steps)):
        raise Unexpected(f"the steps of metrics.jsonl are {steps}")


for kind in METRICS:
    TABLE.append(Attempt("run folders", f"metrics.jsonl with {kind}", partial(try_metrics, kind)))


@attempt("run folders", "folders that are no runs")
def _(bench: Bench) -> None:
    here = bench.folder
    (here / "empty").mkdir()
    (here / "file").write_text("x")
    (here / "circle").symlink_to("circle")
    (here / "odd" / "checkpoints" / "step_99999999999999999999999").mkdir(parents=True)
    (here / "strange" / "checkpoints" / "step_").mkdir(parents=True)
    (here / "flat").mkdir()
    (here / "flat" / "checkpoints").write_text("x")
    with untouched(here):
        for name in ("empty", "file", "circle", "odd", "strange", "flat", "none", "", "\n"):
            for command in ("evaluate", "generate"):
                bench.call(command, name).refused("crnet: ")
            if name:
                bench.call("train", "--resume", "--out", name).refused("crnet: ")
