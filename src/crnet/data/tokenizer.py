"""Tokenizers behind one small surface: tokenizer.json, SentencePiece models, and our own BPE.

SentencePiece models are run by ``sentencepiece`` itself, not converted: a conversion has to
rebuild the normalisation and the byte fallback of each model, and a silent difference there
changes every id. The price is that a ``.model`` file needs the optional package.

Text is text: a document that spells out a special token, such as ``<|endoftext|>``, does not get
that token's id from a tokenizer.json of BPE kind, nor from SentencePiece. (A Unigram
tokenizer.json, such as T5's, has its special tokens among its pieces and still maps them.)
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from crnet.config.serialize import read_json
from crnet.data.templates import DEFAULT, TEMPLATE, Beside, beside, named, texts_of
from crnet.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
"""The end token of a trained tokenizer, id 0."""
EOS_NAMES = (
    "</s>",
    END_OF_TEXT,
    "<eos>",
    "<|end_of_text|>",
    "<|eos|>",
    "<|im_end|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001  DeepSeek writes it with these signs
    "[EOS]",
    "[SEP]",
)
"""Names by which an end token is recognised where a tokenizer does not say, in this order."""
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")

_JSON, _SPECIALS, _PIECES = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
_CLASSES = {_JSON: "TokenizersBackend", _PIECES: "SentencePieceBackend"}
"""Of transformers, by the file that they run as it is."""


class _Engine(Protocol):
    """What the two libraries have in common, as ``Tokenizer`` needs it."""

    file_name: str
    vocab_size: int

    def token_id(self, name: str) -> int | None: ...
    def named(self, role: str) -> int | None: ...
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...
    def encode_lengths(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Ids, and the bytes of the text that each stands for."""
        ...

    def decode(self, ids: list[int]) -> str: ...
    def special_names(self, ids: dict[str, int]) -> dict[str, str]: ...
    def to_bytes(self) -> bytes: ...


class Tokenizer:
    """Text to ids and back. Made by ``load``, ``load_saved`` and ``train``.

    Attributes:
        vocab_size: rows that an embedding needs, the largest id plus one.
        eos_id: the id that ends a document.
        pad_id: the id that fills a row, or None where the vocabulary has none.
        hash: SHA-256, in hex, of the tokenizer's file that ``save`` writes.
        templates: its chat templates by name (``data.templates``).
        token_texts: ``bos_token`` and so on, for these.
    """

    def __init__(self, engine: _Engine, origin: str, given: Beside | None = None):
        given = given or Beside()
        self._engine = engine
        self.templates = dict(given.templates)
        self.vocab_size = engine.vocab_size
        self.hash = hashlib.sha256(engine.to_bytes()).hexdigest()
        eos_id = _special(engine, "eos", EOS_NAMES)
        if eos_id is None:
            raise ConfigError(
                f"{origin}: the tokenizer has no end-of-text token (looked for "
                f"{', '.join(EOS_NAMES)}); name it as eos_token in a {_SPECIALS} beside the file"
            )
        self.eos_id: int = eos_id
        self.pad_id: int | None = _special(engine, "pad", PAD_NAMES)
        self.token_texts = {**given.tokens, **self._special_texts()}

    @property
    def chat_template(self) -> str | None:
        """The one that is meant where none is named, and the one that ``save`` writes."""
        return self.templates.get(DEFAULT)

    def with_chat_template(self, text: str) -> Tokenizer:
        """The same tokenizer with that template alone."""
        made = copy.copy(self)
        made.templates = {DEFAULT: text}
        return made

    def json_content(self) -> bytes | None:
        """The tokenizer.json; None of a SentencePiece model."""
        return self._engine.to_bytes() if self._engine.file_name == _JSON else None

    def _special_texts(self) -> dict[str, str]:
        ids = {"eos_token": self.eos_id}
        if self.pad_id is not None:
            ids["pad_token"] = self.pad_id
        return self._engine.special_names(ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without an end token.

        Cost: about a million ids a second.
        """
        return self._engine.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, without end tokens.

        Args:
            texts: any number of texts.
        Returns:
            One uint32 array for each.
        Cost: as ``encode``, over all cores (the library's own threads).
        """
        return [np.array(ids, np.uint32) for ids in self._engine.encode_batch(list(texts))]

    def encode_measured(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of each text, and how many bytes of the text each id stands for.

        An id stands for the text (UTF-8, as it came) from where the one before it ends to where it
        ends itself: what the tokenizer leaves out counts with what follows, a character that is
        spelled by several ids with one of them. So lengths add up to the text, but for what is left
        out behind the last id, whatever the tokenizer does to the text.

        Args:
            texts: any number of texts.
        Returns:
            Two arrays for each, uint32 and int64.
        Cost: up to three times ``encode_batch``.
        """
        found = self._engine.encode_lengths(list(texts))
        return [(np.array(ids, np.uint32), np.array(each, np.int64)) for ids, each in found]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; special tokens are written out where the library can.

        Raises:
            ConfigError: an id is outside the vocabulary.
        """
        plain = [int(i) for i in ids]
        outside = [i for i in plain if not 0 <= i < self.vocab_size]
        if outside:
            raise ConfigError(
                f"id {outside[0]} is outside the vocabulary of {self.vocab_size} entries; these "
                "ids come from another tokenizer"
            )
        return self._engine.decode(plain)

    def save(self, folder: Path) -> None:
        """Write the tokenizer into an existing folder, for ``load_saved`` and for transformers'
        ``AutoTokenizer``, which gives the same ids with ``add_special_tokens=False``. Without it a
        tokenizer.json adds what it says there (T5's an end token); our own says nothing. A chat
        template is written beside it.

        Raises:
            OSError: the folder cannot be written.
        """
        (folder / self._engine.file_name).write_bytes(self._engine.to_bytes())
        # The names also keep an end token that goes by another one.
        described = self._special_texts()
        if self.chat_template is not None:
            (folder / TEMPLATE).write_bytes(self.chat_template.encode())
            described |= self.token_texts
        described |= {
            "tokenizer_class": _CLASSES[self._engine.file_name],
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
        (folder / _SPECIALS).write_text(text, encoding="utf-8")


def _lengths(text: str, ends: Sequence[int]) -> list[int]:
    """Bytes between successive ends, given in characters."""
    if text.isascii():
        at_bytes = np.arange(len(text) + 1)
    else:
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
        at_bytes = np.concatenate([[0], np.cumsum(sizes)])
    rising = np.maximum.accumulate(np.asarray(ends, np.int64))
    return np.diff(at_bytes[rising], prepend=0).tolist()


def load(spec: str) -> Tokenizer:
    """Open a tokenizer.

    Args:
        spec: a tokenizer.json, a SentencePiece ``.model``, a folder with one of them, or whatever
            ``transformers.AutoTokenizer`` opens: a Hugging Face name or another folder.
    Returns:
        The tokenizer, with its truncation and padding off.
    Raises:
        ConfigError: there is no such file, it is not a tokenizer, it has no end token, or the
            package that reads it is missing.
    Cost: up to a second; a Hugging Face name imports ``transformers``, several seconds.
    """
    path = Path(spec).expanduser()
    if os.path.isdir(path):  # os.path, which answers no where a name is too long
        if (path / _JSON).is_file() or (path / _PIECES).is_file():
            return load_saved(path)
        return _from_transformers(str(path))
    if os.path.isfile(path):
        if path.suffix == ".model":
            return Tokenizer(_SentencePiece(_content(path), spec), spec)
        if path.name != _JSON:
            return Tokenizer(_Json(_content(path), {}, spec), spec)
        names = _special_names(path.parent / _SPECIALS)
        return Tokenizer(_Json(_content(path), names, spec), spec, beside(path.parent))
    if path.suffix in (".json", ".model") or spec.count("/") > 1:
        raise ConfigError(
            f"--data.tokenizer {spec}: no such file; name a tokenizer.json, a SentencePiece "
            ".model, a Hugging Face name, or train"
        )
    return _from_transformers(spec)


def load_saved(folder: Path) -> Tokenizer:
    """Open the tokenizer that ``Tokenizer.save`` wrote, or any folder with a tokenizer.json.

    Raises:
        ConfigError: the folder holds no tokenizer, or a broken one.
    """
    if (folder / _JSON).is_file():
        names = _special_names(folder / _SPECIALS)
        engine: _Engine = _Json(_content(folder / _JSON), names, str(folder / _JSON))
        return Tokenizer(engine, str(folder), beside(folder))
    if (folder / _PIECES).is_file():
        engine = _SentencePiece(_content(folder / _PIECES), str(folder))
        return Tokenizer(engine, str(folder), beside(folder))
    raise ConfigError(f"{folder}: holds neither {_JSON} nor {_PIECES}; name a tokenizer's folder")


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE: every text can be encoded, and decodes to itself.

    Args:
        texts: read once.
        vocab_size: entries, at least 257: the end token (id 0), the 256 bytes, then merges. A
            small corpus may give fewer.
    Returns:
        The tokenizer, the same for the same texts in the same order.
    Raises:
        ConfigError: ``vocab_size`` is below 257.
    Cost: about 4 s for 10 MB on two cores; memory of the distinct words.
    """
    if vocab_size < 257:
        raise ConfigError(
            f"--data.vocab-size is {vocab_size}; byte-level BPE needs at least 257 "
            "(256 bytes and end-of-text)"
        )
    bpe: Any = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return Tokenizer(_Json(bpe.to_str().encode(), {}, "trained"), "the trained tokenizer")


def fingerprint(spec: str) -> str:
    """Identify what ``load(spec)`` would open without opening it; "train" stays "train".

    Files are identified by their content, Hugging Face names by the name.

    Raises:
        ConfigError: a file cannot be read.
    """
    path = Path(spec).expanduser()
    if spec == "train" or not os.path.exists(path):
        return spec
    files = [path, path.parent / _SPECIALS]
    if path.is_dir():
        files = sorted(path.glob("*.json")) + sorted(path.glob("*.model")) + [path / "merges.txt"]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(f"{file.name}\0".encode() + hashlib.sha256(_content(file)).digest())
    return digest.hexdigest()


def _special(engine: _Engine, role: str, names: Iterable[str]) -> int | None:
    token_id = engine.named(role)
    if token_id is not None:
        return token_id
    found = (engine.token_id(name) for name in names)
    return next((token_id for token_id in found if token_id is not None), None)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); make it readable for this user"
        ) from error


def _special_names(path: Path) -> dict[str, str]:
    """Names of special tokens, by role, from a tokenizer_config.json if there is one."""
    if not path.is_file():
        return {}
    texts = texts_of(read_json(path))
    return {role: text for role in ("eos", "pad") if (text := texts.get(f"{role}_token"))}


def _from_transformers(spec: str) -> Tokenizer:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            f"--data.tokenizer {spec}: is no tokenizer.json and no .model; Hugging Face names "
            "need the package transformers; pip install 'crnet[data]'"
        ) from error
    try:
        opened = transformers.AutoTokenizer.from_pretrained(spec)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--data.tokenizer {spec}: cannot be opened ({first}); name a tokenizer.json, a "
            "SentencePiece .model, a Hugging Face name (needs the network once), or train"
        ) from error
    backend = getattr(opened, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"--data.tokenizer {spec}: {type(opened).__name__} has no fast form; name a "
            "tokenizer.json or a SentencePiece .model instead"
        )
    pairs = (("eos", opened.eos_token), ("pad", opened.pad_token))
    names = {role: str(name) for role, name in pairs if name is not None}
    given = Beside(named(opened.chat_template), texts_of(opened.special_tokens_map))
    return Tokenizer(_Json(backend.to_str().encode(), names, spec), spec, given)


class _Json:
    """The ``tokenizers`` library."""

    file_name = _JSON

    def __init__(self, content: bytes, names: dict[str, str], origin: str):
        try:
            self._library: Any = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise ConfigError(
                f"{origin}: is not a tokenizer.json ({error}); name a file that the tokenizers "
                "library wrote, a SentencePiece .model, or train"
            ) from error
        self._library.no_truncation()
        self._library.no_padding()
        self._content = self._library.to_str().encode()
        self._library.encode_special_tokens = True
        self._names = names
        self._ids: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values(), default=-1) + 1

    def token_id(self, name: str) -> int | None:
        return self._ids.get(name)

    def named(self, role: str) -> int | None:
        return self._ids.get(self._names.get(role, ""))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        found = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def encode_lengths(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        found = self._library.encode_batch(texts, add_special_tokens=False)
        return [
            (each.ids, _lengths(text, [end for _, end in each.offsets]))
            for text, each in zip(texts, found, strict=True)
        ]

    def decode(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False)

    def special_names(self, ids: dict[str, int]) -> dict[str, str]:
        return {role: self.decode([token_id]) for role, token_id in ids.items()}

    def to_bytes(self) -> bytes:
        return self._content


class _SentencePiece:
    """The ``sentencepiece`` library."""

    file_name = _PIECES

    def __init__(self, content: bytes, origin: str):
        try:
            sentencepiece = importlib.import_module("sentencepiece")
        except ImportError as error:
            raise ConfigError(
                f"{origin}: a SentencePiece model needs the package sentencepiece; "
                "pip install 'crnet[data]'"
            ) from error
        self._library: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._library.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise ConfigError(
                f"{origin}: is not a SentencePiece model ({error}); name the .model or .spiece "
                "file that SentencePiece wrote"
            ) from error
        self._content = content
        self.vocab_size: int = self._library.get_piece_size()

    def token_id(self, name: str) -> int | None:
        token_id = self._library.piece_to_id(name)
        return token_id if self._library.id_to_piece(token_id) == name else None

    def named(self, role: str) -> int | None:
        token_id = {"eos": self._library.eos_id, "pad": self._library.pad_id}[role]()
        return token_id if token_id >= 0 else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._library.encode(texts, num_threads=os.cpu_count() or 1)

    def encode_lengths(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        try:
            found = self._library.encode(texts, out_type="proto", num_threads=os.cpu_count() or 1)
        except ImportError as error:
            raise ConfigError(
                f"the bytes of SentencePiece's ids need the package protobuf ({error}); "
                "pip install 'crnet[data]'"
            ) from error
        return [
            (
                [piece.id for piece in each.pieces],
                np.diff([piece.end for piece in each.pieces], prepend=0).tolist(),  # in bytes
            )
            for each in found
        ]

    def decode(self, ids: list[int]) -> str:
        return self._library.decode(ids)

    def special_names(self, ids: dict[str, int]) -> dict[str, str]:
        if (unknown := self._library.unk_id()) >= 0:
            ids = ids | {"unk_token": unknown}
        return {role: self._library.id_to_piece(token_id) for role, token_id in ids.items()}

    def to_bytes(self) -> bytes:
        return self._content
