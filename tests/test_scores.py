"""Bits a byte and accuracy: what is scored, and the bytes of the very text that was scored."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from crnet.config.model_spec import model_spec
from crnet.config.sections import DataConfig, ModelConfig
from crnet.data import tokenizer
from crnet.data.prepare import prepare
from crnet.data.rows import Rows, validation_batches
from crnet.data.shards import Prepared
from crnet.data.sources import documents
from crnet.data.tokenizer import Tokenizer
from crnet.errors import ConfigError
from crnet.inference.evaluate import Evaluation, evaluate, evaluation_of
from crnet.kernels import loss
from crnet.model.build import build

SHARED = Path(os.environ.get("CRNET_SHARED") or Path(__file__).parents[2] / "shared")
TOKENIZERS = SHARED / "data" / "tokenizers"
C4 = SHARED / "data" / "c4-sample"
needs_shared = pytest.mark.skipif(
    not TOKENIZERS.is_dir(), reason=f"no {TOKENIZERS}; set CRNET_SHARED to the shared folder"
)
TEXTS = [
    "Žluťoučký kůň — 漢字, 🙂\t日本語 \u00a0ďáblů",
    "def f(x):\n    return  x\n\n\n",
    "  \ufb01ve \uff12\uff13 \u0301 e\u0301 … ™",
    "a",
]


# The kernel


@pytest.mark.parametrize("rows", [1, 4, 11, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_are_those_of_the_loss(rows: int | None, dtype: torch.dtype) -> None:
    """The sum to the bit; every row and the likeliest token against whole logits."""
    generator = torch.Generator().manual_seed(5)
    x_MD = torch.randn(11, 6, generator=generator).to(dtype)
    weight_VD = torch.randn(13, 6, generator=generator).to(dtype)
    target_M = torch.tensor([3, 0, 12, -100, 7, 7, -100, 1, 2, 9, 10])
    found = loss.target_scores(x_MD, weight_VD, target_M, rows)
    assert torch.equal(found.loss_sum, loss.linear_cross_entropy(x_MD, weight_VD, target_M, rows))
    logits = (x_MD @ weight_VD.T).to(found.loss_M.dtype)
    wanted = functional.cross_entropy(logits, target_M, reduction="none")
    torch.testing.assert_close(found.loss_M, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.is_likeliest_M, logits.argmax(-1) == target_M)


def test_of_equally_likely_tokens_the_lowest_id_is_the_likeliest() -> None:
    """Else a model that finds all tokens alike would always be right."""
    target_M = torch.tensor([0, 1, 2, -100])
    found = loss.target_scores(torch.zeros(4, 2), torch.ones(3, 2), target_M)
    assert found.is_likeliest_M.tolist() == [True, False, False, False]


# Bytes of an id


def each_tokenizer() -> list[str]:
    names = ("t5-tokenizer.json", "t5-base.spiece.model", "axlearn_bpe_32k_c4.model")
    return ["train", *names]


@pytest.fixture(scope="module", params=each_tokenizer())
def made(request: pytest.FixtureRequest, corpus: Path) -> Tokenizer:
    if request.param == "train":
        return tokenizer.train(corpus.read_text(encoding="utf-8").split("\n\n"), 400)
    if not TOKENIZERS.is_dir():
        pytest.skip(f"no {TOKENIZERS}; set CRNET_SHARED to the shared folder")
    if request.param.endswith(".model"):
        pytest.importorskip("sentencepiece")
    return tokenizer.load(str(TOKENIZERS / request.param))


def test_lengths_add_up_to_the_text(made: Tokenizer, corpus: Path) -> None:
    """Whatever the tokenizer drops, normalises or does not know."""
    texts = [*TEXTS, corpus.read_text(encoding="utf-8")]
    plain = made.encode_batch(texts)
    for text, ids, (same, lengths) in zip(texts, plain, made.encode_measured(texts), strict=True):
        assert np.array_equal(ids, same)
        assert lengths.shape == ids.shape
        assert (lengths >= 0).all()
        left_out = len(text.encode()) - lengths.sum()
        tail = text.encode()[len(text.encode()) - left_out :]
        assert left_out == 0 or tail.isspace()


def test_each_length_is_that_of_the_id_s_own_text(corpus: Path) -> None:
    """Where ids spell bytes and nothing is left out, a length is what the id decodes to."""
    text = corpus.read_text(encoding="utf-8")
    assert text.isascii()
    made = tokenizer.train([text], 400)
    ((ids, lengths),) = made.encode_measured([text])
    assert lengths.tolist() == [len(made.decode([each])) for each in ids]
    assert 1 < lengths.mean() < 5


# Bytes of rows


def on(corpus: Path, **changes: object) -> DataConfig:
    values = {"documents": "paragraph", "vocab_size": 300, "sequence_length": 16}
    return DataConfig(**{"source": (str(corpus),), "validation_frac": 0.2, **values, **changes})


@pytest.fixture(scope="module")
def prepared(corpus: Path) -> Prepared:
    return prepare(on(corpus), progress=False)


def held_out(corpus: Path) -> list[str]:
    return [each.text for each in documents(on(corpus)) if each.split == "validation"]


def test_bytes_of_all_packed_rows(prepared: Prepared, corpus: Path) -> None:
    """All text but the first id and what is left at the end of the shard."""
    rows = Rows(prepared, "validation", 16)
    found = [prepared.tokenizer().encode_measured([text])[0] for text in held_out(corpus)]
    lengths = list(itertools.chain(*([*each.tolist(), 0] for _, each in found)))
    num_targets = 16 * len(rows)
    assert rows.num_bytes(np.arange(len(rows))) == sum(lengths[1 : 1 + num_targets])
    assert sum(lengths) == sum(len(text.encode()) for text in held_out(corpus))
    one_by_one = [rows.num_bytes(np.array([idx])) for idx in range(len(rows))]
    assert sum(one_by_one) == rows.num_bytes(np.arange(len(rows)))


@pytest.mark.parametrize("length", [2, 16, 1000])
def test_bytes_of_documents(prepared: Prepared, corpus: Path, length: int) -> None:
    """What a row's targets spell: none for the first id, the end, and what was cut off."""
    rows = Rows(prepared, "validation", length, "document")
    made = prepared.tokenizer()
    for idx, text in enumerate(held_out(corpus)):
        ids, lengths = made.encode_measured([text])[0]
        kept = len(ids) if len(ids) + 1 <= length else length - 1
        assert rows.num_bytes(np.array([idx])) == lengths[1:kept].sum()


@needs_shared
def test_bytes_are_of_the_text_whatever_the_tokenizer(tmp_path: Path) -> None:
    """T5 knows no line ends and no runs of blanks; the text has them all the same."""
    text = "\n\n".join(f"line {n}:\n      {n * n}  and   more" for n in range(200))
    source = tmp_path / "text.txt"
    source.write_text(text, encoding="utf-8")
    t5 = str(TOKENIZERS / "t5-tokenizer.json")
    found = {}
    for name in ("train", t5):
        made = prepare(on(source, tokenizer=name, cache_dir=tmp_path / "cache"), progress=False)
        rows = Rows(made, "validation", 1000, "document")
        first = [made.tokenizer().encode_measured([text])[0][1][0] for text in held_out(source)]
        found[name] = rows.num_bytes(np.arange(len(rows))) + sum(first)
    assert found["train"] == found[t5] == sum(len(text.encode()) for text in held_out(source))


def test_bytes_of_training_are_not_kept(prepared: Prepared) -> None:
    with pytest.raises(ConfigError, match="train"):
        Rows(prepared, "train", 16).num_bytes(np.array([0]))


# Evaluation


@pytest.mark.parametrize("mode", ["packed", "document"])
def test_evaluation_against_every_token_by_itself(prepared: Prepared, mode: str) -> None:
    rows = Rows(prepared, "validation", 16, mode)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 2}
    model = build(model_spec(ModelConfig(**shape, rank="8", vocab_size=prepared.vocab_size)), 3)
    found = evaluate(model, rows, 400)
    wide = build(model_spec(ModelConfig(**shape, rank="8", vocab_size=prepared.vocab_size)), 3)
    wide.double()
    nats, right, count = 0.0, 0, 0
    for tokens, targets in validation_batches(rows, 1, 400):
        for at in range(16):
            if (target := int(targets[0, at])) == loss.IGNORED:
                continue
            with torch.no_grad():
                logits = wide.logits(tokens[:, : at + 1])[0, -1]
            nats -= float(logits.log_softmax(0)[target])
            right += int(logits.argmax()) == target
            count += 1
    assert found.tokens == count
    assert found.accuracy == right / count
    assert found.loss == pytest.approx(nats / count, rel=1e-6)  # fp32 against fp64
    assert found.bytes == rows.num_bytes(rows.within(400))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes, rel=1e-6)


def test_a_figure_survives_the_file_of_metrics() -> None:
    found = Evaluation(2.5, 100, 0.25, 321)
    assert evaluation_of(json.loads(json.dumps(found.figures()))) == found
    assert found.bits_per_byte == 2.5 * 100 / math.log(2) / 321
    old = evaluation_of({"val_loss": 2.5, "val_tokens": 100})
    assert math.isnan(old.bits_per_byte)
    assert math.isnan(old.accuracy)
    assert old.perplexity == math.exp(2.5)
