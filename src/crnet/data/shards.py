"""Prepared tokens on disk: what lies in a folder, how it is written, how it is opened and checked.

Layout of a prepared folder (all numbers little-endian):

    train-00000.bin       ids of whole documents, each with its end token; uint16 or uint32
    train-00000.idx       uint64: where each document of that shard starts, in ids
    validation-00000.bin  and .idx, the same
    validation-00000.len  uint32: how many bytes of its document's text each id stands for
    train-00000.msk       uint8, of conversations: 1 for an id that counts, of both parts
    tokenizer.json        or tokenizer.model (and tokenizer_config.json, chat_template.jinja)
    meta.json             what is there, size and SHA-256 of every file, and of itself
    verified.json         size, times and inode of every file when it was last found whole

Opening a folder compares the size of every file always, and its SHA-256 wherever verified.json does
not vouch for it: after a copy, an edit, or anything else that the file system has seen. Refused:
hashing every time, which reads a large corpus once more at every start; hashing a sample, which
passes over a flipped token. What no one sees then is a disk that alters a file by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from crnet.config.serialize import build, read_json, to_dict
from crnet.data.tokenizer import Tokenizer, load_saved
from crnet.errors import ConfigError
from crnet.storage.files import is_name

FORMAT = 3
"""Version of the layout; part of a folder's name, so a new one never reads an old folder."""

_META, _VERIFIED = "meta.json", "verified.json"
_SHOWN_BYTES = 1 << 30  # hashing less takes no time that a user would wonder about

_SUMMED = ("tokens", "documents")

MEASURED = ("validation",)
"""The splits whose ids have a length in bytes beside them: those that are evaluated."""

MASK = ".msk"
"""Ending of the files that say which ids count."""

IdType = Literal["uint16", "uint32"]


@dataclass(frozen=True)
class File:
    """What a file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """One pair of .bin and .idx files."""

    name: str
    """Without the suffix."""
    tokens: int
    documents: int


@dataclass(frozen=True)
class Part:
    """The training or the validation part of a prepared corpus."""

    documents: int
    tokens: int
    """End tokens included."""
    text_bytes: int
    """UTF-8 length of the documents."""
    sha256: str
    """Of the ids as they lie on disk, shard after shard; of conversations, of every document's ids
    and then which of them count."""
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus; what meta.json says, under the same names in the same order."""

    folder: Path
    vocab_size: int
    """Rows an embedding needs."""
    eos_id: int
    pad_id: int | None
    dtype: IdType
    tokenizer_hash: str
    parts: dict[str, Part]
    """By split: train and validation."""
    source: dict[str, Any]
    """What was read and how, for the reader of meta.json."""
    files: dict[str, File]
    """Every file but meta.json and verified.json, by name."""

    @property
    def is_masked(self) -> bool:
        """Whether some ids alone count as targets."""
        return any(name.endswith(MASK) for name in self.files)

    def tokenizer(self) -> Tokenizer:
        """Open the tokenizer that made the ids. Cost: up to a second."""
        return load_saved(self.folder)


def stored_dtype(name: IdType) -> np.dtype:
    """Return the type of the ids in a .bin file."""
    return np.dtype(name).newbyteorder("<")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write the cache into a ``ConfigError`` that says where and what to do."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder}: prepared tokens cannot be written ({error.strerror or error}); "
            "make room or name another folder with --data.cache-dir"
        ) from error


def write_meta(prepared: Prepared) -> None:
    """Describe a folder in meta.json: the last file written, the first one read.

    Raises:
        OSError: the folder cannot be written.
    """
    meta = {"format": FORMAT, **to_dict(prepared)}
    del meta["folder"]
    meta["sha256"] = _meta_hash(meta)
    text = json.dumps(meta, indent=2) + "\n"
    (prepared.folder / _META).write_text(text, encoding="utf-8")
    _vouch(prepared.folder, prepared.files)


def _meta_hash(meta: Mapping[str, Any]) -> str:
    """Of a description's values, however they are laid out."""
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_of(path: Path) -> File:
    """Size and hash of a file. Raises ``OSError``. Cost: reads it, about a second for a GB."""
    with path.open("rb") as stream:
        return File(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def open_prepared(folder: Path) -> Prepared:
    """Read meta.json and check that every file is there and is the one it describes.

    Raises:
        ConfigError: meta.json or another file is missing or altered.
    Cost: one ``stat`` per file; about a second for a GB where verified.json does not vouch for it.
    """
    meta = read_json(folder / _META)
    if meta.get("format") != FORMAT or meta.get("sha256") != _meta_hash(meta):
        raise ConfigError(f"{folder / _META}: altered (it is not as it was written)")
    values = {key: value for key, value in meta.items() if key not in ("format", "sha256")}
    try:
        prepared = build(Prepared, {"folder": str(folder), **values})
    except ConfigError as error:
        raise ConfigError(f"{folder / _META}: {problem}" for problem in error.problems) from error
    if prepared.parts.keys() != {"train", "validation"}:
        raise ConfigError(f"{folder / _META}: wanted are the parts train and validation")
    for split, part in prepared.parts.items():
        summed = [sum(getattr(shard, key) for shard in part.shards) for key in _SUMMED]
        if summed != [part.tokens, part.documents]:
            raise ConfigError(f"{folder / _META}: what it says of {split} does not agree")
    for path, size in _sizes(prepared).items():
        if path.name not in prepared.files or prepared.files[path.name].bytes != size:
            raise ConfigError(
                f"{folder / _META}: what it says of {path.name} does not fit together"
            )
    _check_files(prepared)
    return prepared


def _sizes(prepared: Prepared) -> dict[Path, int]:
    """The bytes that each file of the shards must have."""
    id_bytes = np.dtype(prepared.dtype).itemsize
    sizes: dict[Path, int] = {}
    for split, part in prepared.parts.items():
        for shard in part.shards:
            sizes[prepared.folder / f"{shard.name}.bin"] = shard.tokens * id_bytes
            sizes[prepared.folder / f"{shard.name}.idx"] = shard.documents * 8
            if split in MEASURED:
                sizes[prepared.folder / f"{shard.name}.len"] = shard.tokens * 4
            if prepared.is_masked:
                sizes[prepared.folder / f"{shard.name}{MASK}"] = shard.tokens
    return sizes


def _check_files(prepared: Prepared) -> None:
    folder, files = prepared.folder, prepared.files
    for name, wanted in files.items():
        if not is_name(name):
            raise ConfigError(f"{folder / _META}: {name!r} is not the name of a file beside it")
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != wanted.bytes:
            has = "is missing" if actual is None else f"has {actual} bytes"
            raise ConfigError(f"{path} {has} where meta.json says {wanted.bytes}")
    if _is_vouched(folder, files):
        return
    total = sum(wanted.bytes for wanted in files.values())
    quiet = total < _SHOWN_BYTES
    with tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=quiet) as bar:
        for name, wanted in files.items():
            try:
                found = file_of(folder / name)
            except OSError as error:
                raise ConfigError(f"{folder / name}: cannot be read ({error.strerror})") from error
            if found != wanted:
                raise ConfigError(f"{folder / name}: altered (its sha256 is not meta.json's)")
            bar.update(wanted.bytes)
    _vouch(folder, files)


def _seen(folder: Path, files: Mapping[str, File]) -> dict[str, list[int]]:
    """What the file system changes whenever a file is written, copied or replaced."""
    stats = {name: (folder / name).stat() for name in files}
    return {
        name: [each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino]
        for name, each in stats.items()
    }


def _is_vouched(folder: Path, files: Mapping[str, File]) -> bool:
    try:
        return read_json(folder / _VERIFIED) == _seen(folder, files)
    except ConfigError:  # none there, or broken: the files are hashed
        return False


def _vouch(folder: Path, files: Mapping[str, File]) -> None:
    """Remember that every file has the hash it should have."""
    with contextlib.suppress(OSError):  # a folder that cannot be written is verified every time
        (folder / _VERIFIED).write_text(json.dumps(_seen(folder, files)) + "\n", encoding="utf-8")


class ShardWriter:
    """Writes the shards of one split, a document at a time."""

    def __init__(self, folder: Path, split: str, dtype: IdType, shard_tokens: int):
        """Write nothing yet.

        Args:
            folder: where the files go; it exists.
            split: first word of the file names.
            dtype: of the ids in the files.
            shard_tokens: most tokens in one file, unless one document alone is longer.
        """
        self._folder, self._split = folder, split
        self._dtype, self._shard_tokens = stored_dtype(dtype), shard_tokens
        self._file: Any = None
        self._starts: list[int] = []
        self._lengths: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._shards: list[Shard] = []
        self._fill = 0
        self._digest, self._shard_digest = hashlib.sha256(), hashlib.sha256()
        self.files: dict[str, File] = {}
        """What has been written, by name; complete once closed."""
        self.documents = self.tokens = self.text_bytes = 0

    def write(
        self,
        ids: np.ndarray,
        text_bytes: int,
        lengths: np.ndarray | None = None,
        counts: np.ndarray | None = None,
    ) -> None:
        """Append one document.

        Args:
            ids: with the end token; every id fits the type of the files.
            text_bytes: UTF-8 length of the text.
            lengths: how many of these bytes each id stands for; of splits in ``MEASURED``.
            counts: uint8, 1 where an id is to be learnt; None: all are, of every document.
        Raises:
            ConfigError: the folder cannot be written.
        """
        content = ids.astype(self._dtype).tobytes()
        with writing(self._folder.parent):
            if self._fill and self._fill + len(ids) > self._shard_tokens:
                self._finish()
            if self._file is None:
                self._file = open(self._folder / f"{self._name()}.bin", "wb")  # noqa: SIM115
            self._file.write(content)
        self._starts.append(self._fill)
        if lengths is not None:
            self._lengths.append(lengths.astype("<u4"))
        self._fill += len(ids)
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self._digest.update(content)
        if counts is not None:
            self._counts.append(counts)
            self._digest.update(counts.tobytes())
        self._shard_digest.update(content)

    def close(self) -> None:
        """Finish the last shard.

        Raises:
            ConfigError: the folder cannot be written.
        """
        if self._file is not None:
            with writing(self._folder.parent):
                self._finish()

    def part(self) -> Part:
        """Return what was written; complete once closed."""
        digest = self._digest.hexdigest()
        return Part(self.documents, self.tokens, self.text_bytes, digest, tuple(self._shards))

    def _name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}"

    def _finish(self) -> None:
        name, size = self._name(), self._fill * self._dtype.itemsize
        self._file.close()
        self._file = None
        self.files[f"{name}.bin"] = File(size, self._shard_digest.hexdigest())
        self._write_beside(f"{name}.idx", np.array(self._starts, "<u8"))
        if self._lengths:
            self._write_beside(f"{name}.len", np.concatenate(self._lengths))
        if self._counts:
            self._write_beside(f"{name}{MASK}", np.concatenate(self._counts))
        self._shards.append(Shard(name, self._fill, len(self._starts)))
        self._starts, self._fill, self._shard_digest = [], 0, hashlib.sha256()
        self._lengths, self._counts = [], []

    def _write_beside(self, name: str, numbers: np.ndarray) -> None:
        content = numbers.tobytes()
        (self._folder / name).write_bytes(content)
        self.files[name] = File(len(content), hashlib.sha256(content).hexdigest())
