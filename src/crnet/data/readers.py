"""From one file to texts: unpack it, decode it, take the records apart, cut a text into documents.

Nothing here holds more than one block of a file and one document in memory, but for a .json file
that is one list of chat records.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import itertools
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from crnet.config.sections import DataConfig
from crnet.config.serialize import parse_json
from crnet.data.conversations import ChatReader, layout_of
from crnet.errors import ConfigError

WHOLE_FILE_CHARS = 64 * 1024
"""With ``documents="auto"``, a text file up to this long is one document."""
PIECE_CHARS = 8 * 1024
"""... and a longer one is cut into pieces at most this long."""
TEXT_KEYS = (
    "text",
    "content",
    "body",
    "document",
    "article",
    "passage",
    "story",
    "markdown",
    "raw_content",
    "abstract",
)
"""Fields in which a record's text is looked for when ``text_key`` is not given, in this order."""

Texts = Iterator[tuple[str, str]]
"""Texts with their origins."""
Reader = Callable[[], Texts]

_BLOCK_BYTES = 1 << 20
_PACKED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": None}
_RECORDS = (".jsonl", ".json", ".ndjson")
KNOWN_SUFFIXES = (".txt", ".parquet", *_RECORDS, *_PACKED)
"""The endings of names that are file names for certain."""
_BLANK_LINE = re.compile(r"\n[ \t]*\n")


def file_reader(path: Path, data: DataConfig) -> Reader:
    """Return what reads the texts of a file; nothing is opened yet.

    Raises:
        ConfigError: the file can be told by name to be unreadable.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in _PACKED
    inner = suffixes[-2:-1] if packed else suffixes[-1:]
    kind = inner[0] if inner else ""
    if kind == ".parquet" and packed:
        raise ConfigError(
            f"{path}: a packed .parquet file cannot be read in pieces; unpack it (it is "
            "compressed inside already)"
        )
    if kind == ".parquet":
        return lambda: _parquet_texts(path, record_reader(data))
    if data.chat is not None and kind == ".json":
        return lambda: _listed_texts(path, record_reader(data))
    if kind in _RECORDS:
        return lambda: _record_texts(path, record_reader(data))
    if data.chat is not None:
        raise ConfigError(
            f"{path}: is a text, and --data.chat {data.chat} reads records (.jsonl, .json, "
            ".parquet); name such files, or say --data.chat none"
        )
    cut = _CUTS[data.documents]
    origin = str(path)
    return lambda: ((piece, origin) for piece in cut(_blocks(path)))


def text_reader(text: str, origin: str, data: DataConfig) -> Reader:
    """Return what reads a text in memory as if it were a file's."""
    cut = _CUTS[data.documents]
    return lambda: ((piece, origin) for piece in cut(iter([text])))


# Files -> blocks


def _bytes(path: Path) -> Iterator[bytes]:
    """The unpacked content in blocks."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            yield from _zst_bytes(path)
        else:
            opened = (_PACKED.get(suffix) or open)(path, "rb")
            with opened as stream:
                while block := stream.read(_BLOCK_BYTES):
                    yield block
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(_broken(path, error)) from error
    except OSError as error:
        raise ConfigError(_failed(path, error)) from error


def _zst_bytes(path: Path) -> Iterator[bytes]:
    zstandard = optional_package("zstandard", str(path))
    # decompressobj, because stream_reader takes a file cut off in the middle for a whole one.
    frame = zstandard.ZstdDecompressor().decompressobj()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES // 8):
            while block:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise ConfigError(_broken(path, error)) from error
                block = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("it ends before its end-of-frame mark")


def _blocks(path: Path) -> Iterator[str]:
    """The decoded content in blocks, every line end as a newline, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    for number, block in enumerate(itertools.chain(_bytes(path), [b""])):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            # The decoder was given what it had left of earlier blocks, then this one.
            at = offset - (len(error.object) - len(block)) + error.start
            raise ConfigError(_undecodable(path, at, error.object[error.start])) from error
        offset += len(block)
        text = newlines.decode(text, final=not block)
        yield text.removeprefix("\ufeff") if number == 0 else text


# Texts -> documents


def _whole(blocks: Iterator[str]) -> Iterator[str]:
    yield "".join(blocks)


def _lines(blocks: Iterator[str]) -> Iterator[str]:
    parts: list[str] = []  # of the line that has not ended; joined once, however long it is
    for block in blocks:
        first, *others = block.split("\n")
        parts.append(first)
        if others:
            yield "".join(parts)
            yield from others[:-1]
            parts = [others[-1]]
    yield "".join(parts)


def _paragraphs(blocks: Iterator[str]) -> Iterator[str]:
    lines: list[str] = []
    for line in _lines(blocks):
        if line and not line.isspace():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []
    yield "\n".join(lines)


def _auto(blocks: Iterator[str]) -> Iterator[str]:
    """A short file whole; a long one in pieces whose concatenation is the file."""
    text = ""
    for block in blocks:
        text += block
        if len(text) > WHOLE_FILE_CHARS:
            break
    else:
        yield text
        return
    for block in itertools.chain([""], blocks):
        text += block
        start = 0
        while len(text) - start > PIECE_CHARS:
            end = _piece_end(text, start)
            yield text[start:end]
            start = end
        text = text[start:]
    yield text


def _piece_end(text: str, start: int) -> int:
    middle, limit = start + PIECE_CHARS // 2, start + PIECE_CHARS
    # A piece of less than half the length is worse than a cut at a mere line end.
    end = max((match.end() for match in _BLANK_LINE.finditer(text, middle, limit)), default=0)
    return end or text.rfind("\n", middle, limit) + 1 or limit


_CUTS = {"auto": _auto, "file": _whole, "paragraph": _paragraphs, "line": _lines}


# Records -> texts


class RecordReader(Protocol):
    """Finds the text of the records of one file; how is settled by the first one."""

    def text_of(self, record: Any, where: str) -> str: ...
    def settle(self, fields: Iterable[str], where: str) -> list[str]:
        """Names of the fields that are read."""
        ...


def record_reader(data: DataConfig) -> RecordReader:
    """What reads the records of a file."""
    return TextKey(data.text_key) if data.chat is None else ChatReader(data.chat)


class TextKey:
    """Finds a record's text; which field it is in is settled by the first record."""

    def __init__(self, text_key: str | None):
        """Take ``data.text_key``: fields with commas between them, or None."""
        wanted = (text_key or "").split(",")
        self._keys = [key.strip() for key in wanted if key.strip()] if text_key else None

    def text_of(self, record: Any, where: str) -> str:
        """Return the text of a record: those of several fields with a blank line between.

        Args:
            record: of any type.
            where: the beginning of a message.
        Raises:
            ConfigError: it is not an object with text in the wanted fields.
        """
        if not isinstance(record, dict):
            raise ConfigError(
                f"{where}: a record is an object with a text field, such as "
                f'{{"text": "..."}}; this is a {type(record).__name__}'
            )
        texts = [_field(record, key, where) for key in self.settle(record, where)]
        return "\n\n".join(text for text in texts if text)

    def settle(self, fields: Iterable[str], where: str) -> list[str]:
        """Return the names of the fields with text, found among ``fields`` at the first call.

        Raises:
            ConfigError: none is known to hold text.
        """
        if self._keys is None:
            found = list(fields)
            self._keys = [key for key in TEXT_KEYS if key in found][:1]
            if not self._keys:
                chat = ", or read conversations with --data.chat auto" if layout_of(found) else ""
                raise ConfigError(
                    f"{where}: none of the fields {', '.join(map(repr, found)) or '(none)'} is "
                    f"known to hold text ({', '.join(TEXT_KEYS)}); name it with --data.text-key"
                    f"{chat}"
                )
        return self._keys


def _field(record: dict[str, Any], key: str, where: str) -> str | None:
    value = record.get(key)
    if key not in record or not (value is None or isinstance(value, str)):
        problem = "is missing" if key not in record else f"is a {type(value).__name__}"
        raise ConfigError(
            f"{where}: the text field {key!r} {problem}; found are "
            f"{', '.join(map(repr, record))}; name the field with --data.text-key"
        )
    return value


def _listed_texts(path: Path, key: RecordReader) -> Texts:
    """Of a .json file: one list of records, which is held whole, or a record a line."""
    blocks = _bytes(path)
    first = next(blocks, b"")
    if not first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _record_texts(path, key)
        return
    content = b"".join([first, *blocks]).removeprefix(codecs.BOM_UTF8)
    try:
        records = parse_json(content)
    except UnicodeDecodeError as error:
        raise ConfigError(_undecodable(path, error.start, content[error.start])) from error
    except ValueError as error:
        raise ConfigError(
            f"{path}: is not a JSON list ({error}); mend or write it again"
        ) from error
    for number, record in enumerate(records):
        origin = f"{path}[{number}]"
        yield key.text_of(record, origin), origin


def _record_texts(path: Path, key: RecordReader) -> Texts:
    offset = 0
    for number, line in enumerate(_byte_lines(path), 1):
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if content and not content.isspace():
            origin = f"{path}:{number}"
            start = offset + len(line) - len(content)
            yield key.text_of(_record(path, content, number, start), origin), origin
        offset += len(line) + 1


def _byte_lines(path: Path) -> Iterator[bytes]:
    parts: list[bytes] = []
    for block in _bytes(path):
        first, *others = block.split(b"\n")
        parts.append(first)
        if others:
            yield b"".join(parts)
            yield from others[:-1]
            parts = [others[-1]]
    yield b"".join(parts)


def _record(path: Path, line: bytes, number: int, offset: int) -> Any:
    try:
        record = parse_json(line)
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise ConfigError(_undecodable(path, offset + error.start, byte)) from error
    except ValueError as error:
        raise ConfigError(
            f"{path}:{number}: is not a JSON record ({error}); wanted is one record a line: "
            f"jq -c . {path.name} (or .[] for a list) writes that"
        ) from error
    if number == 1 and isinstance(record, list):
        raise ConfigError(
            f"{path}:{number}: is one JSON list; wanted is one record a line: "
            f"jq -c '.[]' {path.name} writes that"
        )
    return record


def _parquet_texts(path: Path, key: RecordReader) -> Texts:
    pyarrow = optional_package("pyarrow", str(path))
    parquet = optional_package("pyarrow.parquet", str(path))
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in key.settle(names, str(path)) if name in names]
            if not wanted:
                key.text_of(dict.fromkeys(names), str(path))  # says which field is missing
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    origin = f"{path}:{number}"
                    yield key.text_of(record, origin), origin
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise ConfigError(_broken(path, error)) from error
    except OSError as error:
        raise ConfigError(_failed(path, error)) from error


# Packages and messages


def optional_package(module: str, need: str) -> ModuleType:
    """Import a package that only some sources need.

    Args:
        module: the name to import.
        need: what needs it, the beginning of the message.
    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{need} needs the package {module}, which cannot be imported ({error}); "
            "pip install 'crnet[data]'"
        ) from error


def unreadable(path: Path, error: OSError) -> str:
    """Return the message for a file or folder that the system refuses to open."""
    return (
        f"{path}: cannot be read ({error.strerror or error}); make it readable for this user, "
        "or name another source"
    )


def _broken(path: Path, error: Exception) -> str:
    return f"{path}: is not a whole {path.suffix} file ({error}); fetch or pack it again"


def _failed(path: Path, error: OSError) -> str:
    # gzip, bz2 and pyarrow report broken content as an OSError without a number.
    return _broken(path, error) if error.errno is None else unreadable(path, error)


def _undecodable(path: Path, offset: int, byte: int) -> str:
    return (
        f"{path}: byte {offset} (0x{byte:02x}) is not UTF-8 text; if it is text in another "
        f"encoding, convert it: iconv -f LATIN1 -t UTF-8 {path.name}; if it is not text, name "
        "the text files by a glob, such as 'folder/**/*.txt'"
    )
