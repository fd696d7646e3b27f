"""Prepared folders: what lies in them, when they are made, and what goes wrong. All exact."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from crnet.config.sections import DataConfig
from crnet.data import sources, tokenizer
from crnet.data.prepare import prepare
from crnet.data.rows import Rows
from crnet.data.shards import Prepared
from crnet.errors import ConfigError


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.train([corpus.read_text(encoding="utf-8")], 512).save(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, bpe: Path
) -> tuple[DataConfig, Prepared]:
    """Paragraphs of real text and one of many signs, in several shards of each split."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = corpus.read_text(encoding="utf-8").split("\n\n")
    texts.append("Žluťoučký kůň — 漢字, 🙂\t日本語 \u00a0ďáblů")
    records = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text(records)
    data = DataConfig(
        source=(str(folder / "corpus.jsonl"),),
        tokenizer=str(bpe),
        cache_dir=folder / "cache",
        validation_frac=0.3,
    )
    return data, prepare(data, progress=False, shard_tokens=4_000)


def small(tmp_path: Path, bpe: Path, **keys: object) -> DataConfig:
    """300 lines, a document each."""
    path = tmp_path / "small.txt"
    if not path.exists():
        path.write_text("".join(f"line number {i}\n" for i in range(300)))
    keys = {"documents": "line", "tokenizer": str(bpe), **keys}
    return DataConfig(source=(str(path),), cache_dir=tmp_path / "cache", **keys)  # type: ignore[arg-type]


def test_shards_hold_the_documents(prepared: tuple[DataConfig, Prepared]) -> None:
    data, made = prepared
    read_by = made.tokenizer()
    assert (made.dtype, made.vocab_size, made.eos_id) == ("uint16", 512, 0)
    assert made.tokenizer_hash == read_by.hash
    digest = hashlib.sha256()
    for split, part in made.parts.items():
        expected = [d.text for d in sources.documents(data) if d.split == split]
        assert part.documents == len(expected)
        assert part.text_bytes == sum(len(text.encode()) for text in expected)
        assert len(part.shards) > 1
        found = []
        for shard in part.shards:
            ids = np.fromfile(made.folder / f"{shard.name}.bin", "<u2")
            starts = np.fromfile(made.folder / f"{shard.name}.idx", "<u8")
            assert len(ids) == shard.tokens <= 4_000
            assert len(starts) == shard.documents
            for document in np.split(ids, starts[1:].astype(int)):
                assert document[-1] == 0
                found.append(read_by.decode(document[:-1]))
            if split == "validation":
                digest.update(ids.tobytes())
        assert found == expected
        assert part.tokens == sum(shard.tokens for shard in part.shards)
    assert made.parts["validation"].sha256 == digest.hexdigest()
    assert not [path for path in made.folder.parent.iterdir() if path != made.folder]


def test_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"</s>": 0, "?": 1, "line": 70_000}, unk_token="?")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    made = prepare(small(tmp_path, tmp_path / "words.json"), progress=False)
    assert (made.vocab_size, made.dtype) == (70_001, "uint32")
    tokens, targets = Rows(made, "train", 4, "document").batch(np.arange(2))
    assert tokens.tolist() == [[70_000, 1, 1, 0]] * 2
    assert targets.tolist() == [[1, 1, 0, -100]] * 2


def test_second_preparation_reads_nothing(
    prepared: tuple[DataConfig, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, made = prepared

    def fail(*_: object) -> None:
        raise AssertionError("read once more")

    monkeypatch.setattr(sources, "documents", fail)
    monkeypatch.setattr(tokenizer, "load", fail)
    same = dataclasses.replace(data, sequence_length=99, rows="document", validation_tokens=5)
    assert prepare(same, shard_tokens=4_000) == made
    for other in ({"validation_frac": 0.1}, {"documents": "line"}, {"max_documents": 9}):
        with pytest.raises(AssertionError, match="read once more"):
            prepare(dataclasses.replace(data, **other), progress=False, shard_tokens=4_000)


def test_changed_source_is_prepared_anew(tmp_path: Path, bpe: Path) -> None:
    data = small(tmp_path, bpe)
    first = prepare(data, progress=False)
    with open(tmp_path / "small.txt", "a") as file:
        file.write("one more line\n")
    second = prepare(data, progress=False)
    assert second.folder != first.folder
    counts = [sum(p.documents for p in made.parts.values()) for made in (first, second)]
    assert counts == [300, 301]


def test_trained_tokenizer_is_kept_and_decides_the_folder(tmp_path: Path, bpe: Path) -> None:
    made = prepare(small(tmp_path, bpe, tokenizer="train", vocab_size=300), progress=False)
    assert made.vocab_size == 300
    other = prepare(small(tmp_path, bpe, tokenizer="train", vocab_size=290), progress=False)
    assert other.folder != made.folder
    assert other.tokenizer().vocab_size == 290


def test_damaged_folder_is_made_again(tmp_path: Path, bpe: Path) -> None:
    data = small(tmp_path, bpe)
    made = prepare(data, progress=False)

    def contents() -> dict[str, bytes]:
        paths = [path for path in made.folder.iterdir() if path.name != "verified.json"]
        return {path.name: path.read_bytes() for path in paths}

    content = contents()
    for name in ("train-00000.bin", "train-00000.idx", "meta.json", "no meta.json"):
        path = made.folder / name.removeprefix("no ")
        if name == "no meta.json":
            path.unlink()
        else:
            path.write_bytes(content[name][: len(content[name]) // 2])
        with pytest.warns(UserWarning, match="preparing it again"):
            assert prepare(data, progress=False) == made, name
        assert contents() == content, name
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [made.folder.name], name


def test_killed_preparation_leaves_no_folder(tmp_path: Path, bpe: Path) -> None:
    data = small(tmp_path, bpe)
    script = (
        "import itertools, sys, time\n"
        "from pathlib import Path\n"
        "from crnet.config.sections import DataConfig\n"
        "from crnet.data import prepare, sources\n"
        "read = sources.documents\n"
        "def slow(config):\n"
        "    yield from itertools.islice(read(config), 100)\n"
        "    time.sleep(60)\n"
        "sources.documents, prepare._BATCH_DOCUMENTS = slow, 10\n"
        "source, tokenizer, cache = sys.argv[1:]\n"
        "prepare.prepare(DataConfig(source=(source,), tokenizer=tokenizer, documents='line',\n"
        "                           cache_dir=Path(cache)), progress=False)\n"
    )
    cache = tmp_path / "cache"
    words = [*data.source, data.tokenizer, str(cache)]
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
    made = prepare(data, progress=False)
    assert sum(part.documents for part in made.parts.values()) == 300
    assert left.exists(), "it could be another process at work"
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (*left.iterdir(), left):
        os.utime(path, (two_days_ago, two_days_ago))
    prepare(small(tmp_path, bpe, max_documents=200), progress=False)
    assert not left.exists()


def test_two_preparations_at_once(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, real, inner = small(tmp_path, bpe), sources.documents, []

    def documents(config: DataConfig) -> object:
        monkeypatch.setattr(sources, "documents", real)
        yield from real(config)
        inner.append(prepare(data, progress=False))  # another one, and it is faster

    monkeypatch.setattr(sources, "documents", documents)
    assert prepare(data, progress=False) == inner[0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [inner[0].folder.name]


@pytest.mark.parametrize("spec", ["bpe", "train"])
def test_interrupted_preparation_leaves_nothing(
    spec: str, tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small(tmp_path, bpe, tokenizer="train" if spec == "train" else str(bpe))
    real = sources.documents
    for stop in (KeyboardInterrupt, ConfigError, OSError):

        def documents(config: DataConfig, stop: type[BaseException] = stop) -> object:
            for number, document in enumerate(real(config)):
                yield document
                if number == 50:
                    raise stop("stopped here")

        monkeypatch.setattr(sources, "documents", documents)
        with pytest.raises(stop, match="stopped here"):
            prepare(data, progress=False)
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
        prepare(small(tmp_path, bpe, **keys), progress=False)
    assert not list((tmp_path / "cache").iterdir())


def test_unwritable_cache(tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("a file")
    data = dataclasses.replace(small(tmp_path, bpe), cache_dir=tmp_path / "taken" / "cache")
    with pytest.raises(ConfigError, match=r"taken/cache: .*--data.cache-dir"):
        prepare(data, progress=False)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenizer.Tokenizer, "save", full)
    with pytest.raises(ConfigError, match=r"No space left .*make room or name another folder"):
        prepare(small(tmp_path, bpe), progress=False)
    assert not list((tmp_path / "cache").iterdir())


def test_cache_folder_follows_the_environment(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data = dataclasses.replace(small(tmp_path, bpe), cache_dir=None)
    assert prepare(data, progress=False).folder.parent == tmp_path / "xdg" / "crnet"


def test_progress_is_on_stderr(
    tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(small(tmp_path, bpe), progress=True)
    shown = capsys.readouterr()
    assert "tokens" in shown.err
    assert "300 documents" in shown.err
    assert shown.out == ""
