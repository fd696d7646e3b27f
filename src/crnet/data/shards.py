"""Token shards on disk, rows cut from them, and an order of rows that is a pure function.

``prepare`` runs a corpus through a tokenizer once and keeps the ids in a folder of the cache whose
name is a hash of everything that decides them. Training then reads rows by index. Which rows a
step sees is computed from (seed, sequences consumed) alone, so resuming, gradient accumulation and
any number of processes see the same global batches, and a checkpoint stores one integer. The
refused alternative is a shuffle buffer, which cannot be resumed without reading what it held.

Layout of a prepared folder (all numbers little-endian):

    train-00000.bin       ids of whole documents, each with its end token; uint16 or uint32
    train-00000.idx       uint64: where each document of that shard starts, in ids
    validation-00000.bin  and .idx, the same
    tokenizer.json        or tokenizer.model (and tokenizer_config.json)
    meta.json             written last
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from tqdm import tqdm

from crnet.config.sections import DataConfig
from crnet.config.serialize import read_json, to_dict
from crnet.data import sources as corpus
from crnet.data import tokenizer
from crnet.data.sources import Document, Split
from crnet.data.tokenizer import Tokenizer
from crnet.errors import ConfigError

FORMAT = 1
"""Version of the layout; part of the key, so a new one never reads an old folder."""
SHARD_TOKENS = 2**28
IGNORED = -100
"""The target at which no loss is taken."""

_META = "meta.json"
_UNUSED = ".unfinished-"
_STALE_S = 24 * 3600
_BATCH_DOCUMENTS, _BATCH_CHARS = 1024, 4_000_000
_TOKENIZER_BYTES = 100_000_000
# These say how prepared tokens are used, not which they are ...
_USE = {"sequence_length", "rows", "validation_tokens", "cache_dir"}
# ... and these enter the key by the files they name, or only where they have an effect.
_NOT_IN_KEY = _USE | {"source", "validation_source", "tokenizer", "vocab_size"}


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
    """A prepared corpus; what meta.json says."""

    folder: Path
    vocab_size: int
    """Rows an embedding needs."""
    eos_id: int
    pad_id: int | None
    dtype: Literal["uint16", "uint32"]
    tokenizer_hash: str
    validation_sha256: str
    """Of the validation part's ids as they lie on disk."""
    parts: dict[str, Part]
    """By split: train and validation."""
    source: dict[str, Any]
    """What was read and how, for the reader of meta.json."""

    def tokenizer(self) -> Tokenizer:
        """Open the tokenizer that made the ids. Cost: up to a second."""
        return tokenizer.load_saved(self.folder)


def prepare(
    data: DataConfig, *, progress: bool = True, shard_tokens: int = SHARD_TOKENS
) -> Prepared:
    """Find the corpus as tokens in the cache, or make it.

    The folder appears whole or not at all: it is written under another name and renamed. Two
    processes that prepare the same corpus both do the work; the first to finish is kept. A folder
    whose files do not have the sizes that meta.json gives is made again, with a warning.

    Args:
        data: the corpus and the tokenizer.
        progress: show documents and tokens on stderr while preparing.
        shard_tokens: most tokens in one file, unless one document alone is longer.
    Returns:
        The prepared corpus.
    Raises:
        ConfigError: a source or the tokenizer cannot be used, no document is left for training
            or for validation, or the cache cannot be written.
    Cost: one ``stat`` per source file where the cache has it; else one pass (two where the
        tokenizer is trained): on two cores one to two million tokens a second, a third of that
        with a Unigram tokenizer.json such as T5's (its .model is faster).
    """
    source_files = corpus.identity(data)
    key = _key(data, source_files, shard_tokens)
    cache = _cache(data)
    folder = cache / key
    found = _find(folder)
    if found is not None:
        return found
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        unfinished = cache / f"{_UNUSED}{key}-{os.getpid()}-{secrets.token_hex(4)}"
        unfinished.mkdir()
    try:
        _fill(unfinished, data, source_files, progress, shard_tokens)
        with _writing(cache):
            _publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already where all went well
    return _open(folder)


def _cache(data: DataConfig) -> Path:
    if data.cache_dir is not None:
        return data.cache_dir.expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "crnet"


def _key(data: DataConfig, source_files: list[list[Any]], shard_tokens: int) -> str:
    settings = {
        field.name: getattr(data, field.name)
        for field in fields(data)
        if field.name not in _NOT_IN_KEY
    }
    made_by = [tokenizer.fingerprint(data.tokenizer)]
    if data.tokenizer == "train":
        made_by.append(str(data.vocab_size))
    said = [FORMAT, shard_tokens, settings, made_by, source_files]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:24]


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write the cache into a ``ConfigError`` that says where and what to do."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder}: prepared tokens cannot be written ({error.strerror or error}); "
            "make room or name another folder with --data.cache-dir"
        ) from error


def _find(folder: Path) -> Prepared | None:
    if not folder.is_dir():
        return None
    try:
        return _open(folder)
    except ConfigError as error:
        warnings.warn(f"{error}; preparing it again", stacklevel=3)
        return None


def _open(folder: Path) -> Prepared:
    meta = read_json(folder / _META)
    try:
        parts = {
            split: Part(**{**part, "shards": tuple(Shard(**shard) for shard in part["shards"])})
            for split, part in meta.pop("parts").items()
        }
        del meta["format"]
        prepared = Prepared(folder=folder, parts=parts, **meta)
        sizes = {
            folder / f"{shard.name}.{suffix}": size
            for part in parts.values()
            for shard in part.shards
            for suffix, size in (
                ("bin", shard.tokens * np.dtype(prepared.dtype).itemsize),
                ("idx", shard.documents * 8),
            )
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / _META}: is not a description of tokens ({error})") from error
    for path, size in sizes.items():
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            has = "is missing" if actual is None else f"has {actual} bytes"
            raise ConfigError(f"{path} {has} where meta.json says {size}")
    return prepared


def _sweep(cache: Path) -> None:
    """Remove what killed preparations left, once no living one can still be writing it."""
    for left in cache.glob(f"{_UNUSED}*"):
        try:
            newest_s = max(path.stat().st_mtime for path in (left, *left.iterdir()))
        except FileNotFoundError:  # its process has just finished
            continue
        if time.time() - newest_s > _STALE_S:
            shutil.rmtree(left, ignore_errors=True)


def _publish(unfinished: Path, folder: Path) -> None:
    for path in (*unfinished.iterdir(), unfinished):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if folder.is_dir():
        try:
            _open(folder)
        except ConfigError:
            # The damaged folder is moved aside, not emptied: a process that has it mapped goes on.
            damaged = folder.with_name(f"{unfinished.name}-damaged")
            with contextlib.suppress(FileNotFoundError):  # another process was as quick
                folder.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        # Another process finished first; the same key means the same tokens.


# Documents -> shards


def _fill(
    folder: Path,
    data: DataConfig,
    source_files: list[list[Any]],
    progress: bool,
    shard_tokens: int,
) -> None:
    made_by = _tokenizer(data, progress)
    dtype = np.dtype("<u2" if made_by.vocab_size <= 2**16 else "<u4")
    writers: dict[str, _Writer] = {
        split: _Writer(folder, split, dtype, shard_tokens) for split in ("train", "validation")
    }
    end = np.array([made_by.eos_id], dtype)
    try:
        with tqdm(desc="preparing", unit=" tokens", unit_scale=True, disable=not progress) as bar:
            for batch in _batches_of(corpus.documents(data)):
                encoded = made_by.encode_batch([document.text for document in batch])
                for document, ids in zip(batch, encoded, strict=True):
                    if len(ids):
                        size = len(document.text.encode())
                        writers[document.split].write(np.append(ids.astype(dtype), end), size)
                num_documents = sum(writer.documents for writer in writers.values())
                bar.set_postfix_str(f"{num_documents:,} documents", refresh=False)
                bar.update(sum(writer.tokens for writer in writers.values()) - bar.n)
    finally:
        for writer in writers.values():
            writer.close()
    _check_parts(data, {split: writer.documents for split, writer in writers.items()})
    meta = {
        "format": FORMAT,
        "vocab_size": made_by.vocab_size,
        "eos_id": made_by.eos_id,
        "pad_id": made_by.pad_id,
        "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
        "tokenizer_hash": made_by.hash,
        "validation_sha256": writers["validation"].digest.hexdigest(),
        "parts": {split: writer.part() for split, writer in writers.items()},
        "source": {
            **{key: value for key, value in to_dict(data).items() if key not in _USE},
            # How many files or splits had which part; hash: a share of their documents held out.
            "read_as": dict(Counter(role for role, *_ in source_files)),
        },
    }
    with _writing(folder.parent):
        made_by.save(folder)
        text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
        (folder / _META).write_text(text, encoding="utf-8")


def _tokenizer(data: DataConfig, progress: bool) -> Tokenizer:
    if data.tokenizer != "train":
        return tokenizer.load(data.tokenizer)

    def texts() -> Iterator[str]:
        num_bytes = 0
        label = "training the tokenizer"
        documents = corpus.documents(data)
        for document in tqdm(documents, label, unit=" documents", disable=not progress):
            if document.split == "train":
                yield document.text
                num_bytes += len(document.text.encode())
                if num_bytes >= _TOKENIZER_BYTES:
                    return

    stream = texts()
    first = list(itertools.islice(stream, 1))
    if not first:  # training on nothing would succeed
        held_out = sum(1 for _ in corpus.documents(data))
        _check_parts(data, {"train": 0, "validation": held_out})
    return tokenizer.train(itertools.chain(first, stream), data.vocab_size)


def _check_parts(data: DataConfig, documents: dict[str, int]) -> None:
    what = " ".join(data.source)
    if not any(documents.values()):
        raise ConfigError(f"--data.source {what} holds no text; name a corpus with documents")
    for split, count in documents.items():
        if count == 0:
            raise ConfigError(
                f"--data.source {what} gives {sum(documents.values())} documents, none of them "
                f"for {split}; give a --data.validation-source, cut it finer (--data.documents "
                "paragraph, or line), or hold out another share (--data.validation-frac, now "
                f"{data.validation_frac})"
            )


def _batches_of(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class _Writer:
    """Writes the shards of one split."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int):
        self._folder, self._split, self._dtype, self._limit = folder, split, dtype, shard_tokens
        self._file: Any = None
        self._starts: list[int] = []
        self._shards: list[dict[str, Any]] = []
        self._fill = 0
        self.documents = self.tokens = self.text_bytes = 0
        self.digest = hashlib.sha256()

    def write(self, ids: np.ndarray, text_bytes: int) -> None:
        with _writing(self._folder.parent):
            if self._fill and self._fill + len(ids) > self._limit:
                self._finish()
            if self._file is None:
                self._file = open(self._folder / f"{self._name()}.bin", "wb")  # noqa: SIM115
            content = ids.tobytes()
            self._file.write(content)
        self._starts.append(self._fill)
        self._fill += len(ids)
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self.digest.update(content)

    def _name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}"

    def _finish(self) -> None:
        self._file.close()
        self._file = None
        np.array(self._starts, "<u8").tofile(self._folder / f"{self._name()}.idx")
        self._shards.append(
            {"name": self._name(), "tokens": self._fill, "documents": len(self._starts)}
        )
        self._starts, self._fill = [], 0

    def close(self) -> None:
        if self._file is not None:
            with _writing(self._folder.parent):
                self._finish()

    def part(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "shards": self._shards,
        }


# Shards -> rows


class Rows:
    """The rows of one split: inputs and targets of ``sequence_length`` tokens, by index.

    packed: row i of a shard reads ids ``[i T, i T + T]``; the first T are inputs, the last T are
    targets. Rows follow each other without a gap, ignore the ends of documents, and do not cross
    shards; what is left at the end of a shard is dropped.

    document: one document a row. A document of more than T ids keeps its first T - 1 and the end
    token, a shorter one is filled with the padding id (the end token where there is none). Targets
    are the inputs shifted left by one; at the padding and in the last place they are -100.
    Source: the C4 protocol of GaLore and its successors (truncation and padding to 256, no
    packing).
    """

    def __init__(
        self,
        prepared: Prepared,
        split: Split,
        sequence_length: int,
        mode: Literal["packed", "document"] = "packed",
    ):
        """Map the shards.

        Raises:
            ConfigError: ``sequence_length`` is below 2, or the mode is unknown.
        Cost: none; the files are mapped, not read.
        """
        if sequence_length < 2 or mode not in ("packed", "document"):
            raise ConfigError(
                f"rows of {sequence_length} tokens in mode {mode!r}; --data.sequence-length must "
                "be at least 2 and --data.rows packed or document"
            )
        self.prepared, self.split, self.mode = prepared, split, mode
        self.sequence_length = sequence_length
        part = prepared.parts[split]
        dtype = np.dtype(prepared.dtype).newbyteorder("<")
        self._ids: list[np.ndarray] = [
            np.asarray(np.memmap(prepared.folder / f"{shard.name}.bin", dtype, mode="r"))
            for shard in part.shards
        ]
        self._starts: list[np.ndarray] = [
            np.asarray(np.memmap(prepared.folder / f"{shard.name}.idx", "<u8", mode="r"))
            for shard in part.shards
        ]
        if mode == "document":
            counts = [shard.documents for shard in part.shards]
        else:
            counts = [max(0, shard.tokens - 1) // sequence_length for shard in part.shards]
        self._first_row = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Read rows.

        Args:
            indices: row indices in [0, len), any order, shape (B,).
        Returns:
            Tokens and targets, int64, contiguous, shape (B, T) each.
        Raises:
            IndexError: an index is outside the rows.
        Cost: B T ids read; see the speed test for tokens a second.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"rows {indices.min()}..{indices.max()} asked of {len(self)} rows")
        read = self._packed if self.mode == "packed" else self._documents
        shards = np.searchsorted(self._first_row, indices, side="right") - 1
        if len(self._ids) == 1 or (indices.size and (shards == shards[0]).all()):
            shard = int(shards[0]) if indices.size else 0
            tokens, targets = read(shard, indices - self._first_row[shard])
        else:
            tokens = np.empty((len(indices), self.sequence_length), np.int64)
            targets = np.empty_like(tokens)
            for shard in np.unique(shards):
                here = shards == shard
                tokens[here], targets[here] = read(shard, indices[here] - self._first_row[shard])
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    def _packed(self, shard: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Row i of this view is ids[i T : i T + T + 1]; taking rows of it copies whole rows.
        windows = sliding_window_view(self._ids[shard], self.sequence_length + 1)
        both = windows[:: self.sequence_length][rows]
        return both[:, :-1].astype(np.int64), both[:, 1:].astype(np.int64)

    def _documents(self, shard: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, length, prepared = self._ids[shard], self.sequence_length, self.prepared
        pad_id = prepared.eos_id if prepared.pad_id is None else prepared.pad_id
        tokens = np.full((len(rows), length), pad_id, np.int64)
        targets = np.full((len(rows), length), IGNORED, np.int64)
        index = self._starts[shard]
        following = index[np.minimum(rows + 1, len(index) - 1)]
        ends = np.where(rows + 1 < len(index), following, len(ids)).tolist()
        for i, (start, end) in enumerate(zip(index[rows].tolist(), ends, strict=True)):
            size = min(end - start, length)
            tokens[i, :size] = ids[start : start + size]
            tokens[i, size - 1] = prepared.eos_id
            targets[i, : size - 1] = tokens[i, 1:size]
        return tokens, targets

    def num_within(self, max_tokens: int) -> int:
        """Return how many rows, in file order, hold at most ``max_tokens`` tokens of input.

        Padding is not counted. At least one row, at most all.
        """
        if self.mode == "packed":
            count = max_tokens // self.sequence_length
        else:
            lengths = [
                np.diff(starts.astype(np.int64), append=len(ids))
                for starts, ids in zip(self._starts, self._ids, strict=True)
            ]
            read = np.cumsum(np.minimum(np.concatenate(lengths), self.sequence_length))
            count = int(np.searchsorted(read, max_tokens, side="right"))
        return min(max(count, 1), len(self))


def check_enough(rows: Rows, batch_size: int) -> None:
    """Raise a ``ConfigError`` if there are fewer rows than one batch holds."""
    if len(rows) >= max(batch_size, 1):
        return
    part = rows.prepared.parts[rows.split]
    if rows.split == "validation":
        mend = "hold out more (--data.validation-frac) or name a --data.validation-source"
    else:
        mend = "take a smaller --train.batch-size or more text (--data.source)"
    shorter = "" if rows.mode == "document" else ", or a smaller --data.sequence-length"
    raise ConfigError(
        f"the {rows.split} part has {part.tokens:,} tokens in {part.documents:,} documents, which "
        f"gives {len(rows)} rows of {rows.sequence_length} tokens where {max(batch_size, 1)} are "
        f"needed; {mend}{shorter}"
    )


# The order of rows


def order(seed: int, num_rows: int, start: int, count: int) -> np.ndarray:
    """Return the row indices at positions ``start .. start + count`` of an endless sequence.

    Epoch e (position // num_rows) visits every row once, in an order that (seed, e) decides.

    The idea: a permutation that can be evaluated at any point without being stored. A position
    within the epoch is split into two halves of k bits and goes through a Feistel network, in
    which each round adds to one half a keyed hash of the other; whatever the hash, that is a
    bijection of the 4^k numbers below 4^k, the smallest power of four that is at least num_rows.
    Numbers of num_rows or more are sent through again until they fall below it ("cycle walking"),
    which keeps the map a bijection of the num_rows numbers and takes four passes at most on
    average. Refused: a stored permutation, 8 bytes per row in every process and a dependence on
    numpy's generators; a stride coprime to num_rows, which does not look shuffled.

    Args:
        seed: any non-negative integer; its lowest 64 bits count.
        num_rows: rows in an epoch, at least 1.
        start: first position, at least 0.
        count: positions wanted, at least 0.
    Returns:
        int64, shape (count,).
    Raises:
        ValueError: an argument is out of range.
    Cost: O(count) time and memory.
    """
    if num_rows < 1 or start < 0 or count < 0 or seed < 0:
        raise ValueError(
            f"order(seed={seed}, num_rows={num_rows}, start={start}, count={count}): num_rows must "
            "be at least 1, the rest at least 0"
        )
    position = np.arange(start, start + count, dtype=np.uint64)
    key = _mix(_mix(np.full(1, seed & _MASK, np.uint64)) ^ (position // np.uint64(num_rows)))
    half_bits = np.uint64(((num_rows - 1).bit_length() + 1) // 2)
    value = position % np.uint64(num_rows)
    walking = np.arange(count)
    while walking.size:
        value[walking] = _feistel(value[walking], key[walking], half_bits)
        walking = walking[value[walking] >= np.uint64(num_rows)]
    return value.astype(np.int64)


_MASK = 2**64 - 1
_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64: every bit of the result depends on every bit of ``value`` (uint64, any shape)."""
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _feistel(value: np.ndarray, key: np.ndarray, half_bits: np.uint64) -> np.ndarray:
    half = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & half
    for _ in range(_ROUNDS):
        key = key + _GOLDEN
        left, right = right, left ^ (_mix(key ^ right) & half)
    return (left << half_bits) | right


class Batches:
    """The training batches: the rows of ``order``, a batch a step, cut to each process's share.

    ``position``, the sequences consumed, is the whole state; it is the same on every process.
    """

    def __init__(self, rows: Rows, seed: int, batch_size: int, position: int = 0):
        """Begin at a position.

        Raises:
            ConfigError: there are fewer rows than a batch holds.
        """
        check_enough(rows, batch_size)
        self.rows, self.seed, self.batch_size, self.position = rows, seed, batch_size, position

    def next(
        self, micro_batch_size: int | None = None, rank: int = 0, world_size: int = 1
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the next step's micro-batches of one process, and advance by a whole batch.

        Args:
            micro_batch_size: rows in one forward pass (None: all of the share); the last
                micro-batch may be smaller.
            rank: which of the equal, contiguous shares of the batch.
            world_size: how many shares there are.
        Returns:
            Tokens and targets of each micro-batch, int64, shape (rows, T).
        Raises:
            ConfigError: the batch cannot be shared equally.
        """
        if self.batch_size % world_size:
            raise ConfigError(
                f"--train.batch-size {self.batch_size} is not divided by the {world_size} "
                f"processes; take a multiple of {world_size}"
            )
        share = self.batch_size // world_size
        size = micro_batch_size or share
        start = self.position + rank * share
        indices = order(self.seed, len(self.rows), start, share)
        self.position += self.batch_size
        return [self.rows.batch(indices[i : i + size]) for i in range(0, share, size)]


# Validation


def validation_batches(
    rows: Rows, batch_size: int, max_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the validation rows in file order, the same rows whatever the batch size.

    Args:
        rows: rows of the validation split.
        batch_size: rows at a time; the last batch may be smaller.
        max_tokens: most input tokens read (padding is not counted), but at least one row.
    Returns:
        Tokens and targets, int64, shape (B, T).
    Raises:
        ConfigError: there is no row.
    """
    check_enough(rows, 1)
    count = rows.num_within(max_tokens)
    for start in range(0, count, batch_size):
        yield rows.batch(np.arange(start, min(start + batch_size, count)))


def validation_hash(rows: Rows, max_tokens: int) -> str:
    """Return the SHA-256, in hex, of exactly the rows that ``validation_batches`` yields.

    Row after row: its tokens, then its targets, as little-endian int64.
    """
    digest = hashlib.sha256()
    for tokens, targets in validation_batches(rows, 256, max_tokens):
        digest.update(torch.stack([tokens, targets], dim=1).numpy().astype("<i8").tobytes())
    return digest.hexdigest()
