"""A corpus as tokens in the cache: found there, or made once.

A corpus goes through a tokenizer once. The ids are kept in a folder of the cache whose name is a
hash of everything that decides them; ``crnet.data.shards`` says what lies in it.
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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from crnet.config.sections import DataConfig
from crnet.config.serialize import to_dict
from crnet.data import sources, templates, tokenizer
from crnet.data.chat import Chat, Encoded
from crnet.data.conversations import contents_of, conversation_of
from crnet.data.shards import (
    FORMAT,
    MEASURED,
    Prepared,
    ShardWriter,
    file_of,
    open_prepared,
    write_meta,
    writing,
)
from crnet.data.sources import Document
from crnet.data.tokenizer import Tokenizer
from crnet.errors import ConfigError

SHARD_TOKENS = 2**28

_UNUSED = ".unfinished-"
_STALE_S = 24 * 3600
_BATCH_DOCUMENTS, _BATCH_CHARS = 1024, 4_000_000
_TOKENIZER_BYTES = 100_000_000
# These say how prepared tokens are used, not which they are ...
_USE = {"sequence_length", "rows", "validation_tokens", "cache_dir"}
# ... and these enter the key by the files they name, or only where they have an effect.
_NOT_IN_KEY = _USE | {"source", "validation_source", "tokenizer", "vocab_size"}
_CHAT = {"chat", "chat_template", "chat_loss"}


def prepare(
    data: DataConfig, *, progress: bool = True, shard_tokens: int = SHARD_TOKENS
) -> Prepared:
    """Find the corpus as tokens in the cache, or make it.

    The folder appears whole or not at all: it is written under another name and renamed. Two
    processes that prepare the same corpus both do the work; the first to finish is kept. A folder
    with a file that is missing or altered is made again, with a warning (``data.shards`` says what
    is checked).

    Args:
        data: the corpus and the tokenizer.
        progress: show documents and tokens on stderr while preparing.
        shard_tokens: most tokens in one file, unless one document alone is longer.
    Returns:
        The prepared corpus.
    Raises:
        ConfigError: a source or the tokenizer cannot be used, a source changed while it was read,
            no document is left for training or for validation, or the cache cannot be written.
    Cost: one ``stat`` per file where the cache has it; else one pass (two where the tokenizer
        is trained): on two cores one to two million tokens a second, a third of that with a Unigram
        tokenizer.json such as T5's (its .model is faster).
    """
    identity = sources.identity(data)
    key = _key(data, identity, shard_tokens)
    cache = _cache(data)
    folder = cache / key
    found = _find(folder)
    if found is not None:
        return found
    with writing(cache):
        unfinished = _new_folder(cache, key)
    try:
        _fill(unfinished, data, identity, progress, shard_tokens)
        if sources.identity(data) != identity:
            raise ConfigError(
                f"--data.source {' '.join(data.source)} changed while it was read; prepare it "
                "again once nothing writes to it"
            )
        with writing(cache):
            _publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already where all went well
    return open_prepared(folder)


def _cache(data: DataConfig) -> Path:
    if data.cache_dir is not None:
        return data.cache_dir.expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "crnet"


def _key(data: DataConfig, identity: list[list[Any]], shard_tokens: int) -> str:
    settings = {
        field.name: getattr(data, field.name)
        for field in fields(data)
        if field.name not in _left_out(data, _NOT_IN_KEY)
    }
    made_by = [tokenizer.fingerprint(data.tokenizer)]
    if data.tokenizer == "train":
        made_by.append(str(data.vocab_size))
    if data.chat is not None:
        made_by.append(templates.fingerprint(data))
    decisive = [FORMAT, shard_tokens, settings, made_by, identity]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:24]


def _left_out(data: DataConfig, keys: set[str]) -> set[str]:
    """Those keys, and where records are texts what is of conversations."""
    return keys if data.chat is not None else keys | _CHAT


# Folders of the cache


def _find(folder: Path) -> Prepared | None:
    if not os.path.isdir(folder):  # no where a name is too long
        return None
    try:
        return open_prepared(folder)
    except ConfigError as error:
        warnings.warn(f"{error}; preparing it again", stacklevel=3)
        return None


def _new_folder(cache: Path, key: str) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    _sweep(cache)
    unfinished = cache / f"{_UNUSED}{key}-{os.getpid()}-{secrets.token_hex(4)}"
    unfinished.mkdir()
    return unfinished


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
        _flush(path)
    if folder.is_dir():
        _set_aside_if_damaged(folder, folder.with_name(f"{unfinished.name}-damaged"))
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        # Another process finished first; the same key means the same tokens.


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _set_aside_if_damaged(folder: Path, aside: Path) -> None:
    try:
        open_prepared(folder)
    except ConfigError:
        # The damaged folder is moved aside, not emptied: a process that has it mapped goes on.
        with contextlib.suppress(FileNotFoundError):  # another process was as quick
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


# Documents -> shards


def _fill(
    folder: Path,
    data: DataConfig,
    identity: list[list[Any]],
    progress: bool,
    shard_tokens: int,
) -> None:
    encoder = _tokenizer(data, progress)
    if data.chat is not None:
        encoder = encoder.with_chat_template(templates.chosen(data, encoder.templates))
    dtype = "uint16" if encoder.vocab_size <= 2**16 else "uint32"
    train = ShardWriter(folder, "train", dtype, shard_tokens)
    validation = ShardWriter(folder, "validation", dtype, shard_tokens)
    writers = {"train": train, "validation": validation}
    try:
        _encode(data, encoder, writers, progress)
    finally:
        for writer in writers.values():
            writer.close()
    _check_parts(data, {split: writer.documents for split, writer in writers.items()})
    with writing(folder.parent):
        encoder.save(folder)
        files = train.files | validation.files
        others = sorted(path for path in folder.iterdir() if path.name not in files)
        files |= {path.name: file_of(path) for path in others}
        prepared = Prepared(
            folder=folder,
            vocab_size=encoder.vocab_size,
            eos_id=encoder.eos_id,
            pad_id=encoder.pad_id,
            dtype=dtype,
            tokenizer_hash=encoder.hash,
            parts={split: writer.part() for split, writer in writers.items()},
            source=_provenance(data, identity),
            files=files,
        )
        write_meta(prepared)


def _encode(
    data: DataConfig, encoder: Tokenizer, writers: Mapping[str, ShardWriter], progress: bool
) -> None:
    chat = Chat(encoder, data.chat_loss) if data.chat is not None else None
    with tqdm(desc="preparing", unit=" tokens", unit_scale=True, disable=not progress) as bar:
        for batch in _batches_of(sources.documents(data)):
            for split, writer in writers.items():
                found = [document for document in batch if document.split == split]
                if chat is not None:
                    made = chat.encode([(conversation_of(d.text), d.origin) for d in found])
                else:
                    made = _encoded([document.text for document in found], encoder, split)
                for ids, size, lengths, counts in made:
                    writer.write(ids, size, lengths if split in MEASURED else None, counts)
            num_documents = sum(writer.documents for writer in writers.values())
            bar.set_postfix_str(f"{num_documents:,} documents", refresh=False)
            bar.update(sum(writer.tokens for writer in writers.values()) - bar.n)


def _encoded(texts: list[str], encoder: Tokenizer, split: str) -> Iterator[Encoded]:
    """Texts, each with its end token; one that gives no id is left out."""
    measured = split in MEASURED
    encoded = encoder.encode_measured(texts) if measured else encoder.encode_batch(texts)
    end = np.array([encoder.eos_id], np.uint32)
    for text, found in zip(texts, encoded, strict=True):
        ids, lengths = found if isinstance(found, tuple) else (found, None)
        if not len(ids):
            continue
        size = len(text.encode())
        if lengths is not None:  # what no id stands for, such as blanks at the end, is the end's
            lengths = np.append(lengths, size - lengths.sum())
        yield Encoded(np.append(ids, end), size, lengths, None)


def _provenance(data: DataConfig, identity: list[list[Any]]) -> dict[str, Any]:
    left_out = _left_out(data, _USE)
    settings = {key: value for key, value in to_dict(data).items() if key not in left_out}
    # How many files or splits had which part; hash: a share of their documents held out.
    return {**settings, "read_as": dict(Counter(role for role, *_ in identity))}


def _tokenizer(data: DataConfig, progress: bool) -> Tokenizer:
    if data.tokenizer != "train":
        return tokenizer.load(data.tokenizer)
    texts = _training_texts(data, progress)
    first = list(itertools.islice(texts, 1))
    if not first:  # training on nothing would succeed
        held_out = sum(1 for _ in sources.documents(data))
        _check_parts(data, {"train": 0, "validation": held_out})
    return tokenizer.train(itertools.chain(first, texts), data.vocab_size)


def _training_texts(data: DataConfig, progress: bool) -> Iterator[str]:
    """What a tokenizer is trained on: the first texts of the training part."""
    num_bytes = 0
    label = "training the tokenizer"
    documents = sources.documents(data)
    for document in tqdm(documents, label, unit=" documents", disable=not progress):
        if document.split == "train":
            text = document.text if data.chat is None else contents_of(document.text)
            yield text
            num_bytes += len(text.encode())
            if num_bytes >= _TOKENIZER_BYTES:
                return


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
