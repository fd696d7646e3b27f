"""The loss of whole texts: every document by itself, or a corpus under a sliding window.

A text is cut into windows of at most so many input tokens; the last targets of each are scored,
those before them were scored in an earlier window and are context here. Windows are sorted by
length, filled up on the right (a causal model does not see what comes after) and read in batches.

    document  every token of every document, the first one after an end token; of a document longer
              than a window each token once, in windows that follow each other, the last of which
              takes all the context that fits. Source: lm-eval's ``loglikelihood_rolling``.
    sliding   the corpus as one text, documents joined by a blank line; windows start ``stride``
              tokens apart; the first token of all is not scored. Source: transformers' guide
              "Perplexity of fixed-length models". Deviation: a mean over tokens, while the guide
              weights every window after the first with one token too few.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from crnet.data.tokenizer import Tokenizer
from crnet.errors import ConfigError
from crnet.inference.evaluate import TOKENS_AT_ONCE, Precision, computing, exp
from crnet.kernels.loss import IGNORED
from crnet.model.language_model import LanguageModel

Protocol = Literal["document", "sliding"]
Key = TypeVar("Key")

BATCHES_SORTED = 64
"""So many batches' windows are sorted by length together."""
BETWEEN = "\n\n"
"""What joins documents under a sliding window."""


class Window(NamedTuple):
    """A row: inputs are all ids but the last, targets all but the first."""

    ids: Sequence[int]
    num_scored: int
    """Of the last targets."""


def document_windows(ids: Sequence[int], first_id: int, window: int) -> Iterator[Window]:
    """Windows in which every id is a target once.

    Args:
        ids: of one document; of an empty one there is no window.
        first_id: what stands before it: end-of-text.
        window: most input tokens, at least 1.
    """
    all_ids = [first_id, *ids]
    for start in range(0, len(ids), window):
        end = min(start + window, len(ids))
        yield Window(all_ids[max(0, end - window) : end + 1], end - start)


def sliding_windows(ids: Sequence[int], window: int, stride: int) -> Iterator[Window]:
    """Windows of ``window`` ids that start ``stride`` apart; every id but the first is a target
    once, in the first window that reaches it.

    Args:
        ids: of one text; of fewer than two there is no window.
        window: ids of a window, at least 2.
        stride: at least 1, at most ``window - 1``, so that every target has a token before it.
    """
    reached = 1
    for start in range(0, max(len(ids) - 1, 0), stride):
        end = min(start + window, len(ids))
        yield Window(ids[start:end], end - reached)
        reached = end
        if end == len(ids):
            return


def score(
    model: LanguageModel, windows: Iterable[tuple[Key, Window]], batch_size: int | None = None
) -> Iterator[tuple[Key, Tensor, Tensor]]:
    """Score the last targets of windows, in batches.

    Args:
        model: as ``evaluate.computing`` has it.
        windows: each with a key by which the caller knows it; read as it is needed.
        batch_size: most rows of a batch; None: as many as ``TOKENS_AT_ONCE`` has room for.
    Returns:
        Key, losses in nats and whether the target is the likeliest token, (num_scored,) each, on
        the CPU; by length within ``BATCHES_SORTED`` batches, not in the order given.
    Cost: a forward pass over the windows, filled up to the longest of each batch.
    """
    device = next(model.parameters()).device
    for batch in _batches(windows, batch_size):
        longest = max(len(window.ids) for _, window in batch) - 1
        tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORED)
        for row, (_, window) in enumerate(batch):
            ids = torch.tensor(window.ids)
            end = len(ids) - 1
            tokens[row, :end] = ids[:-1]
            start = end - window.num_scored
            targets[row, start:end] = ids[1 + start :]
        found = model.scores(tokens.to(device), targets.to(device))
        losses, likeliest = (each.cpu().view(targets.shape) for each in found[1:])
        for row, (key, window) in enumerate(batch):
            scored = slice(len(window.ids) - 1 - window.num_scored, len(window.ids) - 1)
            yield key, losses[row, scored], likeliest[row, scored]


def _batches(
    windows: Iterable[tuple[Key, Window]], batch_size: int | None
) -> Iterator[list[tuple[Key, Window]]]:
    """Windows of like length together, at most ``TOKENS_AT_ONCE`` input tokens but at least one."""
    windows, most = iter(windows), BATCHES_SORTED * TOKENS_AT_ONCE
    while pool := _taken(windows, most):
        pool.sort(key=lambda each: -len(each[1].ids))
        while pool:
            size = batch_size or max(1, TOKENS_AT_ONCE // max(len(pool[0][1].ids) - 1, 1))
            yield pool[:size]
            del pool[:size]


def _taken(windows: Iterator[tuple[Key, Window]], most_ids: int) -> list[tuple[Key, Window]]:
    found: list[tuple[Key, Window]] = []
    num_ids = 0
    for each in windows:
        found.append(each)
        num_ids += len(each[1].ids)
        if num_ids >= most_ids:
            break
    return found


@dataclass(frozen=True)
class TextEvaluation:
    """What an evaluation of texts found: sums, and the figures that follow."""

    loss_sum: float
    """Nats."""
    num_right: int
    """Targets that are the likeliest token."""
    tokens: int
    """Targets."""
    bytes: int
    """UTF-8 length of the text that they stand for."""
    words: int
    """As lm-eval counts them: pieces between runs of white space, of the whole text."""
    documents: int
    """With a target."""

    @property
    def loss(self) -> float:
        """Nats, a mean over tokens."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """A token."""
        return exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        return exp(self.loss_sum / self.words)

    @property
    def bits_per_byte(self) -> float:
        return self.loss_sum / math.log(2) / self.bytes

    @property
    def accuracy(self) -> float:
        """Share of targets that are the likeliest token."""
        return self.num_right / self.tokens

    def figures(self) -> dict[str, Any]:
        """For the terminal and ``--json``."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "word_perplexity": self.word_perplexity,
            "accuracy": self.accuracy,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
            "documents": self.documents,
        }


def evaluate_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    protocol: Protocol,
    window: int,
    stride: int | None = None,
    precision: Precision = "fp32",
) -> TextEvaluation:
    """Evaluate a model on texts.

    Args:
        model: on any device.
        tokenizer: the one that it was trained with.
        texts: the documents; read once. One that gives no id is left out.
        protocol: ``document`` or ``sliding``.
        window: most input tokens (document), ids of a window (sliding).
        stride: of sliding; None: half a window.
        precision: of products, as in ``evaluate.evaluate_unless``.
    Raises:
        ConfigError: window or stride is out of range, or no text has a target.
    Cost: one forward pass over every window. Of sliding, the whole text and its ids in memory.
    """
    stride = check_windows(model, protocol, window, stride)
    sizes = _Sizes()
    if protocol == "document":
        first = tokenizer.eos_id
        windows = (
            (None, each)
            for ids in sizes.counted(tokenizer, texts)
            for each in document_windows(ids, first, window)
        )
    else:
        windows = ((None, each) for each in _sliding(tokenizer, texts, window, stride, sizes))
    loss_sum, num_right, num_tokens = 0.0, 0, 0
    was_training = model.training
    model.eval()
    try:
        with computing(model, next(model.parameters()).device, precision):
            for _, losses, likeliest in score(model, windows):
                loss_sum += losses.double().sum().item()
                num_right += int(likeliest.sum())
                num_tokens += len(losses)
    finally:
        model.train(was_training)
    if not num_tokens:
        raise ConfigError(
            "no text of the corpus has a token to predict; name another --data.source"
        )
    return TextEvaluation(
        loss_sum, num_right, num_tokens, sizes.bytes, sizes.words, sizes.documents
    )


def check_windows(model: LanguageModel, protocol: Protocol, window: int, stride: int | None) -> int:
    """The stride. Raises ``ConfigError`` where windows cannot be cut so, or are too long."""
    least = 2 if protocol == "sliding" else 1
    longest = model.max_length()
    if window < least:
        raise ConfigError(f"--window is {window}; it must be at least {least}")
    if longest is not None and window > longest:
        raise ConfigError(
            f"--window {window} is more than the {longest} positions of the model; take {longest} "
            "or less"
        )
    if protocol == "document" and stride is not None:
        raise ConfigError("--stride is of --protocol sliding; leave it out")
    if stride is not None and not 1 <= stride < window:
        raise ConfigError(
            f"--stride is {stride}; it must lie in [1, {window - 1}], below --window {window}"
        )
    return stride or max(1, window // 2)


class _Sizes:
    """Bytes, words and number of the texts that have been read."""

    def __init__(self) -> None:
        self.bytes, self.words, self.documents = 0, 0, 0

    def add(self, text: str) -> None:
        self.bytes += len(text.encode())
        self.words += len(re.split(r"\s+", text))
        self.documents += 1

    def counted(self, tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
        """The ids of each text that has some, a batch of texts at a time."""
        texts = iter(texts)
        while batch := list(itertools.islice(texts, 256)):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                if len(ids):
                    self.add(text)
                    yield ids.tolist()


def _sliding(
    tokenizer: Tokenizer, texts: Iterable[str], window: int, stride: int, sizes: _Sizes
) -> Iterator[Window]:
    """Windows over all texts, joined; the first token's bytes are not scored."""
    documents = list(texts)
    text = BETWEEN.join(documents)
    ids, lengths = tokenizer.encode_measured([text])[0]
    if len(ids) > 1:
        sizes.add(text)
        sizes.bytes -= int(lengths[0])
        sizes.documents = len(documents)
    yield from sliding_windows(ids.tolist(), window, stride)
