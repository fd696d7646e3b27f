"""From the words of ``--data.source`` to a stream of documents, each for training or validation.

A source word is resolved into parts (one file, one split of a Hugging Face data set, one module of
the standard library). Every part has a role, settled before anything is read: training,
validation, or "hash": each document falls to one side by its hash. So a document's side depends
neither on the order of reading nor on the other documents, and a corpus that grows keeps the
sides of the documents it had.

The refused alternative, ``datasets.load_dataset`` for everything, would make an optional package
the only way to read a text file and would hide in its cache which files were read.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import hashlib
import importlib
import itertools
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

from crnet.config.sections import DataConfig
from crnet.data.readers import (
    KNOWN_SUFFIXES,
    Reader,
    Texts,
    file_reader,
    optional_package,
    record_reader,
    text_reader,
    unreadable,
)
from crnet.errors import ConfigError

Split = Literal["train", "validation"]
_Role = Literal["train", "validation", "hash"]

_SPLIT_WORD = re.compile(
    r"(?:^|[-._ ])(train|training|validation|valid|val|dev|test|testing)(?=$|[-._ \d])", re.I
)
_ABOUT_DATA = re.compile(r"(README|LICEN[CS]E|COPYING|NOTICE)(\..*)?$", re.I)
_ABOUT_SET = ("README.md", "dataset_infos.json")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+$", re.A)
# Tests and installed packages differ between distributions; lib-dynload, config-* and
# _sysconfigdata* speak of the machine that built this Python.
_OUTSIDE_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib-dynload",
}
_TOPICS = "pydoc_data/topics.py"  # 0.5 MB of prose: read as text, not as string literals


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the side it is on."""

    text: str
    """Not empty, valid Unicode (it can be encoded as UTF-8); of a chat record its conversation."""
    split: Split
    origin: str
    """Where it came from, for messages: ``file``, ``file:line`` or ``data set[split]:number``."""


@dataclass(frozen=True)
class _SourcePart:
    """What is read from beginning to end, with one role."""

    role: _Role
    content: tuple[Any, ...]
    """Changes when the text changes; JSON can hold it. Cheap: sizes and times, not contents."""
    read: Reader
    hash_key: str | None = None
    """What decides a document's side under the role "hash"; None: its text."""
    path: Path | None = None

    def identity(self) -> list[Any]:
        return [self.role, self.hash_key, *self.content]


@dataclass(frozen=True)
class _DataSet:
    """A Hugging Face data set: the splits it has show only when it is opened."""

    name: str
    subset: str | None
    files: list[list[Any]]
    """Names, sizes and times of the files of a local one."""
    role: _Role = "hash"
    """The side that all of it was named for; "hash": neither, the splits decide."""

    def identity(self) -> list[Any]:
        return ["hub", None, "hub", self.name, self.subset, self.files, self.role]


_Found = _SourcePart | _DataSet


class _File(NamedTuple):
    path: Path
    split_word: str | None
    """The split that the name speaks of: train, validation or test."""


def documents(data: DataConfig) -> Iterator[Document]:
    """Stream the documents of a corpus: those of the source, then those of a validation source.

    Source words are resolved at the call; files are opened as the stream is consumed.

    Args:
        data: the corpus; ``max_documents`` limits the source and the validation part each.
    Returns:
        An iterator of documents in an order that depends on the configuration and the files only.
        Documents without a visible character are left out and not counted.
    Raises:
        ConfigError: a source cannot be found, opened, unpacked, decoded or parsed (the message
            names the file, the place in it and the mend), or a needed package is missing.
    Cost: one pass over the files; memory of one block of a file and one document.
    """
    parts = [part for found in _resolve(data) for part in _opened(found, data)]
    main = [part for part in parts if part.role != "validation"]
    held_out = [part for part in parts if part.role == "validation"]

    def stream() -> Iterator[Document]:
        for group in (main, held_out):
            yield from itertools.islice(_read(group, data.validation_frac), data.max_documents)

    return stream()


def texts_to_evaluate(data: DataConfig, *, held_out_alone: bool) -> Iterator[str]:
    """Stream the texts that a model is evaluated on.

    Args:
        data: the corpus; ``max_documents`` limits it.
        held_out_alone: the documents that ``documents`` holds out, for the corpus that a model was
            trained on. Else all documents of ``source``, but for what it names as training data
            beside a validation part.
    Raises:
        ConfigError: as ``documents``.
    Cost: as ``documents``.
    """
    if held_out_alone:
        return (each.text for each in documents(data) if each.split == "validation")
    found = _parts_of(data.source, data, "--data.source")
    kept = [_with_role(each, "validation") for each in found if each.role != "train"]
    _check_named_once(kept)
    parts = [part for each in kept for part in _opened(each, data)]
    every = itertools.islice(_read(parts, data.validation_frac), data.max_documents)
    return (each.text for each in every)


def identity(data: DataConfig) -> list[list[Any]]:
    """Describe what would be read, without reading it: equal descriptions, equal documents.

    Args:
        data: the corpus.
    Returns:
        For every part its role and path, size in bytes and modification time in ns (of a Hugging
        Face data set on the hub only its name, so a change there is not seen). JSON can hold it.
    Raises:
        ConfigError: as ``documents``, for what shows before a file is opened.
    Cost: one ``stat`` per file.
    """
    return [found.identity() for found in _resolve(data)]


# Parts -> documents


def _read(parts: Iterable[_SourcePart], validation_frac: float) -> Iterator[Document]:
    for part in parts:
        for text, origin in part.read():
            if text and not text.isspace():
                encoded = _encoded(text, origin)
                yield Document(text, _side(part, encoded, validation_frac), origin)


def _encoded(text: str, origin: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{origin}: character {error.start} is half of a surrogate pair "
            f"({text[error.start]!a}), which no UTF-8 text can hold; take it out of the "
            "record"
        ) from error


def _side(part: _SourcePart, encoded: bytes, validation_frac: float) -> Split:
    if part.role != "hash":
        return part.role
    key = encoded if part.hash_key is None else part.hash_key.encode()
    return "validation" if _share(key) < validation_frac else "train"


def _share(key: bytes) -> float:
    """A number in [0, 1] that is as good as random and depends on ``key`` alone."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64


# Source words -> parts


def _resolve(data: DataConfig) -> list[_Found]:
    parts = _parts_of(data.source, data, "--data.source")
    if data.validation_source:
        # The source's own held-out files are nobody's then: what calls itself validation is
        # never trained on. Word by word, so that a folder with splits next to a lone file does
        # not make the file a training file.
        parts = [_with_role(part, "train") for part in parts if part.role != "validation"]
        for word in data.validation_source:
            held_out = _parts_of((word,), data, "--data.validation-source")
            parts += [_with_role(p, "validation") for p in held_out if p.role != "train"]
    _check_named_once(parts)
    return parts


def _with_role(found: _Found, role: _Role) -> _Found:
    return dataclasses.replace(found, role=role)


def _check_named_once(parts: Iterable[_Found]) -> None:
    seen: dict[Path, _Role] = {}
    for part in parts:
        if isinstance(part, _SourcePart) and part.path is not None:
            path = part.path.resolve()
            if path in seen:
                both = "trained on and validated on" if seen[path] != part.role else "read twice"
                raise ConfigError(
                    f"{part.path} would be {both}; name it once among --data.source and "
                    "--data.validation-source"
                )
            seen[path] = part.role


def _parts_of(words: Sequence[str], data: DataConfig, flag: str) -> list[_Found]:
    """The parts of the words: files first, whose names are looked at together."""
    files: list[_File] = []
    others: list[_Found] = []
    for word in words:
        path = Path(word).expanduser()
        if word == "python":
            others += _python_parts(data)
        elif os.path.isdir(path):  # os.path, which answers no where a folder may not be entered
            if _is_hub_layout(path):
                others.append(_local_data_set(path, data.subset))
            else:
                files += _files_of_folder(path, word, flag)
        elif os.path.isfile(path):
            files.append(_File(path, _split_word(path.name)))
        elif os.path.exists(path):
            raise ConfigError(
                f"{flag} {word} is neither a file nor a folder; write its text into a file first "
                "(the corpus is read more than once)"
            )
        elif glob.has_magic(word):
            files += _files_of_glob(str(path), flag)
        elif _HUB_NAME.match(word) and not word.lower().endswith(KNOWN_SUFFIXES):
            others.append(_DataSet(word, data.subset, []))
        else:
            raise ConfigError(_unknown_word(word, flag))
    return [*_file_parts(files, data), *others]


def _unknown_word(word: str, flag: str) -> str:
    if os.sep in word or word.lower().endswith(KNOWN_SUFFIXES):
        parent = Path(word).expanduser().parent
        names = os.listdir(parent) if os.access(parent, os.R_OK | os.X_OK) else []
        near = difflib.get_close_matches(Path(word).name, names, n=1)
        hint = f"did you mean {parent / near[0]}?" if near else "check the path"
        return f"{flag} {word}: no such file; {hint}"
    near = difflib.get_close_matches(word, ["python"], n=1)
    hint = "did you mean python?" if near else "check the path"
    return (
        f"{flag} {word} is neither a file, a folder, a glob with a match, nor the word python "
        f"(a Hugging Face data set is written OWNER/NAME); {hint}"
    )


def _files_of_glob(pattern: str, flag: str) -> list[_File]:
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    found = [path for path in found if path.is_file()]
    if not found:
        raise ConfigError(
            f"{flag} {pattern} matches no file; check the pattern (quote it, and write ** for "
            "folders at any depth)"
        )
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), PurePath(pattern).parts)
    return _named_below(Path(*fixed), found)


def _files_of_folder(folder: Path, word: str, flag: str) -> list[_File]:
    found = _walk(folder)
    if not found:
        raise ConfigError(
            f"{flag} {word} is a folder without a file; name one that holds text, "
            ".jsonl or .parquet files"
        )
    return _named_below(folder, found)


def _walk(folder: Path) -> list[Path]:
    def stop(error: OSError) -> None:
        raise ConfigError(unreadable(Path(str(error.filename)), error)) from error

    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            raise ConfigError(
                f"{here}: a link leads to {real}, which is read already; take the link out"
            )
        seen.add(real)
        folders[:] = [n for n in folders if not n.startswith(".") and n != "__pycache__"]
        for name in names:
            # A README or a licence speaks about the data; it is no part of it.
            if not name.startswith(".") and not _ABOUT_DATA.match(name):
                found.append(_regular(Path(here, name)))
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _regular(path: Path) -> Path:
    """The path, unless a pipe or a device has it: reading one would wait, or never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{path}: is neither a file nor a folder; take it out of the folder")
    return path


def _named_below(root: Path, paths: Iterable[Path]) -> list[_File]:
    return [_File(path, _split_word(*path.relative_to(root).parts)) for path in paths]


def _split_word(*parts: str) -> str | None:
    """The split that a name speaks of, the file's own name before those of the folders above."""
    for part in reversed(parts):
        if match := _SPLIT_WORD.search(part):
            word = match[1].lower()
            return {"tr": "train", "te": "test"}.get(word[:2], "validation")
    return None


def _file_parts(files: list[_File], data: DataConfig) -> list[_SourcePart]:
    # Names speak of splits when they set something apart: a validation part, or a test part
    # beside a training part. A folder of programs with tests/ in it does not.
    words = {file.split_word for file in files}
    speaking = "validation" in words or {"train", "test"} <= words
    parts: list[_SourcePart] = []
    for path, word in files:
        if speaking and word == "test":
            continue
        role: _Role = "hash"
        if speaking and "validation" in words:
            role = "validation" if word == "validation" else "train"
        content = (str(path.absolute()), *_stat(path))
        parts.append(_SourcePart(role, content, file_reader(path, data), path=path))
    if parts and all(part.role == "validation" for part in parts):
        # Nothing is set apart from anything: one file, say, that happens to be called valid.txt.
        parts = [dataclasses.replace(part, role="hash") for part in parts]
    return parts


def _stat(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError(unreadable(path, error)) from error
    return stat.st_size, stat.st_mtime_ns


# The standard library


def _python_parts(data: DataConfig) -> list[_SourcePart]:
    """The text of the running Python's standard library, the same on every machine that has it."""
    root = Path(sysconfig.get_path("stdlib"))
    version = ".".join(map(str, sys.version_info[:3]))
    parts: list[_SourcePart] = []
    for name in _library_files(root):
        path = root / name
        content = ("python", version, name, *_stat(path))
        reader = file_reader(path, data)
        parts.append(_SourcePart("hash", content, reader, hash_key=name, path=path))
    if not parts:
        raise ConfigError(
            f"--data.source python: this Python keeps no library text in {root}; name text files"
        )
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        key = f"{_TOPICS}:{topic}"
        content = ("python", version, key, len(text))
        parts.append(_SourcePart("hash", content, text_reader(text, key, data), hash_key=key))
    return parts


def _library_files(root: Path) -> list[str]:
    names: list[str] = []
    for here, folders, files in os.walk(root):
        folders[:] = [
            n for n in folders if n not in _OUTSIDE_LIBRARY and not n.startswith("config-")
        ]
        relative = Path(here).relative_to(root)
        names += [(relative / name).as_posix() for name in files if name.endswith(".py")]
    return [
        name for name in sorted(names) if name != _TOPICS and not name.startswith("_sysconfigdata")
    ]


# Hugging Face data sets


def _is_hub_layout(folder: Path) -> bool:
    if (folder / "dataset_infos.json").is_file():
        return True
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return False
    front = itertools.takewhile(lambda line: line.strip() != "---", lines[1:])
    return any(line.startswith(("configs:", "dataset_info:")) for line in front)


def _local_data_set(folder: Path, subset: str | None) -> _DataSet:
    found = [*_walk(folder), *(folder / name for name in _ABOUT_SET)]
    files = [[str(file.relative_to(folder)), *_stat(file)] for file in found if file.exists()]
    return _DataSet(str(folder.absolute()), subset, files)


def _opened(found: _Found, data: DataConfig) -> list[_SourcePart]:
    """A data set as the parts of its splits; a part as it is."""
    if isinstance(found, _SourcePart):
        return [found]
    name, subset = found.name, found.subset
    datasets = optional_package("datasets", f"the data set {name}")
    label = name if subset is None else f"{name} (subset {subset})"
    try:
        splits = datasets.load_dataset(name, subset, streaming=True)
    except (OSError, ValueError) as error:  # no network, no such set, no such subset
        raise ConfigError(
            f"{label}: no such file or folder, and as a Hugging Face data set it cannot be "
            f"opened: {error}; check the name, --data.subset and the network"
        ) from error
    roles = _roles_of_splits(list(splits), found.role)
    if not roles:
        raise ConfigError(
            f"{label} has the splits {', '.join(splits)}, none of them for training; name the "
            "files themselves as --data.source"
        )
    return [
        _SourcePart(role, (name, subset, split), _split_reader(found, label, splits, split, data))
        for split, role in roles.items()
    ]


def _roles_of_splits(splits: Iterable[str], named_for: _Role) -> dict[str, _Role]:
    by_word: dict[str | None, list[str]] = {}
    for split in splits:
        by_word.setdefault(_split_word(split), []).append(split)
    train = by_word.get("train") or by_word.get(None) or []
    held_out = by_word.get("validation", [])
    if named_for == "validation":
        return dict.fromkeys(held_out or train, "validation")
    if named_for == "train":
        return dict.fromkeys(train, "train")
    roles: dict[str, _Role] = dict.fromkeys(train, "train" if held_out else "hash")
    roles.update(dict.fromkeys(held_out, "validation"))
    return roles


def _split_reader(
    found: _DataSet, label: str, splits: Mapping[str, Iterable[Any]], split: str, data: DataConfig
) -> Reader:
    def read() -> Texts:
        key = record_reader(data)
        try:
            for number, record in enumerate(splits[split]):
                origin = f"{found.name}[{split}]:{number}"
                yield key.text_of(record, origin), origin
        except ConfigError:
            raise
        except (OSError, EOFError, ValueError) as error:
            raise ConfigError(
                f"{label}, split {split}: reading stopped ({error}); try again, or mend the "
                "file it names"
            ) from error

    return read
