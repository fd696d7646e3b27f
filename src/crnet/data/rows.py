"""Rows cut from the shards, and the batches of training and validation made of them.

Which rows a step sees is computed from (seed, sequences consumed) alone, so resuming, gradient
accumulation and any number of processes see the same global batches, and a checkpoint stores one
integer. The refused alternative is a shuffle buffer, which cannot be resumed without reading what
it held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from crnet.data.order import order
from crnet.data.shards import MASK, MEASURED, Prepared, stored_dtype
from crnet.data.sources import Split
from crnet.errors import ConfigError

IGNORED = -100
"""The target at which no loss is taken."""


class Rows:
    """The rows of one split: inputs and targets of ``sequence_length`` tokens, by index.

    packed: row i of a shard reads ids ``[i T, i T + T]``; the first T are inputs, the last T are
    targets. Rows follow each other without a gap, ignore the ends of documents, and do not cross
    shards; what is left at the end of a shard is dropped.

    document: one document a row. A document of more than T ids keeps its first T - 1 and the end
    token, a shorter one is filled with the padding id (the end token where there is none). Targets
    are the inputs shifted left by one; at the padding and in the last place they are ``IGNORED``.
    Source: the C4 protocol of GaLore and its successors (truncation and padding to 256, no
    packing).

    Of conversations (``Prepared.is_masked``) targets that do not count are ``IGNORED`` too, and so
    is the end token in whose place one was cut. Rows without a target that counts are left out: no
    step and no evaluation is without one.
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
        Cost: none; the files are mapped, not read. Of conversations a byte a token is.
        """
        if sequence_length < 2 or mode not in ("packed", "document"):
            raise ConfigError(
                f"rows of {sequence_length} tokens in mode {mode!r}; --data.sequence-length must "
                "be at least 2 and --data.rows packed or document"
            )
        self.prepared, self.split, self.mode = prepared, split, mode
        self.sequence_length = sequence_length
        shards, folder = prepared.parts[split].shards, prepared.folder
        dtype = stored_dtype(prepared.dtype)
        self._ids = [_mapped(folder / f"{shard.name}.bin", dtype) for shard in shards]
        self._starts = [_mapped(folder / f"{shard.name}.idx", np.dtype("<u8")) for shard in shards]
        if mode == "document":
            counts = [shard.documents for shard in shards]
        else:
            counts = [max(0, shard.tokens - 1) // sequence_length for shard in shards]
        self._masks: list[np.ndarray] = []
        self._kept: list[np.ndarray] = []
        if prepared.is_masked:
            names = [f"{shard.name}{MASK}" for shard in shards]
            self._masks = [_mapped(folder / name, np.dtype(np.uint8)) for name in names]
            self._kept = [self._counting(*each) for each in enumerate(counts)]
            counts = [len(kept) for kept in self._kept]
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
            tokens, targets = read(shard, self._in_shard(shard, indices))
        else:
            tokens = np.empty((len(indices), self.sequence_length), np.int64)
            targets = np.empty_like(tokens)
            for shard in np.unique(shards):
                here = shards == shard
                tokens[here], targets[here] = read(shard, self._in_shard(shard, indices[here]))
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    def _in_shard(self, shard: int, indices: np.ndarray) -> np.ndarray:
        """Which rows of its shard rows of all shards are."""
        rows = indices - self._first_row[shard]
        return self._kept[shard][rows] if self._kept else rows

    def _counting(self, shard: int, num_rows: int) -> np.ndarray:
        """Those of a shard's rows that have a target that counts."""
        found, size = [np.zeros(0, np.int64)], 2**14
        for start in range(0, num_rows, size):
            rows = np.arange(start, min(start + size, num_rows))
            found.append(rows[self._counted(shard, rows).any(axis=1)])
        return np.concatenate(found)

    def _counted(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """Which targets of rows count; bool, (rows, T)."""
        mask, length = self._masks[shard], self.sequence_length
        if self.mode == "packed":
            return self._windows(mask[1:])[rows] > 0
        counted = np.zeros((len(rows), length), bool)
        for i, (start, end) in enumerate(zip(*self._spans(shard, rows), strict=True)):
            is_cut = end - start > length
            size = length - 2 if is_cut else end - start - 1
            counted[i, :size] = mask[start + 1 : start + 1 + size]
        return counted

    def _windows(self, stream: np.ndarray) -> np.ndarray:
        """A view: row i is ``stream[i T : i T + T]``."""
        return sliding_window_view(stream, self.sequence_length)[:: self.sequence_length]

    def _packed(self, shard: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Row i of this view is ids[i T : i T + T + 1]; taking rows of it copies whole rows.
        windows = sliding_window_view(self._ids[shard], self.sequence_length + 1)
        both = windows[:: self.sequence_length][rows]
        tokens, targets = both[:, :-1].astype(np.int64), both[:, 1:].astype(np.int64)
        if self._masks:
            targets[~self._counted(shard, rows)] = IGNORED
        return tokens, targets

    def _documents(self, shard: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, length, prepared = self._ids[shard], self.sequence_length, self.prepared
        pad_id = prepared.eos_id if prepared.pad_id is None else prepared.pad_id
        tokens = np.full((len(rows), length), pad_id, np.int64)
        targets = np.full((len(rows), length), IGNORED, np.int64)
        for i, (start, end) in enumerate(zip(*self._spans(shard, rows), strict=True)):
            size = min(end - start, length)
            tokens[i, :size] = ids[start : start + size]
            tokens[i, size - 1] = prepared.eos_id
            targets[i, : size - 1] = tokens[i, 1:size]
        if self._masks:
            targets[~self._counted(shard, rows)] = IGNORED
        return tokens, targets

    def _spans(self, shard: int, rows: np.ndarray) -> tuple[list[int], list[int]]:
        """Where the documents of rows begin and end in their shard's ids."""
        index = self._starts[shard]
        following = index[np.minimum(rows + 1, len(index) - 1)]
        ends = np.where(rows + 1 < len(index), following, len(self._ids[shard]))
        return index[rows].tolist(), ends.tolist()

    def num_bytes(self, indices: np.ndarray) -> int:
        """Return how many bytes of text the targets of rows stand for (``encode_measured``).

        Exact where a row is cut in the middle of a document: each of its ids knows its own bytes.
        Of conversations those of targets that count.
        The first id of a row is no target; an end token stands for none, and so does the one in
        whose place a document was cut.

        Raises:
            ConfigError: the split has no lengths beside its ids.
        Cost: reads 4 bytes a target.
        """
        if self.split not in MEASURED:
            raise ConfigError(f"the bytes of the {self.split} part are not written down")
        shards = np.searchsorted(self._first_row, indices, side="right") - 1
        total = 0
        for shard in np.unique(shards):
            name = self.prepared.parts[self.split].shards[shard].name
            lengths = _mapped(self.prepared.folder / f"{name}.len", np.dtype("<u4"))
            rows = self._in_shard(shard, indices[shards == shard])
            if self._masks:
                lengths = lengths * self._masks[shard]
            if self.mode == "packed":
                total += int(self._windows(lengths[1:])[rows].sum(dtype=np.int64))
                continue
            for start, end in zip(*self._spans(int(shard), rows), strict=True):
                is_cut = end - start > self.sequence_length
                last = start + self.sequence_length - 1 if is_cut else end
                total += int(lengths[start + 1 : last].sum(dtype=np.int64))
        return total

    def within(self, max_tokens: int) -> np.ndarray:
        """Return the indices, rising, of rows that hold at most ``max_tokens`` tokens of input.

        Padding is not counted. At least one row, at most all. A set that is cut is spread over the
        whole, as the published evaluations shuffle first: the first rows alone would be the first
        file of a corpus of several. Which rows it has hangs on nothing but the number of rows and
        tokens, and a smaller set is part of a larger one.

        Cost: a permutation of the rows where the set is cut.
        """
        if self._num_tokens() <= max_tokens:
            return np.arange(len(self))
        count = len(self)
        if self.mode == "packed":
            count = max(max_tokens // self.sequence_length, 1)
        drawn = order(0, len(self), 0, count)
        if self.mode == "document":
            read = np.cumsum(self._sizes()[drawn])
            drawn = drawn[: max(int(np.searchsorted(read, max_tokens, side="right")), 1)]
        return np.sort(drawn)

    def _num_tokens(self) -> int:
        """Tokens of input in all rows; padding is not counted."""
        if self.mode == "packed":
            return len(self) * self.sequence_length
        return int(self._sizes().sum())

    def _sizes(self) -> np.ndarray:
        """Tokens of each row of mode document."""
        lengths = [
            np.diff(starts.astype(np.int64), append=len(ids))
            for starts, ids in zip(self._starts, self._ids, strict=True)
        ]
        if self._kept:
            pairs = zip(lengths, self._kept, strict=True)
            lengths = [sizes[kept] for sizes, kept in pairs]
        return np.minimum(np.concatenate(lengths), self.sequence_length)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, mode="r"))


def check_enough(rows: Rows, batch_size: int) -> None:
    """Raise a ``ConfigError`` if there are fewer rows than one batch holds."""
    if len(rows) >= max(batch_size, 1):
        return
    part = rows.prepared.parts[rows.split]
    if rows.split == "validation":
        mend = "hold out more (--data.validation-frac) or name a --data.validation-source"
    else:
        mend = "take a smaller --train.batch-size or more text (--data.source)"
    if part.documents and rows.prepared.is_masked:
        mend += "; rows without an answer that counts are left out"
    shorter = "" if rows.mode == "document" else ", or a smaller --data.sequence-length"
    raise ConfigError(
        f"the {rows.split} part has {part.tokens:,} tokens in {part.documents:,} documents, which "
        f"gives {len(rows)} rows of {rows.sequence_length} tokens where {max(batch_size, 1)} are "
        f"needed; {mend}{shorter}"
    )


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


def validation_batches(
    rows: Rows, batch_size: int, max_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the validation rows (``Rows.within``) in file order, the same whatever the batch size.

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
    indices = rows.within(max_tokens)
    for start in range(0, len(indices), batch_size):
        yield rows.batch(indices[start : start + batch_size])


def validation_hash(rows: Rows, max_tokens: int) -> str:
    """Return the SHA-256, in hex, of exactly the rows that ``validation_batches`` yields.

    Row after row: its tokens, then its targets, as little-endian int64.
    """
    digest = hashlib.sha256()
    for tokens, targets in validation_batches(rows, 256, max_tokens):
        digest.update(torch.stack([tokens, targets], dim=1).numpy().astype("<i8").tobytes())
    return digest.hexdigest()
