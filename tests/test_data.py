"""The data path: sources, tokenizers, shards, rows and their order. Every equality is exact."""

from __future__ import annotations

import bz2
import dataclasses
import errno
import gzip
import hashlib
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from crnet.config.sections import DataConfig
from crnet.data import shards as data
from crnet.data import sources as corpus
from crnet.data import tokenizer
from crnet.errors import ConfigError

SHARED = Path(os.environ.get("CRNET_SHARED") or Path(__file__).parents[2] / "shared")
TOKENIZERS = SHARED / "data" / "tokenizers"
needs_shared = pytest.mark.skipif(
    not TOKENIZERS.is_dir(), reason=f"no {TOKENIZERS}; set CRNET_SHARED to the shared folder"
)
T5_JSON, T5_PIECES = TOKENIZERS / "t5-tokenizer.json", TOKENIZERS / "t5-base.spiece.model"
AXLEARN = TOKENIZERS / "axlearn_bpe_32k_c4.model"


def config(source: object = "python", **keys: object) -> DataConfig:
    words = source if isinstance(source, tuple) else (source,)
    return DataConfig(source=tuple(map(str, words)), **keys)  # type: ignore[arg-type]


def read(source: object, **keys: object) -> list[tuple[str, str]]:
    return [(d.text, d.split) for d in corpus.documents(config(source, **keys))]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Real documents: the modules of one package of the standard library, and some Unicode."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted((root / "email").glob("*.py")) + sorted((root / "json").glob("*.py"))
    found = [path.read_text(encoding="utf-8").strip("\n") for path in paths]
    return [text for text in found if text] + ["Žluťoučký kůň — 漢字, 🙂\t日本語 \u00a0ďáblů"]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """The texts cut into paragraphs, as records: about 1,500 documents, 0.4 MB."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    pieces = [piece for text in texts for piece in text.split("\n\n") if piece.strip()]
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.train(texts, 512).save(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, jsonl: Path, bpe: Path
) -> tuple[DataConfig, data.Prepared]:
    """Several shards of each split."""
    cache = tmp_path_factory.mktemp("cache")
    said = config(jsonl, tokenizer=str(bpe), cache_dir=cache, validation_frac=0.2)
    return said, data.prepare(said, progress=False, shard_tokens=20_000)


# Sources


def test_python_source_is_real_text_split_by_file() -> None:
    found = list(corpus.documents(DataConfig()))
    size = sum(len(document.text.encode()) for document in found)
    assert 8e6 < size < 15e6
    sides: dict[str, set[str]] = {}
    for document in found:
        sides.setdefault(document.origin, set()).add(document.split)
    assert all(len(side) == 1 for side in sides.values())
    assert 0.02 < sum(side == {"validation"} for side in sides.values()) / len(sides) < 0.1
    assert any(origin.startswith("pydoc_data/topics") for origin in sides)
    assert not any("site-packages" in origin or "/test/" in origin for origin in sides)


def write_records(path: Path, texts: list[str]) -> None:
    content = "".join(json.dumps({"id": 1, "text": t}) + "\n" for t in texts).encode()
    path.write_bytes(pack(path, content))


def pack(path: Path, content: bytes) -> bytes:
    if path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(content) // 2  # two frames, as parallel packers write
        return b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))
    packers = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    return packers[path.suffix](content) if path.suffix in packers else content


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("form", ["folder", "glob", "jsonl", "json"])
def test_every_file_form_gives_the_same_documents(
    form: str, suffix: str, tmp_path: Path, texts: list[str]
) -> None:
    expected = [(text, "validation" if held_out(text) else "train") for text in texts]
    if form in ("jsonl", "json"):
        source = tmp_path / f"records.{form}{suffix}"
        write_records(source, texts)
        assert read(source, validation_frac=0.3) == expected
        return
    for number, text in enumerate(texts):
        path = tmp_path / "deep" / f"{number:03}.txt{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pack(path, text.encode()))
    (tmp_path / "README.md").write_text("about the data")
    source = tmp_path if form == "folder" else tmp_path / "**" / f"*.txt{suffix}"
    assert read(source, validation_frac=0.3, documents="file") == expected


def held_out(text: str, frac: float = 0.3) -> bool:
    share = int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) / 2**64
    return share < frac


def test_parquet(tmp_path: Path, texts: list[str]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": range(len(texts)), "content": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    write_records(tmp_path / "a.jsonl", texts)
    assert read(tmp_path / "a.parquet") == read(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match=r"name the field with --data\.text-key"):
        read(tmp_path / "a.parquet", text_key="body")


def test_data_set_layout_goes_through_datasets(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "en").mkdir()
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n"
        "    path: en/c4-train.*.json.gz\n  - split: validation\n"
        "    path: en/c4-validation.*.json.gz\n---\n# A set\n"
    )
    write_records(tmp_path / "en" / "c4-train.0.json.gz", texts[:-9])
    write_records(tmp_path / "en" / "c4-train.1.json.gz", texts[-9:-4])
    write_records(tmp_path / "en" / "c4-validation.0.json.gz", texts[-4:])
    expected = [(t, "train") for t in texts[:-4]] + [(t, "validation") for t in texts[-4:]]
    assert read(tmp_path, subset="en") == expected
    assert read(tmp_path / "en") == expected, "the same files without the set's own layout"
    assert read(tmp_path, subset="en", validation_source=(str(tmp_path / "en"),)) == expected
    assert len(read(tmp_path, subset="en", max_documents=2)) == 4, "two of each split"
    before = corpus.identity(config(tmp_path, subset="en"))
    write_records(tmp_path / "en" / "c4-train.1.json.gz", texts[:1])
    assert corpus.identity(config(tmp_path, subset="en")) != before
    with pytest.raises(ConfigError, match=r"--data\.subset"):
        read(tmp_path, subset="de")


def test_several_text_fields_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "A", "abstract": "B"}\n\n{"title": null, "abstract": "C"}\n')
    assert [t for t, _ in read(path, text_key="title,abstract")] == ["A\n\nB", "C"]
    assert [t for t, _ in read(path)] == ["B", "C"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.txt", "valid.txt", "test.txt"], "train validation -"),
        (["wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"], "train validation -"),
        (["c4-train.00.txt", "dev/a.txt", "other.txt"], "train validation train"),
        (["train/a.txt", "val/test.txt", "test/valid_1.txt"], "train - validation"),
        (["train_1.txt", "training/b.txt", "test2.txt"], "hash hash -"),
        (["src/a.txt", "tests/test_a.txt", "latest.txt"], "hash hash hash"),
        (["valid.txt"], "hash"),
        (["retrain.txt", "devices/a.txt", "valley.txt"], "hash hash hash"),
    ],
)
def test_names_that_speak_of_splits(names: list[str], expected: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = dict(read(tmp_path, validation_frac=1e-9))
    sides = [found.get(name, "-") for name in names]
    assert sides == expected.replace("hash", "train").split()
    if "hash" in expected:  # only these follow the share that is held out
        assert {s for _, s in read(tmp_path, validation_frac=1 - 1e-9)} == {"validation"}


def test_validation_source_takes_the_place_of_the_own_split(tmp_path: Path) -> None:
    for name in ("a/train.txt", "a/valid.txt", "b/train.txt", "b/valid.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    other = (str(tmp_path / "b"), str(tmp_path / "c.txt"))
    assert read(tmp_path / "a", validation_source=other) == [
        ("a/train.txt", "train"),
        ("b/valid.txt", "validation"),
        ("c.txt", "validation"),
    ]
    with pytest.raises(ConfigError, match="trained on and validated on"):
        read(tmp_path / "c.txt", validation_source=(str(tmp_path / "*.txt"),))


@pytest.mark.parametrize("block_bytes", [1 << 20, 1001])
def test_documents_of_a_text_file(
    block_bytes: int, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_BLOCK_BYTES", block_bytes)
    path, text = tmp_path / "a.txt", "\n \n漢字 é\n".join(texts) * 2 + "x" * 20_000
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert len(text) > 5 * corpus.WHOLE_FILE_CHARS
    pieces = [t for t, _ in read(path)]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= corpus.PIECE_CHARS
    assert min(map(len, pieces[:-1])) >= corpus.PIECE_CHARS // 2
    assert sum(piece.endswith("\n") for piece in pieces) > 0.9 * len(pieces)
    assert [t for t, _ in read(path, documents="file")] == [text]
    lines = [line for line in text.split("\n") if line.strip()]
    assert [t for t, _ in read(path, documents="line")] == lines
    paragraphs = [part.strip("\n") for part in re.split(r"(?:^|\n)\s*\n", text)]
    got = [t for t, _ in read(path, documents="paragraph")]
    assert got == [part for part in paragraphs if part.strip()]
    path.write_text(text[: corpus.WHOLE_FILE_CHARS])
    assert [t for t, _ in read(path)] == [text[: corpus.WHOLE_FILE_CHARS]]


def test_max_documents_stops_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 5 + "this line is never read\n")
    assert len(read(path, max_documents=5)) == 5


BAD = {
    "missing file": ("unheard-of.txt", {}, "no such file; check the path"),
    "near miss": ("god.txt", {}, "did you mean .*good.txt"),
    "empty glob": ("*.xyz", {}, "matches no file; check the pattern"),
    "empty folder": ("void", {}, "name one that holds text"),
    "unknown word": ("pyton", {}, "did you mean python"),
    "not a file": ("/dev/null", {}, "write its text into a file first"),
    "latin-1": ("latin.txt", {}, "byte 70003 .0xe9. is not UTF-8 text.*iconv -f LATIN1 -t UTF-8"),
    "cut in a character": ("cut.txt", {}, "byte 3 .0xe6. is not UTF-8"),
    "latin-1 record": ("latin.jsonl", {}, "byte 25 .0xe9. .*iconv"),
    "broken gz": ("broken.txt.gz", {}, "not a whole .gz file .*fetch or pack it again"),
    "not gz": ("not.txt.gz", {}, "not a whole .gz file"),
    "cut gz": ("cut.txt.gz", {}, "not a whole .gz file"),
    "cut xz": ("cut.txt.xz", {}, "not a whole .xz file"),
    "not bz2": ("not.txt.bz2", {}, "not a whole .bz2 file"),
    "cut zst": ("cut.txt.zst", {}, "not a whole .zst file"),
    "not zst": ("not.txt.zst", {}, "not a whole .zst file"),
    "not parquet": ("not.parquet", {}, "not a whole .parquet file"),
    "packed parquet": ("a.parquet.gz", {}, "unpack it"),
    "bad JSON": ("bad.jsonl", {}, "bad.jsonl:2: is not a JSON record .*jq -c"),
    "JSON list": ("list.json", {}, r"jq -c '\.\[\]'"),
    "not an object": ("number.jsonl", {}, "number.jsonl:1: a record is an object"),
    "no text field": ("nokey.jsonl", {}, "'id', 'label' .*--data.text-key"),
    "wrong text key": ("good.jsonl", {"text_key": "body"}, "'text'; name the field with --data"),
    "text is a list": ("listtext.jsonl", {}, "is a list; .*--data.text-key"),
    "half surrogate": ("half.jsonl", {}, "half.jsonl:1: character 1 is half of a surrogate"),
    "named twice": (("good.txt", "./good.txt"), {}, "read twice; name it once"),
    "bad validation source": (
        "good.txt",
        {"validation_source": ("nofile.txt",)},
        "--data.validation-source nofile.txt: no such file",
    ),
    "no such data set": ("nobody/nothing", {}, "check the name, --data.subset and the network"),
}


def write_bad_files(folder: Path) -> None:
    (folder / "void").mkdir()
    (folder / "good.txt").write_text("good")
    (folder / "good.jsonl").write_text('{"text": "good"}\n')
    (folder / "latin.txt").write_bytes(b"x" * 70_000 + b"caf\xe9 noir")
    (folder / "cut.txt").write_bytes("abc漢".encode()[:-1])
    (folder / "latin.jsonl").write_bytes(b'{"text": "ok"}\n{"text":"t\xe9"}\n')
    for packer, suffix in ((gzip, "gz"), (lzma, "xz")):
        (folder / f"cut.txt.{suffix}").write_bytes(packer.compress(os.urandom(5000))[:2500])
    whole = bytearray(gzip.compress(b"some text " * 500))
    whole[-6] ^= 1
    (folder / "broken.txt.gz").write_bytes(whole)
    for name in ("not.txt.gz", "not.txt.bz2", "not.txt.zst", "not.parquet", "a.parquet.gz"):
        (folder / name).write_bytes(b"this is not what it says")
    zstandard = pytest.importorskip("zstandard")
    (folder / "cut.txt.zst").write_bytes(zstandard.compress(os.urandom(5000).hex().encode())[:2500])
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "list.json").write_text('[{"text": "a"}]')
    (folder / "number.jsonl").write_text("3\n")
    (folder / "nokey.jsonl").write_text('{"id": 1, "label": "a"}\n')
    (folder / "listtext.jsonl").write_text('{"text": ["a"]}\n')
    (folder / "half.jsonl").write_text('{"text": "a\\ud800"}\n')


@pytest.mark.parametrize("case", BAD)
def test_bad_source_is_a_config_error_with_its_mend(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    words, keys, message = BAD[case]
    if case == "no such data set":
        pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match=message):
        read(words, **keys)


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="needs Linux's /proc")
def test_unreadable_file() -> None:
    with pytest.raises(ConfigError, match=r"cannot be read .*make it readable"):
        read("/proc/self/mem")


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zstandard", "pyarrow", "datasets", "sentencepiece", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.model").write_bytes(b"x")
    for name in ("a.zst", "a.parquet"):
        (tmp_path / name).write_bytes(b"x")
    for source in (tmp_path / "a.zst", tmp_path / "a.parquet", "allenai/c4"):
        with pytest.raises(ConfigError, match=r"pip install 'crnet\[data\]'"):
            read(source)
    for spec in (str(tmp_path / "a.model"), "owner/name"):
        with pytest.raises(ConfigError, match=r"pip install 'crnet\[data\]'"):
            tokenizer.load(spec)


# Tokenizers


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_trained_tokenizer_round_trips(bpe: Path, text: str) -> None:
    made = tokenizer.load_saved(bpe)
    assert made.decode(made.encode(text)) == text


def test_trained_tokenizer(bpe: Path, texts: list[str], tmp_path: Path) -> None:
    made = tokenizer.load(str(bpe))
    assert (made.vocab_size, made.eos_id, made.pad_id) == (512, 0, None)
    assert made.decode([0]) == tokenizer.END_OF_TEXT
    again = tokenizer.train(iter(texts), 512)
    assert again.hash == made.hash
    assert tokenizer.train(texts[:5], 512).hash != made.hash
    assert made.eos_id not in made.encode("a document that says <|endoftext|> itself")
    for text, ids in zip(texts, made.encode_batch(texts), strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == made.encode(text)
        assert made.decode(ids) == text
    with pytest.raises(ConfigError, match="512 is outside the vocabulary"):
        made.decode([512])
    assert tokenizer.load(str(bpe / "tokenizer.json")).hash == made.hash


def test_end_token_by_another_name_survives_saving(bpe: Path, tmp_path: Path) -> None:
    content = (bpe / "tokenizer.json").read_text().replace(tokenizer.END_OF_TEXT, "<fin>")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"no end-of-text token .*tokenizer_config\.json"):
        tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<fin>"}}')
    made = tokenizer.load(str(tmp_path))
    (tmp_path / "copy").mkdir()
    made.save(tmp_path / "copy")
    again = tokenizer.load_saved(tmp_path / "copy")
    assert (again.eos_id, again.hash) == (made.eos_id, made.hash) == (0, made.hash)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"a": 1}', "is not a tokenizer.json .* or train"),
        ("a.json", b"\xff\xfe", "is not a tokenizer.json"),
        ("a.model", b"nonsense", "is not a SentencePiece model .*name the .model"),
        ("a.json", None, "no such file; name a tokenizer.json"),
        ("folder/", None, "cannot be opened .*name a tokenizer.json"),
    ],
)
def test_bad_tokenizer(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if name.endswith(".model"):
        pytest.importorskip("sentencepiece")
    if name.endswith("/"):
        pytest.importorskip("transformers")
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        tokenizer.load(str(tmp_path / name))


@needs_shared
@pytest.mark.parametrize("path", [T5_PIECES, AXLEARN], ids=["t5", "axlearn"])
def test_sentencepiece_ids_are_its_own(path: Path, texts: list[str], tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    made = tokenizer.load(str(path))
    assert (made.vocab_size, made.eos_id, made.pad_id) == (32_000, library.eos_id(), 0)
    cases = [*texts, "", " two  spaces\n\n\ttab", "</s> <pad> ▁", "漢字 🙂 \u200b"]
    for text, ids in zip(cases, made.encode_batch(cases), strict=True):
        assert ids.tolist() == library.encode(text)
        assert made.decode(ids) == library.decode(library.encode(text))
    made.save(tmp_path)
    assert tokenizer.load_saved(tmp_path).hash == made.hash


@needs_shared
def test_tokenizer_json_of_t5_equals_its_sentencepiece_model(texts: list[str]) -> None:
    pytest.importorskip("sentencepiece")
    pieces, made = tokenizer.load(str(T5_PIECES)), tokenizer.load(str(T5_JSON))
    assert (made.vocab_size, made.eos_id, made.pad_id) == (32_100, 1, 0)
    for text in texts:
        assert made.encode(text) == pieces.encode(text)


@needs_shared
def test_folder_that_only_transformers_opens(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((TOKENIZERS / f"gpt2-{name}").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    made = tokenizer.load(str(tmp_path))
    assert (made.vocab_size, made.eos_id) == (50_257, 50_256)
    assert made.encode("Hello world") == [15_496, 995]


# Prepared folders


def test_shards_hold_the_documents(prepared: tuple[DataConfig, data.Prepared], jsonl: Path) -> None:
    made = prepared[1]
    read_by = made.tokenizer()
    assert (made.dtype, made.vocab_size, made.eos_id) == ("uint16", 512, 0)
    assert made.tokenizer_hash == read_by.hash
    digest = hashlib.sha256()
    for split, part in made.parts.items():
        expected = [text for text, side in read(jsonl, validation_frac=0.2) if side == split]
        assert part.documents == len(expected)
        assert part.text_bytes == sum(len(text.encode()) for text in expected)
        assert len(part.shards) > 1
        found = []
        for shard in part.shards:
            ids = np.fromfile(made.folder / f"{shard.name}.bin", "<u2")
            starts = np.fromfile(made.folder / f"{shard.name}.idx", "<u8")
            assert len(ids) == shard.tokens <= 20_000
            assert len(starts) == shard.documents
            for document in np.split(ids, starts[1:].astype(int)):
                assert document[-1] == 0
                found.append(read_by.decode(document[:-1]))
            if split == "validation":
                digest.update(ids.tobytes())
        assert found == expected
        assert part.tokens == sum(shard.tokens for shard in part.shards)
    assert made.validation_sha256 == digest.hexdigest()
    assert not [path for path in made.folder.parent.iterdir() if path != made.folder]


def test_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"</s>": 0, "?": 1, "line": 70_000}, unk_token="?")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    made = data.prepare(small(tmp_path, tmp_path / "words.json"), progress=False)
    assert (made.vocab_size, made.dtype) == (70_001, "uint32")
    tokens, targets = data.Rows(made, "train", 4, "document").batch(np.arange(2))
    assert tokens.tolist() == [[70_000, 1, 1, 0]] * 2
    assert targets.tolist() == [[1, 1, 0, -100]] * 2


def test_second_preparation_reads_nothing(
    prepared: tuple[DataConfig, data.Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    said, made = prepared

    def fail(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(corpus, "documents", fail)
    monkeypatch.setattr(tokenizer, "load", fail)
    same = dataclasses.replace(said, sequence_length=99, rows="document", validation_tokens=5)
    assert data.prepare(same, shard_tokens=20_000) == made
    for other in ({"validation_frac": 0.1}, {"documents": "line"}, {"max_documents": 9}):
        with pytest.raises(AssertionError, match="read again"):
            data.prepare(dataclasses.replace(said, **other), progress=False, shard_tokens=20_000)


def small(tmp_path: Path, bpe: Path, **keys: object) -> DataConfig:
    path = tmp_path / "small.txt"
    if not path.exists():
        path.write_text("".join(f"line number {i}\n" for i in range(300)))
    keys = {"documents": "line", "tokenizer": str(bpe), **keys}
    return config(path, cache_dir=tmp_path / "cache", **keys)


def test_changed_source_is_prepared_anew(tmp_path: Path, bpe: Path) -> None:
    said = small(tmp_path, bpe)
    first = data.prepare(said, progress=False)
    with open(tmp_path / "small.txt", "a") as file:
        file.write("one more line\n")
    second = data.prepare(said, progress=False)
    assert second.folder != first.folder
    counts = [sum(p.documents for p in made.parts.values()) for made in (first, second)]
    assert counts == [300, 301]


def test_trained_tokenizer_is_kept_and_decides_the_folder(tmp_path: Path, bpe: Path) -> None:
    made = data.prepare(small(tmp_path, bpe, tokenizer="train", vocab_size=300), progress=False)
    assert made.vocab_size == 300
    other = data.prepare(small(tmp_path, bpe, tokenizer="train", vocab_size=290), progress=False)
    assert other.folder != made.folder
    assert other.tokenizer().vocab_size == 290


@pytest.mark.parametrize("damage", ["bin", "idx", "meta", "no meta"])
def test_damaged_folder_is_made_again(damage: str, tmp_path: Path, bpe: Path) -> None:
    said = small(tmp_path, bpe)
    made = data.prepare(said, progress=False)
    content = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    name = "meta.json" if "meta" in damage else f"train-00000.{damage}"
    if damage == "no meta":
        (made.folder / name).unlink()
    else:
        (made.folder / name).write_bytes(content[name][: len(content[name]) // 2])
    with pytest.warns(UserWarning, match="preparing it again"):
        assert data.prepare(said, progress=False) == made
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == content
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [made.folder.name]


def test_killed_preparation_leaves_no_folder(tmp_path: Path, bpe: Path) -> None:
    said = small(tmp_path, bpe)
    script = (
        "import itertools, time, sys\n"
        "from crnet.data import shards as data\n"
        "from crnet.data import sources as corpus\n"
        "from crnet.config.sections import DataConfig\n"
        "read = corpus.documents\n"
        "def slow(config):\n"
        "    yield from itertools.islice(read(config), 100)\n"
        "    time.sleep(60)\n"
        "corpus.documents, data._BATCH_DOCUMENTS = slow, 10\n"
        "source, tokenizer, cache = sys.argv[1:]\n"
        "from pathlib import Path\n"
        "data.prepare(DataConfig(source=(source,), tokenizer=tokenizer, documents='line',\n"
        "                        cache_dir=Path(cache)), progress=False)\n"
    )
    cache = tmp_path / "cache"
    words = [*said.source, said.tokenizer, str(cache)]
    process = subprocess.Popen([sys.executable, "-c", script, *words])
    try:
        until = time.monotonic() + 60
        while not list(cache.glob("*/train-00000.bin")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (left,) = cache.iterdir()
    assert left.name.startswith(".unfinished-")
    made = data.prepare(said, progress=False)
    assert sum(part.documents for part in made.parts.values()) == 300
    assert left.exists(), "it could be another process at work"
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (*left.iterdir(), left):
        os.utime(path, (two_days_ago, two_days_ago))
    data.prepare(small(tmp_path, bpe, max_documents=200), progress=False)
    assert not left.exists()


def test_two_preparations_at_once(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, real, inner = small(tmp_path, bpe), corpus.documents, []

    def documents(config: DataConfig) -> object:
        monkeypatch.setattr(corpus, "documents", real)
        yield from real(config)
        inner.append(data.prepare(said, progress=False))  # another one, and it is faster

    monkeypatch.setattr(corpus, "documents", documents)
    assert data.prepare(said, progress=False) == inner[0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [inner[0].folder.name]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ConfigError, OSError])
@pytest.mark.parametrize("spec", ["bpe", "train"])
def test_interrupted_preparation_leaves_nothing(
    stop: type[BaseException], spec: str, tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = small(tmp_path, bpe, tokenizer="train" if spec == "train" else str(bpe))
    real = corpus.documents

    def documents(config: DataConfig) -> object:
        for number, document in enumerate(real(config)):
            yield document
            if number == 50:
                raise stop("stopped here")

    monkeypatch.setattr(corpus, "documents", documents)
    with pytest.raises(stop, match="stopped here"):
        data.prepare(said, progress=False)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        ("", {}, "holds no text"),
        (" \n\n", {}, "holds no text"),
        ("", {"tokenizer": "train"}, "holds no text"),
        ("one document", {}, "none of them for validation; give a --data.validation-source"),
        ("one", {"validation_frac": 1 - 1e-9}, "none of them for train; .*--data.documents paragr"),
        (
            "1",
            {"validation_frac": 1 - 1e-9, "tokenizer": "train"},
            "1 documents, none .* for train",
        ),
        ("one", {"tokenizer": "nofile.json"}, "no such file; name a tokenizer.json"),
    ],
)
def test_unusable_corpus(
    content: str, keys: dict[str, object], message: str, tmp_path: Path, bpe: Path
) -> None:
    (tmp_path / "small.txt").write_text(content)
    with pytest.raises(ConfigError, match=message):
        data.prepare(small(tmp_path, bpe, **keys), progress=False)
    assert not list((tmp_path / "cache").iterdir())


def test_unwritable_cache(tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("a file")
    said = dataclasses.replace(small(tmp_path, bpe), cache_dir=tmp_path / "taken" / "cache")
    with pytest.raises(ConfigError, match=r"taken/cache: .*--data.cache-dir"):
        data.prepare(said, progress=False)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenizer.Tokenizer, "save", full)
    with pytest.raises(ConfigError, match=r"No space left .*make room or name another folder"):
        data.prepare(small(tmp_path, bpe), progress=False)
    assert not list((tmp_path / "cache").iterdir())


def test_cache_folder_follows_the_environment(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    said = dataclasses.replace(small(tmp_path, bpe), cache_dir=None)
    assert data.prepare(said, progress=False).folder.parent == tmp_path / "xdg" / "crnet"


def test_progress_is_on_stderr(
    tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.prepare(small(tmp_path, bpe), progress=True)
    shown = capsys.readouterr()
    assert "tokens" in shown.err
    assert "300 documents" in shown.err
    assert shown.out == ""


# Rows


def shards_of(made: data.Prepared, split: str) -> list[list[list[int]]]:
    """Per shard, per document, the ids."""
    found = []
    for shard in made.parts[split].shards:
        ids = np.fromfile(made.folder / f"{shard.name}.bin", "<u2")
        starts = np.fromfile(made.folder / f"{shard.name}.idx", "<u8").astype(int)
        found.append([part.tolist() for part in np.split(ids, starts[1:])])
    return found


def naive_packed(made: data.Prepared, split: str, length: int) -> list[tuple[list, list]]:
    rows = []
    for documents in shards_of(made, split):
        stream = [token for document in documents for token in document]
        while len(stream) > length:
            rows.append((stream[:length], stream[1 : length + 1]))
            stream = stream[length:]
    return rows


def naive_documents(made: data.Prepared, split: str, length: int) -> list[tuple[list, list]]:
    rows = []
    pad_id = made.eos_id if made.pad_id is None else made.pad_id
    for document in (d for shard in shards_of(made, split) for d in shard):
        if len(document) > length:
            document = [*document[: length - 1], made.eos_id]
        padding = length - len(document)
        rows.append((document + [pad_id] * padding, document[1:] + [-100] * (padding + 1)))
    return rows


@pytest.mark.parametrize("pad_id", [None, 7])
@pytest.mark.parametrize("mode", ["packed", "document"])
@pytest.mark.parametrize("length", [2, 64, 300])
def test_rows_equal_a_naive_reference(
    mode: str, length: int, pad_id: int | None, prepared: tuple[DataConfig, data.Prepared]
) -> None:
    made = dataclasses.replace(prepared[1], pad_id=pad_id)
    rows = data.Rows(made, "train", length, mode)  # type: ignore[arg-type]
    naive = (naive_packed if mode == "packed" else naive_documents)(made, "train", length)
    assert len(rows) == len(naive)
    indices = data.order(3, len(rows), 0, min(len(rows), 3000))
    tokens, targets = rows.batch(indices)
    for tensor, side in ((tokens, 0), (targets, 1)):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
        assert tensor.tolist() == [naive[i][side] for i in indices]
    one = rows.batch(indices[:1])
    assert torch.equal(one[0], tokens[:1])
    assert torch.equal(one[1], targets[:1])
    assert rows.batch(indices[:0])[0].shape == (0, length)
    for outside in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows.batch(np.array([outside]))


@needs_shared
@pytest.mark.parametrize("length", [256, 64])
def test_document_rows_are_those_of_the_published_protocol(length: int, tmp_path: Path) -> None:
    """C4 documents, T5 ids, truncation and padding as the tokenizers library itself does them."""
    source = SHARED / "data" / "c4-sample" / "c4-en-pfdecoding-1480.jsonl.xz"
    said = config(source, tokenizer=str(T5_JSON), cache_dir=tmp_path, max_documents=200)
    rows = data.Rows(data.prepare(said, progress=False), "train", length, "document")
    library = tokenizers.Tokenizer.from_file(str(T5_JSON))
    library.enable_truncation(length)
    library.enable_padding(length=length, pad_id=0)
    texts = [text for text, split in read(source, max_documents=200) if split == "train"]
    expected = torch.tensor([encoding.ids for encoding in library.encode_batch(texts)])
    tokens, targets = rows.batch(np.arange(len(rows)))
    assert torch.equal(tokens, expected)
    labels = expected.masked_fill(expected == 0, -100)
    assert torch.equal(targets[:, :-1], labels[:, 1:])
    assert (targets[:, -1] == -100).all()
    cut = tokens[:, -1] != 0
    assert cut.any()
    assert (tokens[cut, -1] == 1).all(), "a document that is cut keeps its end token"


def test_wrong_rows(prepared: tuple[DataConfig, data.Prepared]) -> None:
    with pytest.raises(ConfigError, match=r"--data\.sequence-length must be at least 2"):
        data.Rows(prepared[1], "train", 1)
    rows = data.Rows(prepared[1], "train", 64)
    data.check_enough(rows, len(rows))
    with pytest.raises(ConfigError, match=r"smaller --train.batch-size .*--data.sequence-length"):
        data.Batches(rows, 0, len(rows) + 1)
    short = data.Rows(prepared[1], "validation", 10**6)
    assert len(short) == 0
    with pytest.raises(ConfigError, match=r"--data.validation-frac.*--data.sequence-length"):
        next(data.validation_batches(short, 1, 10**9))


# Order


@given(seed=st.integers(0, 2**70), num_rows=st.integers(1, 3000), epoch=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_every_epoch_is_a_permutation(seed: int, num_rows: int, epoch: int) -> None:
    found = data.order(seed, num_rows, epoch * num_rows, num_rows)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(num_rows))


@given(
    st.integers(0, 2**64), st.integers(1, 300), st.integers(0, 2000), st.lists(st.integers(0, 99))
)
@settings(max_examples=100, deadline=None)
def test_order_is_the_same_however_it_is_cut(
    seed: int, num_rows: int, start: int, cuts: list[int]
) -> None:
    whole = data.order(seed, num_rows, start, sum(cuts))
    pieces = [data.order(seed, num_rows, start + sum(cuts[:i]), n) for i, n in enumerate(cuts)]
    assert np.array_equal(np.concatenate([*pieces, np.empty(0, np.int64)]), whole)


def test_order_is_fixed_for_ever() -> None:
    """A checkpoint's position means the same rows in every version: these numbers never change."""
    assert data.order(0, 10, 0, 20).tolist() == GOLDEN_SMALL
    assert data.order(2**64 - 1, 10**12, 10**13, 4).tolist() == GOLDEN_LARGE


GOLDEN_SMALL = [5, 6, 0, 4, 2, 7, 8, 3, 1, 9, 8, 7, 2, 4, 9, 6, 1, 5, 0, 3]
GOLDEN_LARGE = [329473452255, 637273614845, 343834040963, 156058098078]


@pytest.mark.parametrize("num_rows", [100, 1000, 4097])
def test_order_looks_shuffled(num_rows: int) -> None:
    """Within 5 standard deviations of what independent uniform permutations would show."""
    epochs = 40
    found = data.order(7, num_rows, 0, epochs * num_rows).reshape(epochs, num_rows)
    place = np.arange(num_rows)
    for one in found:
        assert abs(np.corrcoef(place, one)[0, 1]) < 5 / num_rows**0.5
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 5 / num_rows**0.5
    # Chances that a row keeps its place, or that two epochs or neighbouring seeds agree: 1 / n.
    other = data.order(8, num_rows, 0, epochs * num_rows).reshape(epochs, num_rows)
    for left, right in ((found, place), (found[1:], found[:-1]), (found, other)):
        assert abs((left == right).sum() - len(left)) < 5 * len(left) ** 0.5


@pytest.mark.parametrize("num_rows", [2, 3, 4])
def test_small_orders_are_equally_frequent(num_rows: int) -> None:
    epochs = 24_000
    found = data.order(1, num_rows, 0, epochs * num_rows).reshape(epochs, num_rows)
    counts = Counter(map(tuple, found.tolist()))
    possible = {2: 2, 3: 6, 4: 24}[num_rows]
    assert len(counts) == possible
    expected = epochs / possible
    assert max(abs(count - expected) for count in counts.values()) < 5 * expected**0.5


def test_order_refuses_nonsense() -> None:
    for arguments in ((0, 0, 0, 1), (0, 1, -1, 1), (0, 1, 0, -1), (-1, 1, 0, 1)):
        with pytest.raises(ValueError, match="must be at least"):
            data.order(*arguments)


# Batches


@pytest.mark.parametrize("mode", ["packed", "document"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 5, 12, None])
def test_global_batch_does_not_depend_on_how_it_is_cut(
    mode: str,
    world_size: int,
    micro_batch_size: int | None,
    prepared: tuple[DataConfig, data.Prepared],
) -> None:
    rows = data.Rows(prepared[1], "train", 64, mode)  # type: ignore[arg-type]
    ranks = [data.Batches(rows, 5, 12) for _ in range(world_size)]
    for step in range(3):
        parts = [
            part
            for rank, batches in enumerate(ranks)
            for part in batches.next(micro_batch_size, rank, world_size)
        ]
        expected = rows.batch(data.order(5, len(rows), 12 * step, 12))
        assert all(len(part[0]) <= (micro_batch_size or 12) for part in parts)
        for side in (0, 1):
            assert torch.equal(torch.cat([part[side] for part in parts]), expected[side])
        assert {batches.position for batches in ranks} == {12 * (step + 1)}


def test_position_resumes_in_the_middle_of_an_epoch(
    prepared: tuple[DataConfig, data.Prepared],
) -> None:
    rows = data.Rows(prepared[1], "validation", 256)
    batch_size = len(rows) // 2 + 1  # the second batch crosses into the next epoch
    whole = data.Batches(rows, 9, batch_size)
    steps = [whole.next()[0] for _ in range(5)]
    resumed = data.Batches(rows, 9, batch_size, position=2 * batch_size)
    for step in steps[2:]:
        (again,) = resumed.next()
        assert torch.equal(again[0], step[0])
        assert torch.equal(again[1], step[1])
    with pytest.raises(ConfigError, match="take a multiple of 7"):
        data.Batches(rows, 9, 8).next(world_size=7)


@pytest.mark.parametrize("mode", ["packed", "document"])
def test_validation_rows_do_not_depend_on_the_batch_size(
    mode: str, prepared: tuple[DataConfig, data.Prepared]
) -> None:
    rows = data.Rows(prepared[1], "validation", 32, mode)  # type: ignore[arg-type]
    read_by_size = []
    for batch_size in (1, 7, 1000):
        parts = list(data.validation_batches(rows, batch_size, 1000))
        read_by_size.append([torch.cat(side) for side in zip(*parts, strict=True)])
    (tokens, targets), *others = read_by_size
    for other in others:
        assert torch.equal(other[0], tokens)
        assert torch.equal(other[1], targets)
    used = tokens.numel() if mode == "packed" else int((targets != -100).sum()) + len(tokens)
    nxt = (
        32 if mode == "packed" else int((rows.batch(np.array([len(tokens)]))[1] != -100).sum()) + 1
    )
    assert used <= 1000 < used + nxt
    assert torch.equal(rows.batch(np.arange(len(tokens)))[0], tokens)
    assert data.validation_hash(rows, 1000) == data.validation_hash(rows, 1000)
    assert data.validation_hash(rows, 1000) != data.validation_hash(rows, 900)
    assert len(list(data.validation_batches(rows, 8, 1))) == 1, "at least one row"
    assert sum(len(t) for t, _ in data.validation_batches(rows, 8, 10**9)) == len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["packed", "document"])
def test_reading_speed(mode: str, tmp_path: Path) -> None:
    """At least 20 million tokens a second on one core, from warm shards of the default corpus."""
    made = data.prepare(DataConfig(cache_dir=tmp_path), progress=False)
    rows = data.Rows(made, "train", 256, mode)  # type: ignore[arg-type]
    indices = data.order(0, len(rows), 0, 64 * 16).reshape(64, 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    speeds = []
    for _ in range(10):
        start_s = time.perf_counter()
        num_tokens = sum(rows.batch(batch)[0].numel() for batch in indices)
        speeds.append(num_tokens / (time.perf_counter() - start_s))
    torch.set_num_threads(threads)
    assert sorted(speeds)[5] >= 20e6
