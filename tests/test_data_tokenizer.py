"""Tokenizers: trained, loaded and saved. Every equality is exact."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from crnet.data import tokenizer
from crnet.data.tokenizer import Tokenizer
from crnet.errors import ConfigError

SHARED = Path(os.environ.get("CRNET_SHARED") or Path(__file__).parents[2] / "shared")
TOKENIZERS = SHARED / "data" / "tokenizers"
needs_shared = pytest.mark.skipif(
    not TOKENIZERS.is_dir(), reason=f"no {TOKENIZERS}; set CRNET_SHARED to the shared folder"
)
T5_JSON, T5_PIECES = TOKENIZERS / "t5-tokenizer.json", TOKENIZERS / "t5-base.spiece.model"
AXLEARN = TOKENIZERS / "axlearn_bpe_32k_c4.model"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Real documents: the modules of one package of the standard library, and some Unicode."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted((root / "email").glob("*.py")) + sorted((root / "json").glob("*.py"))
    found = [path.read_text(encoding="utf-8").strip("\n") for path in paths]
    return [text for text in found if text] + ["Žluťoučký kůň — 漢字, 🙂\t日本語 \u00a0ďáblů"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.train(texts, 512).save(folder)
    return folder


@pytest.fixture(scope="module")
def trained(bpe: Path) -> Tokenizer:
    return tokenizer.load_saved(bpe)


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_trained_tokenizer_round_trips(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_trained_tokenizer(bpe: Path, texts: list[str]) -> None:
    made = tokenizer.load(str(bpe))
    assert (made.vocab_size, made.eos_id, made.pad_id) == (512, 0, None)
    assert made.decode([0]) == tokenizer.END_OF_TEXT
    assert tokenizer.train(iter(texts), 512).hash == made.hash
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
    copy = tokenizer.load_saved(tmp_path / "copy")
    assert (copy.eos_id, copy.hash) == (made.eos_id, made.hash) == (0, made.hash)


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
def test_ids_of_a_sentencepiece_model_are_those_of_the_library(
    path: Path, texts: list[str], tmp_path: Path
) -> None:
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


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sentencepiece", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.model").write_bytes(b"x")
    for spec in (str(tmp_path / "a.model"), "owner/name"):
        with pytest.raises(ConfigError, match=r"pip install 'crnet\[data\]'"):
            tokenizer.load(spec)
