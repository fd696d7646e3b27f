"""Whole texts and sliding windows: every token against a model that reads it by itself, and against
transformers' own way."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from crnet.config.model_spec import model_spec
from crnet.config.sections import DataConfig, ModelConfig
from crnet.data import tokenizer
from crnet.data.sources import texts_to_evaluate
from crnet.data.tokenizer import Tokenizer
from crnet.errors import ConfigError
from crnet.inference import texts
from crnet.inference.texts import document_windows, evaluate_texts, sliding_windows
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from test_scores import TOKENIZERS, needs_shared

SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3}
SHAPE |= {"num_heads": 2, "rank": "8", "init_std": 0.2}  # wide: some tokens are far likelier
WINDOW = 12


def small(vocab_size: int, **changes: Any) -> LanguageModel:
    return build(model_spec(ModelConfig(**{**SHAPE, **changes}, vocab_size=vocab_size)), 3)


@pytest.fixture(scope="module")
def documents(corpus: Path) -> list[str]:
    """Long and short ones, one of a single token, and one that no tokenizer has an id for."""
    found = corpus.read_text(encoding="utf-8").split("\n\n")[:9]
    assert max(map(len, found)) > 400
    return [*found, "a", "   two words  "]


@pytest.fixture(scope="module")
def trained(documents: list[str]) -> Tokenizer:
    return tokenizer.train(documents, 300)


@pytest.fixture(scope="module")
def model(trained: Tokenizer) -> LanguageModel:
    return small(trained.vocab_size)


def by_itself(model: LanguageModel, context: list[int], target: int) -> tuple[float, bool]:
    """Loss in fp64 of one token after its context, and whether it is the likeliest."""
    with torch.no_grad():
        logits = model.logits(torch.tensor([context]))[0, -1].double()
    return -float(logits.log_softmax(0)[target]), int(logits.argmax()) == target


# Windows


@pytest.mark.parametrize("num_ids", [0, 1, 11, 12, 13, 24, 25, 100])
def test_every_id_of_a_document_is_a_target_once(num_ids: int) -> None:
    ids = list(range(num_ids))
    windows = list(document_windows(ids, -1, WINDOW))
    assert [each for window in windows for each in window.ids[-window.num_scored :]] == ids
    for window in windows:
        assert len(window.ids) <= WINDOW + 1
        assert list(window.ids) == list(range(window.ids[0], window.ids[-1] + 1))
    if num_ids > WINDOW:  # the last one takes all the context that there is room for
        assert len(windows[-1].ids) == WINDOW + 1


@pytest.mark.parametrize("num_ids", [0, 1, 2, 11, 12, 13, 24, 25, 100])
@pytest.mark.parametrize("stride", [1, 5, 11])
def test_sliding_windows_are_those_of_the_guide(num_ids: int, stride: int) -> None:
    """transformers, "Perplexity of fixed-length models": begin, end and length of the target."""
    ids, wanted, reached = list(range(num_ids)), [], 0
    for begin in range(0, num_ids, stride):
        end = min(begin + WINDOW, num_ids)
        labels = [each if each >= reached else -100 for each in ids[begin:end]]
        wanted += [each for each in labels[1:] if each != -100]  # labels are shifted inside
        reached = end
        if end == num_ids:
            break
    windows = list(sliding_windows(ids, WINDOW, stride))
    assert [each for window in windows for each in window.ids[-window.num_scored :]] == wanted
    assert wanted == ids[1:]
    assert all(len(window.ids) <= WINDOW for window in windows)
    assert all(len(window.ids) - window.num_scored >= WINDOW - stride for window in windows[1:-1])


# Figures


@pytest.mark.slow
def test_documents_against_every_token_by_itself(
    model: LanguageModel, trained: Tokenizer, documents: list[str]
) -> None:
    found = evaluate_texts(model, trained, documents, "document", WINDOW)
    nats, right, count = 0.0, 0, 0
    for text in documents:
        ids = trained.encode(text)
        for at, target in enumerate(ids):
            first = at // WINDOW * WINDOW
            end = min(first + WINDOW, len(ids))
            context = [trained.eos_id, *ids[:at]][max(0, end - WINDOW) :]
            loss, is_right = by_itself(model, context, target)
            nats, right, count = nats + loss, right + is_right, count + 1
    figures = found.figures()
    assert found.loss_sum == pytest.approx(nats, rel=1e-6)  # fp32 sums within the model
    assert (found.num_right, found.tokens) == (right, count)
    assert 0 < right < count
    assert figures["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    num_bytes = sum(len(text.encode()) for text in documents)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    num_words = sum(len(re.split(r"\s+", text)) for text in documents)
    assert figures["word_perplexity"] == pytest.approx(math.exp(nats / num_words), rel=1e-4)
    assert (figures["bytes"], figures["words"]) == (num_bytes, num_words)
    assert figures["documents"] == len(documents)


def test_the_order_of_documents_and_batches_do_not_matter(
    model: LanguageModel,
    trained: Tokenizer,
    documents: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = evaluate_texts(model, trained, documents, "document", WINDOW)
    backwards = evaluate_texts(model, trained, documents[::-1], "document", WINDOW)
    monkeypatch.setattr(texts, "TOKENS_AT_ONCE", 1)
    one_by_one = evaluate_texts(model, trained, documents, "document", WINDOW)
    for other in (backwards, one_by_one):
        assert other.loss_sum == pytest.approx(found.loss_sum, rel=1e-6)
        assert (other.num_right, other.tokens) == (found.num_right, found.tokens)


@pytest.mark.parametrize("stride", [1, 5, None])
def test_sliding_against_every_token_by_itself(
    model: LanguageModel, trained: Tokenizer, documents: list[str], stride: int | None
) -> None:
    few = documents[:2]
    found = evaluate_texts(model, trained, few, "sliding", WINDOW, stride)
    ids, step = trained.encode("\n\n".join(few)), stride or WINDOW // 2
    nats, reached = 0.0, 1
    for begin in range(0, len(ids), step):
        end = min(begin + WINDOW, len(ids))
        nats += sum(by_itself(model, ids[begin:at], ids[at])[0] for at in range(reached, end))
        reached = end
    assert found.loss_sum == pytest.approx(nats, rel=1e-6)
    assert found.tokens == len(ids) - 1
    assert found.bytes == len("\n\n".join(few).encode()) - len(trained.decode(ids[:1]))


def transformers_llama(model: LanguageModel) -> Any:
    """Its own LLaMA with a full-rank model's weights."""
    transformers: ModuleType = pytest.importorskip("transformers")
    config = model.spec.config
    theirs: nn.Module = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
        )
    )
    missing, unknown = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert not unknown
    return theirs.eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers
def test_sliding_is_transformers_own_way(trained: Tokenizer, documents: list[str]) -> None:
    """The loop of its guide, word for word where it computes, on the same weights."""
    model = small(trained.vocab_size, linear="full")
    theirs = transformers_llama(model)
    text = "\n\n".join(documents)
    encodings = torch.tensor([trained.encode(text)])
    nll_sum, n_tokens, exact_sum, prev_end_loc = 0.0, 0, 0.0, 0
    for begin_loc in range(0, encodings.size(1), 5):
        end_loc = min(begin_loc + WINDOW, encodings.size(1))
        trg_len = end_loc - prev_end_loc
        input_ids = encodings[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            neg_log_likelihood = theirs(input_ids, labels=target_ids).loss
        num_valid_tokens = (target_ids != -100).sum().item()
        num_loss_tokens = num_valid_tokens - target_ids.size(0)
        nll_sum += neg_log_likelihood.item() * num_loss_tokens
        n_tokens += num_loss_tokens
        exact_sum += neg_log_likelihood.item() * int((target_ids[:, 1:] != -100).sum())
        prev_end_loc = end_loc
        if end_loc == encodings.size(1):
            break
    found = evaluate_texts(model, trained, documents, "sliding", WINDOW, 5)
    assert found.tokens == encodings.size(1) - 1
    assert found.loss_sum == pytest.approx(exact_sum, rel=1e-6)
    # The guide's own mean: a window after the first weighs 4/5 of its 5 tokens, all alike.
    assert n_tokens < found.tokens
    assert nll_sum / n_tokens == pytest.approx(found.loss_sum / found.tokens, rel=2e-2)


@needs_shared
@pytest.mark.parametrize("name", ["t5-tokenizer.json", "t5-base.spiece.model"])
def test_other_tokenizers(name: str, documents: list[str]) -> None:
    """Bytes and words are the text's, whatever the tokenizer; of an empty text there is nothing."""
    if name.endswith(".model"):
        pytest.importorskip("sentencepiece")
    made = tokenizer.load(str(TOKENIZERS / name))
    model = small(made.vocab_size)
    found = evaluate_texts(model, made, [*documents, "", "\n\n"], "document", WINDOW)
    assert found.bytes == sum(len(text.encode()) for text in documents)
    assert found.words == sum(len(re.split(r"\s+", text)) for text in documents)
    assert found.tokens == sum(len(made.encode(text)) for text in documents)
    assert found.documents == len(documents)


@pytest.mark.parametrize(
    ("protocol", "window", "stride", "word"),
    [
        ("document", 0, None, "--window is 0"),
        ("document", 8, 4, "--stride is of"),
        ("sliding", 1, None, "at least 2"),
        ("sliding", 8, 8, "below --window 8"),
        ("sliding", 8, 0, "--stride is 0"),
    ],
)
def test_windows_that_cannot_be(
    model: LanguageModel, trained: Tokenizer, protocol: Any, window: int, stride: Any, word: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(word)):
        evaluate_texts(model, trained, ["some text"], protocol, window, stride)


def test_a_corpus_without_a_target(model: LanguageModel, trained: Tokenizer) -> None:
    for protocol in ("document", "sliding"):
        with pytest.raises(ConfigError, match="no text"):
            evaluate_texts(model, trained, [""], protocol, WINDOW)
    with pytest.raises(ConfigError, match="no text"):
        evaluate_texts(model, trained, ["a"], "sliding", WINDOW)


def test_a_window_beyond_learned_positions(trained: Tokenizer) -> None:
    model = small(trained.vocab_size, architecture="gpt2")
    longest = model.max_length()
    assert longest is not None
    with pytest.raises(ConfigError, match=f"take {longest} or less"):
        evaluate_texts(model, trained, ["some text"], "document", longest + 1)


# Which texts


def test_of_another_corpus_all_but_what_it_trains_on(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(f"text for {name}\n")
    one = DataConfig(source=(str(tmp_path / "train.txt"),))
    both = DataConfig(source=(str(tmp_path),))
    read = functools.partial(texts_to_evaluate, held_out_alone=False)
    assert list(read(one)) == ["text for train\n"]
    assert list(read(both)) == ["text for valid\n"]


Call = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    from crnet.cli.app import main
    from test_cli import train_words

    folder = tmp_path_factory.mktemp("texts") / "run"
    with pytest.raises(SystemExit) as end:
        main(train_words(corpus, folder, train__steps="2"))
    assert not end.value.code
    return folder


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    from crnet.cli.app import main

    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *words, "--json"])
    out, err = capsys.readouterr()
    assert not end.value.code, err
    return json.loads(out)


@pytest.mark.slow
def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of its own corpus what was held out; of another one all of it, in the model's tokens."""
    own = printed(capsys, str(run), "--protocol", "document")
    rows = printed(capsys, str(run), "--data.rows", "document", "--data.sequence-length", "4096")
    # The same documents: in rows the first token is no target, and the end token is one.
    assert own["tokens"] == rows["val_tokens"]
    assert own["window"] == 16
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"Paragraph {n} of another text." for n in range(30)))
    words = [str(run), "--data.source", str(other)]
    found = printed(capsys, *words, "--protocol", "document")
    assert (found["documents"], found["bytes"]) == (
        30,
        sum(map(len, other.read_text().split("\n\n"))),
    )
    whole = printed(capsys, *words, "--protocol", "sliding", "--window", "32")
    assert whole["stride"] == 16
    assert 0 < len(other.read_bytes()) - whole["bytes"] < 10  # the first token's
    assert whole["perplexity"] == math.exp(whole["loss"])
    assert printed(capsys, *words)["val_tokens"] > 0
