"""Prepared tokens on disk: what lies in a folder, how it is written, how it is opened and checked.

Layout of a prepared folder (all numbers little-endian):

    train-00000.bin       ids of whole documents, each with its end token; uint16 or uint32
    train-00000.idx       uint64: where each document of that shard starts, in ids
    validation-00000.bin  and .idx, the same
    tokenizer.json        or tokenizer.model (and tokenizer_config.json)
    meta.json             written last
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from crnet.config.serialize import read_json
from crnet.data.tokenizer import Tokenizer, load_saved
from crnet.errors import ConfigError

FORMAT = 1
"""Version of the layout; part of a folder's name, so a new one never reads an old folder."""

_META = "meta.json"

IdType = Literal["uint16", "uint32"]


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
    validation_sha256: str
    """Of the validation part's ids as they lie on disk."""
    parts: dict[str, Part]
    """By split: train and validation."""
    source: dict[str, Any]
    """What was read and how, for the reader of meta.json."""

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
    meta = {"format": FORMAT, **dataclasses.asdict(prepared)}
    del meta["folder"]
    text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
    (prepared.folder / _META).write_text(text, encoding="utf-8")


def open_prepared(folder: Path) -> Prepared:
    """Read meta.json and check that every file is there and has the size that it gives.

    Raises:
        ConfigError: meta.json or a shard is missing or damaged.
    Cost: one ``stat`` per file.
    """
    meta = read_json(folder / _META)
    try:
        prepared = _from_meta(folder, meta)
        sizes = _sizes(prepared)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / _META}: is not a description of tokens ({error})") from error
    for path, size in sizes.items():
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            has = "is missing" if actual is None else f"has {actual} bytes"
            raise ConfigError(f"{path} {has} where meta.json says {size}")
    return prepared


def _from_meta(folder: Path, meta: dict[str, Any]) -> Prepared:
    parts = {
        split: Part(**{**part, "shards": tuple(Shard(**shard) for shard in part["shards"])})
        for split, part in meta.pop("parts").items()
    }
    del meta["format"]
    return Prepared(folder=folder, parts=parts, **meta)


def _sizes(prepared: Prepared) -> dict[Path, int]:
    """The bytes that each file of the shards must have."""
    id_bytes = np.dtype(prepared.dtype).itemsize
    sizes: dict[Path, int] = {}
    for part in prepared.parts.values():
        for shard in part.shards:
            sizes[prepared.folder / f"{shard.name}.bin"] = shard.tokens * id_bytes
            sizes[prepared.folder / f"{shard.name}.idx"] = shard.documents * 8
    return sizes


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
        self._shards: list[Shard] = []
        self._fill = 0
        self._digest = hashlib.sha256()
        self.documents = self.tokens = self.text_bytes = 0

    def write(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append one document.

        Args:
            ids: with the end token; every id fits the type of the files.
            text_bytes: UTF-8 length of the text.
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
        self._fill += len(ids)
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self._digest.update(content)

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
        return Part(self.documents, self.tokens, self.text_bytes, tuple(self._shards))

    def sha256(self) -> str:
        """Return the hash of all ids written, in hex."""
        return self._digest.hexdigest()

    def _name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}"

    def _finish(self) -> None:
        self._file.close()
        self._file = None
        np.array(self._starts, "<u8").tofile(self._folder / f"{self._name()}.idx")
        self._shards.append(Shard(self._name(), self._fill, len(self._starts)))
        self._starts, self._fill = [], 0
