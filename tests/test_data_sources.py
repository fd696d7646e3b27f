"""From source words to documents: every form, every bad file. Every equality is exact."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import sys
import sysconfig
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from crnet.config.sections import DataConfig
from crnet.data import readers
from crnet.data.readers import PIECE_CHARS, WHOLE_FILE_CHARS
from crnet.data.sources import documents, identity
from crnet.errors import ConfigError


def config(source: object = "python", **keys: object) -> DataConfig:
    words = source if isinstance(source, tuple) else (source,)
    return DataConfig(source=tuple(map(str, words)), **keys)  # type: ignore[arg-type]


def read(source: object, **keys: object) -> list[tuple[str, str]]:
    return [(d.text, d.split) for d in documents(config(source, **keys))]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Real documents: the modules of one package of the standard library, and some Unicode."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted((root / "email").glob("*.py")) + sorted((root / "json").glob("*.py"))
    found = [path.read_text(encoding="utf-8").strip("\n") for path in paths]
    return [text for text in found if text] + ["Žluťoučký kůň — 漢字, 🙂\t日本語 \u00a0ďáblů"]


def test_python_source_is_real_text_split_by_file() -> None:
    found = list(documents(DataConfig()))
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
def test_every_file_form_gives_the_same_documents(
    suffix: str, tmp_path: Path, texts: list[str]
) -> None:
    expected = [(text, "validation" if held_out(text) else "train") for text in texts]
    for form in ("jsonl", "json"):
        records = tmp_path / f"records.{form}{suffix}"
        write_records(records, texts)
        assert read(records, validation_frac=0.3) == expected, form
    folder = tmp_path / "folder"
    for number, text in enumerate(texts):
        path = folder / "deep" / f"{number:03}.txt{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack(path, text.encode()))
    (folder / "README.md").write_text("about the data")
    for source in (folder, folder / "**" / f"*.txt{suffix}"):
        assert read(source, validation_frac=0.3, documents="file") == expected, source


def test_folders_behind_links_are_read(tmp_path: Path, texts: list[str]) -> None:
    """Once each: a link that leads back is an error, not an endless text."""
    for name in ("disk", "corpus"):
        (tmp_path / name).mkdir()
    write_records(tmp_path / "disk" / "b.jsonl", texts[:4])
    write_records(tmp_path / "corpus" / "a.jsonl", texts[4:8])
    (tmp_path / "corpus" / "more").symlink_to(tmp_path / "disk")
    found = read(tmp_path / "corpus")
    assert sorted(text for text, _ in found) == sorted(texts[:8])
    (tmp_path / "corpus" / "back").symlink_to(".")
    with pytest.raises(ConfigError, match=r"back: a link leads to .*/corpus, which is read"):
        read(tmp_path / "corpus")


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
    before = identity(config(tmp_path, subset="en"))
    write_records(tmp_path / "en" / "c4-train.1.json.gz", texts[:1])
    assert identity(config(tmp_path, subset="en")) != before
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
    monkeypatch.setattr(readers, "_BLOCK_BYTES", block_bytes)
    path, text = tmp_path / "a.txt", "\n \n漢字 é\n".join(texts) * 2 + "x" * 20_000
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert len(text) > 5 * WHOLE_FILE_CHARS
    pieces = [t for t, _ in read(path)]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= PIECE_CHARS
    assert min(map(len, pieces[:-1])) >= PIECE_CHARS // 2
    assert sum(piece.endswith("\n") for piece in pieces) > 0.9 * len(pieces)
    assert [t for t, _ in read(path, documents="file")] == [text]
    lines = [line for line in text.split("\n") if line.strip()]
    assert [t for t, _ in read(path, documents="line")] == lines
    paragraphs = [part.strip("\n") for part in re.split(r"(?:^|\n)\s*\n", text)]
    got = [t for t, _ in read(path, documents="paragraph")]
    assert got == [part for part in paragraphs if part.strip()]
    path.write_text(text[:WHOLE_FILE_CHARS])
    assert [t for t, _ in read(path)] == [text[:WHOLE_FILE_CHARS]]


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


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
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
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_source_is_a_config_error_with_the_mend(
    case: str, bad_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bad_files)
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
    for name in ("zstandard", "pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("a.zst", "a.parquet"):
        (tmp_path / name).write_bytes(b"x")
    for source in (tmp_path / "a.zst", tmp_path / "a.parquet", "allenai/c4"):
        with pytest.raises(ConfigError, match=r"pip install 'crnet\[data\]'"):
            read(source)
