"""From the words of ``--data.source`` to a stream of documents, each for training or validation.

A source word is resolved into parts (one file, one split of a Hugging Face data set, one module of
the standard library). Every part has a role, settled before anything is read: training,
validation, or "hash": each document falls to one side by its hash. So a document's side depends
neither on the order of reading nor on the other documents, and a corpus that grows keeps the
sides of the documents it had.

Nothing here holds more than one block of a file and one document in memory. The refused
alternative, ``datasets.load_dataset`` for everything, would make an optional package the only way
to read a text file and would hide in its cache which files were read.
"""

from __future__ import annotations

import bz2
import codecs
import dataclasses
import difflib
import glob
import gzip
import hashlib
import importlib
import io
import itertools
import json
import lzma
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any, Literal

from crnet.config.sections import DataConfig
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

Split = Literal["train", "validation"]
_Role = Literal["train", "validation", "hash", "hub"]

_BLOCK_BYTES = 1 << 20
_PACKED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": None}
_RECORDS = (".jsonl", ".json", ".ndjson")
_KNOWN_SUFFIXES = (".txt", ".parquet", *_RECORDS, *_PACKED)
_SPLIT_WORD = re.compile(
    r"(?:^|[-._ ])(train|training|validation|valid|val|dev|test|testing)(?=$|[-._ \d])", re.I
)
_ABOUT_DATA = re.compile(r"(README|LICEN[CS]E|COPYING|NOTICE)(\..*)?$", re.I)
_ABOUT_SET = ("README.md", "dataset_infos.json")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+$", re.A)
_BLANK_LINE = re.compile(r"\n[ \t]*\n")


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the side it is on."""

    text: str
    """Not empty, valid Unicode (it can be encoded as UTF-8)."""
    split: Split
    origin: str
    """Where it came from, for messages: ``file``, ``file:line`` or ``data set[split]:number``."""


@dataclass(frozen=True)
class _Part:
    role: _Role
    identity: tuple[Any, ...]
    """Changes when the text changes; JSON can hold it. Cheap: sizes and times, not contents."""
    read: Callable[[], Iterator[tuple[str, str]]]
    """Texts with their origins."""
    hash_key: str | None = None
    """What decides a document's side under the role "hash"; None: its text."""
    path: Path | None = None


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
    parts = [part for part in _resolve(data) for part in _opened(part, data)]
    main = [part for part in parts if part.role != "validation"]
    held_out = [part for part in parts if part.role == "validation"]

    def stream() -> Iterator[Document]:
        for group in (main, held_out):
            yield from itertools.islice(_read(group, data.validation_frac), data.max_documents)

    return stream()


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
    return [[part.role, part.hash_key, *part.identity] for part in _resolve(data)]


def _read(parts: Iterable[_Part], validation_frac: float) -> Iterator[Document]:
    for part in parts:
        for text, origin in part.read():
            if not text or text.isspace():
                continue
            try:
                encoded = text.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"{origin}: character {error.start} is half of a surrogate pair "
                    f"({text[error.start]!a}), which no UTF-8 text can hold; take it out of the "
                    "record"
                ) from error
            split: Split = "train" if part.role == "hash" else part.role  # type: ignore[assignment]
            if part.role == "hash":
                key = encoded if part.hash_key is None else part.hash_key.encode()
                split = "validation" if _share(key) < validation_frac else "train"
            yield Document(text, split, origin)


def _share(key: bytes) -> float:
    """A number in [0, 1] that is as good as random and depends on ``key`` alone."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64


# Source words -> parts


def _resolve(data: DataConfig) -> list[_Part]:
    main = _parts_of(data.source, data, "--data.source")
    if data.validation_source:
        # The source's own held-out files are nobody's then: what calls itself validation is
        # never trained on. Word by word, so that a folder with splits next to a lone file does
        # not make the file a training file.
        parts = [_with_role(part, "train") for part in main if part.role != "validation"]
        for word in data.validation_source:
            held_out = _parts_of((word,), data, "--data.validation-source")
            parts += [_with_role(p, "validation") for p in held_out if p.role != "train"]
    else:
        parts = main
    seen: dict[Path, _Role] = {}
    for part in parts:
        if part.path is not None:
            path = part.path.resolve()
            if path in seen:
                both = "trained on and validated on" if seen[path] != part.role else "read twice"
                raise ConfigError(
                    f"{part.path} would be {both}; name it once among --data.source and "
                    "--data.validation-source"
                )
            seen[path] = part.role
    return parts


def _with_role(part: _Part, role: _Role) -> _Part:
    # A data set of the hub shows its splits only when it is opened: it keeps its role, and the
    # last word of its identity says which side it was named for.
    if part.role == "hub":
        return dataclasses.replace(part, identity=(*part.identity[:-1], role))
    return dataclasses.replace(part, role=role)


def _parts_of(words: Sequence[str], data: DataConfig, flag: str) -> list[_Part]:
    others: list[_Part] = []
    files: list[tuple[Path, str | None]] = []
    for word in words:
        path = Path(word).expanduser()
        if word == "python":
            others += _python_parts(data)
        elif os.path.isdir(path):  # os.path, which answers no where a folder may not be entered
            if _is_hub_layout(path):
                found = _folder_files(path) + [(path / name, None) for name in _ABOUT_SET]
                files_of_set = [
                    [str(file.relative_to(path)), *_stat(file)]
                    for file, _ in found
                    if file.exists()
                ]
                others.append(_hub_part(str(path.absolute()), data.subset, files_of_set))
            else:
                found = _folder_files(path)
                if not found:
                    raise ConfigError(
                        f"{flag} {word} is a folder without a file; name one that holds text, "
                        ".jsonl or .parquet files"
                    )
                files += found
        elif os.path.isfile(path):
            files.append((path, _split_word(path.name)))
        elif os.path.exists(path):
            raise ConfigError(
                f"{flag} {word} is neither a file nor a folder; write its text into a file first "
                "(the corpus is read more than once)"
            )
        elif glob.has_magic(word):
            files += _glob_files(str(path), flag)
        elif _HUB_NAME.match(word) and not word.lower().endswith(_KNOWN_SUFFIXES):
            others.append(_hub_part(word, data.subset, []))
        else:
            raise ConfigError(_unknown_word(word, flag))
    return _file_parts(files, data) + others


def _unknown_word(word: str, flag: str) -> str:
    if os.sep in word or word.lower().endswith(_KNOWN_SUFFIXES):
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


def _glob_files(pattern: str, flag: str) -> list[tuple[Path, str | None]]:
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    found = [path for path in found if path.is_file()]
    if not found:
        raise ConfigError(
            f"{flag} {pattern} matches no file; check the pattern (quote it, and write ** for "
            "folders at any depth)"
        )
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), PurePath(pattern).parts)
    root = Path(*fixed)
    return [(path, _split_word(*path.relative_to(root).parts)) for path in found]


def _folder_files(folder: Path) -> list[tuple[Path, str | None]]:
    def stop(error: OSError) -> None:
        raise ConfigError(_unreadable(Path(str(error.filename)), error)) from error

    found: list[Path] = []
    for here, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [n for n in folders if not n.startswith(".") and n != "__pycache__"]
        for name in names:
            # A README or a licence speaks about the data; it is no part of it.
            if not name.startswith(".") and not _ABOUT_DATA.match(name):
                found.append(Path(here, name))
    found.sort(key=lambda path: path.relative_to(folder).as_posix())
    return [(path, _split_word(*path.relative_to(folder).parts)) for path in found]


def _split_word(*parts: str) -> str | None:
    """The split that a name speaks of, the file's own name before those of its folders."""
    for part in reversed(parts):
        if match := _SPLIT_WORD.search(part):
            word = match[1].lower()
            return {"tr": "train", "te": "test"}.get(word[:2], "validation")
    return None


def _file_parts(files: list[tuple[Path, str | None]], data: DataConfig) -> list[_Part]:
    # Names speak of splits when they set something apart: a validation part, or a test part
    # beside a training part. A folder of programs with tests/ in it does not.
    words = {word for _, word in files}
    speaking = "validation" in words or {"train", "test"} <= words
    parts = []
    for path, word in files:
        if speaking and word == "test":
            continue
        role: _Role = "hash"
        if speaking and "validation" in words:
            role = "validation" if word == "validation" else "train"
        identity = (str(path.absolute()), *_stat(path))
        parts.append(_Part(role, identity, _reader(path, data), path=path))
    if parts and all(part.role == "validation" for part in parts):
        # Nothing is set apart from anything: one file, say, that happens to be called valid.txt.
        parts = [dataclasses.replace(part, role="hash") for part in parts]
    return parts


def _stat(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError(_unreadable(path, error)) from error
    return stat.st_size, stat.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> str:
    return (
        f"{path}: cannot be read ({error.strerror or error}); make it readable for this user, "
        "or name another source"
    )


def _python_parts(data: DataConfig) -> list[_Part]:
    """The text of the running Python's standard library, the same on every machine that has it."""
    root = Path(sysconfig.get_path("stdlib"))
    version = ".".join(map(str, sys.version_info[:3]))
    # Tests and installed packages differ between distributions; lib-dynload, config-* and
    # _sysconfigdata* speak of the machine that built this Python.
    outside = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload"}
    names: list[str] = []
    for here, folders, files in os.walk(root):
        folders[:] = [n for n in folders if n not in outside and not n.startswith("config-")]
        relative = Path(here).relative_to(root)
        names += [(relative / name).as_posix() for name in files if name.endswith(".py")]
    topics_file = "pydoc_data/topics.py"  # 0.5 MB of prose: read as text, not as string literals
    parts = []
    for name in sorted(names):
        if name != topics_file and not name.startswith("_sysconfigdata"):
            path = root / name
            said = ("python", version, name, *_stat(path))
            parts.append(_Part("hash", said, _reader(path, data), hash_key=name, path=path))
    if not parts:
        raise ConfigError(
            f"--data.source python: this Python keeps no library text in {root}; name text files"
        )
    cut = _CUTS[data.documents]
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        key = f"{topics_file}:{topic}"

        def read(text: str = text, key: str = key) -> Iterator[tuple[str, str]]:
            return ((piece, key) for piece in cut(iter([text])))

        parts.append(_Part("hash", ("python", version, key, len(text)), read, hash_key=key))
    return parts


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


def _hub_part(name: str, subset: str | None, files: list[list[Any]]) -> _Part:
    return _Part("hub", ("hub", name, subset, files, "hash"), lambda: iter(()))


def _opened(part: _Part, data: DataConfig) -> list[_Part]:
    """A data set's part as the parts of its splits; any other part as it is."""
    if part.role != "hub":
        return [part]
    _, name, subset, _, side = part.identity
    datasets = _optional("datasets", f"the data set {name}")
    which = name if subset is None else f"{name} (subset {subset})"
    try:
        splits = datasets.load_dataset(name, subset, streaming=True)
    except (OSError, ValueError) as error:  # no network, no such set, no such subset
        raise ConfigError(
            f"{which}: no such file or folder, and as a Hugging Face data set it cannot be "
            f"opened: {error}; check the name, --data.subset and the network"
        ) from error
    by_word: dict[str | None, list[str]] = {}
    for split in splits:
        by_word.setdefault(_split_word(split), []).append(split)
    train = by_word.get("train") or by_word.get(None) or []
    held_out = by_word.get("validation", [])
    roles: dict[str, _Role] = {}
    if side == "validation":
        roles |= dict.fromkeys(held_out or train, "validation")
    else:
        roles |= dict.fromkeys(train, "train" if side == "train" or held_out else "hash")
        roles |= dict.fromkeys(held_out if side == "hash" else (), "validation")
    if not roles:
        raise ConfigError(
            f"{which} has the splits {', '.join(splits)}, none of them for training; name the "
            "files themselves as --data.source"
        )

    def reader(split: str) -> Callable[[], Iterator[tuple[str, str]]]:
        def read() -> Iterator[tuple[str, str]]:
            key = _TextKey(data.text_key)
            try:
                for number, record in enumerate(splits[split]):
                    origin = f"{name}[{split}]:{number}"
                    yield key.text_of(record, origin), origin
            except ConfigError:
                raise
            except (OSError, EOFError, ValueError) as error:
                raise ConfigError(
                    f"{which}, split {split}: reading stopped ({error}); try again, or mend the "
                    "file it names"
                ) from error

        return read

    return [_Part(role, (*part.identity, split), reader(split)) for split, role in roles.items()]


def _optional(module: str, need: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{need} needs the package {module}, which cannot be imported ({error}); "
            "pip install 'crnet[data]'"
        ) from error


# Files -> texts


def _reader(path: Path, data: DataConfig) -> Callable[[], Iterator[tuple[str, str]]]:
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
        return lambda: _parquet_texts(path, data.text_key)
    if kind in _RECORDS:
        return lambda: _record_texts(path, data.text_key)
    cut = _CUTS[data.documents]
    origin = str(path)
    return lambda: ((text, origin) for text in cut(_blocks(path)))


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
        # gzip and bz2 report broken content as an OSError without a number.
        message = _broken(path, error) if error.errno is None else _unreadable(path, error)
        raise ConfigError(message) from error


def _broken(path: Path, error: Exception) -> str:
    return f"{path}: is not a whole {path.suffix} file ({error}); fetch or pack it again"


def _zst_bytes(path: Path) -> Iterator[bytes]:
    zstandard = _optional("zstandard", str(path))
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


def _undecodable(path: Path, offset: int, byte: int) -> str:
    return (
        f"{path}: byte {offset} (0x{byte:02x}) is not UTF-8 text; if it is text in another "
        f"encoding, convert it: iconv -f LATIN1 -t UTF-8 {path.name}; if it is not text, name "
        "the text files by a glob, such as 'folder/**/*.txt'"
    )


def _whole(blocks: Iterator[str]) -> Iterator[str]:
    yield "".join(blocks)


def _lines(blocks: Iterator[str]) -> Iterator[str]:
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        yield from lines
    yield rest


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


class _TextKey:
    """Finds a record's text; which field it is in is settled by the first record."""

    def __init__(self, wanted: str | None):
        self.keys = [key.strip() for key in wanted.split(",") if key.strip()] if wanted else None

    def text_of(self, record: Any, where: str) -> str:
        if not isinstance(record, dict):
            raise ConfigError(
                f"{where}: a record is an object with a text field, such as "
                f'{{"text": "..."}}; this is a {type(record).__name__}'
            )
        keys = self.settle(record, where)
        texts = []
        for key in keys:
            value = record.get(key)
            if key not in record or not (value is None or isinstance(value, str)):
                problem = "is missing" if key not in record else f"is a {type(value).__name__}"
                raise ConfigError(
                    f"{where}: the text field {key!r} {problem}; found are "
                    f"{', '.join(map(repr, record))}; name the field with --data.text-key"
                )
            if value:
                texts.append(value)
        return "\n\n".join(texts)

    def settle(self, fields: Iterable[str], where: str) -> list[str]:
        if self.keys is None:
            found = list(fields)
            self.keys = [key for key in TEXT_KEYS if key in found][:1]
            if not self.keys:
                raise ConfigError(
                    f"{where}: none of the fields {', '.join(map(repr, found)) or '(none)'} is "
                    f"known to hold text ({', '.join(TEXT_KEYS)}); name it with --data.text-key"
                )
        return self.keys


def _record_texts(path: Path, text_key: str | None) -> Iterator[tuple[str, str]]:
    key = _TextKey(text_key)
    offset = number = 0
    rest = b""
    for block in itertools.chain(_bytes(path), [b"\n"]):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            number += 1
            origin = f"{path}:{number}"
            if line and not line.isspace():
                try:
                    record = json.loads(line)
                except UnicodeDecodeError as error:
                    byte = line[error.start]
                    raise ConfigError(_undecodable(path, offset + error.start, byte)) from error
                except ValueError as error:
                    raise ConfigError(
                        f"{origin}: is not a JSON record ({error}); wanted is one record a line: "
                        f"jq -c . {path.name} (or .[] for a list) writes that"
                    ) from error
                if number == 1 and isinstance(record, list):
                    raise ConfigError(
                        f"{origin}: is one JSON list; wanted is one record a line: "
                        f"jq -c '.[]' {path.name} writes that"
                    )
                yield key.text_of(record, origin), origin
            offset += len(line) + 1


def _parquet_texts(path: Path, text_key: str | None) -> Iterator[tuple[str, str]]:
    pyarrow = _optional("pyarrow", str(path))
    parquet = _optional("pyarrow.parquet", str(path))
    key = _TextKey(text_key)
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
        message = _broken(path, error) if error.errno is None else _unreadable(path, error)
        raise ConfigError(message) from error
