"""Text from a trained model: the next token's probabilities, a draw from them, and the loop.

The draw is made on the CPU, in fp64, from a generator of its own: a seed means the same text on
every device, with the key/value cache or without, as far as rounding leaves the logits alike.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crnet.data.chat import Chat, stop_ids
from crnet.data.tokenizer import Tokenizer
from crnet.errors import ConfigError
from crnet.inference.sampling import Sampling, sampling_problems
from crnet.layers.cache import LayerCache
from crnet.model.language_model import LanguageModel
from crnet.model.seeds import generator_of

NUCLEUS = 1024
"""Tokens that top-p looks at before it looks at all: a trained model's nucleus is smaller."""
_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"


def filter_logits(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities from which the next token is drawn.

    Temperature first, then top-k, then top-p over what top-k left. Of equally likely tokens the
    lower id comes first, as in ``argmax``.

    Args:
        logits_V: any floating dtype and device. Not modified.
        sampling: its temperature, top_k and top_p; the rest does not matter here.
    Returns:
        (V,), fp64, on the CPU; they sum to 1, and tokens not to be chosen have exactly 0.
    Raises:
        ConfigError: a logit is infinite or not a number.
    Cost: a few passes over V numbers, and one sort of those that top-k or top-p can keep.
    Source: top-p: Holtzman et al. 2020 (arXiv:1904.09751), section 3.1.
    """
    logits = _on_cpu(logits_V)
    # Shifted before it is divided: no temperature, however small, can make inf - inf of it.
    logits = (logits - logits.max()) / sampling.temperature
    # A top-p of 1 is everything, by definition: rounded sums must not cut the tail off.
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    if sampling.top_k is None and top_p == 1:
        return logits.softmax(0)
    if sampling.top_k is None:
        kept, order = _holding(logits.softmax(0), top_p)
    else:
        kept, order = _largest(logits, sampling.top_k)
        kept = kept.softmax(0)
    if top_p < 1:
        num_kept = 1 + int((kept.cumsum(0) < top_p).sum())
        kept = kept[:num_kept] / kept[:num_kept].sum()
    return torch.zeros_like(logits).index_copy_(0, order[: len(kept)], kept)


def _largest(values_V: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest numbers, falling, and their ids; of equal ones the lower id first.

    A whole stable sort says the same and takes ten times as long: only what reaches the least of
    the largest is sorted.
    """
    if count >= len(values_V):
        return values_V.sort(descending=True, stable=True)
    least = values_V.topk(count).values[-1]
    ids = (values_V >= least).nonzero().flatten()
    falling, order = values_V[ids].sort(descending=True, stable=True)
    return falling[:count], ids[order[:count]]


def _holding(probabilities_V: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The largest probabilities, falling, with their ids: at least as many as hold ``share``."""
    kept, order = _largest(probabilities_V, NUCLEUS)
    if kept.sum() >= share:
        return kept, order
    return _largest(probabilities_V, len(probabilities_V))


def draw(probabilities_V: Tensor, generator: torch.Generator) -> int:
    """Return an id, drawn with its probability.

    Every id runs an exponential race: the first of the times -log(u) / p wins. Refused: looking u
    up in the summed probabilities, where a rounding error in one probability moves the borders of
    all later ids; ``torch.multinomial``, whose random numbers depend on how torch was built.

    Args:
        probabilities_V: fp64, on the CPU; need not sum to 1.
        generator: on the CPU; V numbers are taken from it, whatever the probabilities.
    """
    uniform_V = torch.rand(len(probabilities_V), dtype=torch.float64, generator=generator)
    possible = probabilities_V.nonzero().flatten()
    if len(possible) == len(probabilities_V):
        return int((probabilities_V / -uniform_V.log()).argmax())
    return int(possible[(probabilities_V[possible] / -uniform_V[possible].log()).argmax()])


def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    eos_id: int,
    num_ids: int | None = None,
    stops: Collection[int] = (),
) -> Iterator[int]:
    """Continue a prompt, one id at a time.

    Args:
        model: on any device, in any dtype. Its parts are in eval mode while it computes, and back
            in their own mode whenever an id is handed out.
        prompt_ids: an empty one starts a new text, after an end-of-text token.
        sampling: how to choose, and when to stop.
        eos_id: end-of-text. Where it stops the text it is not handed out.
        num_ids: only ids below it are chosen (None: all): a model can have more rows in its
            embedding than the tokenizer has entries.
        stops: ids that end the text as ``eos_id`` does.
    Returns:
        At most ``max_tokens`` ids. Nothing is computed before the first is asked for.
    Raises:
        ConfigError: at the call; every problem of the options and of the prompt at once.
        ConfigError: while running; a logit is infinite or not a number.
    Cost: with the cache one pass over the prompt, then one token a pass, and the cache's memory
        for the prompt and ``max_tokens``; without it a pass over everything so far for each token.
    """
    problems = sampling_problems(sampling)
    vocab_size = model.spec.shape.vocab_size
    limit = vocab_size if num_ids is None else min(num_ids, vocab_size)
    if not 0 <= eos_id < limit:
        problems.append(f"the end-of-text id is {eos_id}, but ids lie in [0, {limit})")
    outside = [token for token in prompt_ids if not 0 <= token < limit]
    if outside:
        problems.append(
            f"the prompt has id {outside[0]}, but ids lie in [0, {limit}); encode it with the "
            "tokenizer that the model was trained with"
        )
    ids = list(prompt_ids) or [eos_id]
    longest = model.max_length()
    if longest is not None and len(ids) + sampling.max_tokens > longest:
        problems.append(
            f"a prompt of {len(ids)} tokens and --max-tokens {sampling.max_tokens} are more than "
            f"the {longest} positions of the model; "
            + (
                f"take --max-tokens {longest - len(ids)} or less"
                if len(ids) < longest
                else f"shorten the prompt to {longest - 1} tokens or less"
            )
        )
    if problems:
        raise ConfigError(problems)
    return _generate(model, ids, sampling, {eos_id, *stops}, limit)


def _generate(
    model: LanguageModel, ids: list[int], sampling: Sampling, stops: set[int], limit: int
) -> Iterator[int]:
    generator = generator_of(sampling.seed, "sampling")
    # The last id is never read, so it needs no room.
    capacity = len(ids) + sampling.max_tokens - 1
    caches = model.new_caches(capacity) if sampling.use_cache else None
    modules = list(model.modules())
    unread = ids
    for _ in range(sampling.max_tokens):
        logits_V = _last_logits(model, modules, unread, caches)[:limit]
        if sampling.greedy:
            token = _likeliest(logits_V)
        else:
            token = draw(filter_logits(logits_V, sampling), generator)
        if token in stops and sampling.stop_at_end:
            return
        yield token
        unread = [token] if caches else [*unread, token]


# Not inference_mode: the rotary tables are kept between calls, and a table made in inference mode
# could not be saved for backward when training goes on. The scope is one pass, because a block
# around a yield would also switch gradients off for whoever asked for the token.
@torch.no_grad()
def _last_logits(
    model: LanguageModel,
    modules: Sequence[nn.Module],
    unread: Sequence[int],
    caches: Sequence[LayerCache] | None,
) -> Tensor:
    device = next(model.parameters()).device
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        return model.logits(torch.tensor([unread], device=device), caches, last_only=True)[0, -1]
    finally:
        for module in training:
            module.training = True


def _on_cpu(logits_V: Tensor) -> Tensor:
    logits = logits_V.detach().to("cpu").to(torch.float64)  # copied as narrow as they are
    _check_finite(bool(logits.isfinite().all()))
    return logits


def _likeliest(logits_V: Tensor) -> int:
    """The id of the largest logit, the lowest of several, found where the logits are."""
    found = torch.stack((logits_V.argmax(), logits_V.isfinite().all()))
    token, are_finite = found.tolist()  # one wait for the device
    _check_finite(bool(are_finite))
    return token


def _check_finite(are_finite: bool) -> None:
    if not are_finite:
        raise ConfigError(
            "the model's logits are not finite, so no next token can be chosen; its weights are "
            "broken or overflow in their dtype: take an earlier checkpoint or a wider dtype"
        )


Prompt = str | Sequence[Mapping[str, Any]]
"""A text to continue, or messages (``role``, ``content``) to answer."""


def complete(
    model: LanguageModel, tokenizer: Tokenizer, prompt: Prompt, sampling: Sampling
) -> Iterator[str]:
    """Continue a prompt, or answer messages, a piece of text at a time.

    A token may hold a part of a character; text is handed out once later tokens cannot change it.

    Args:
        model: see ``generate``.
        tokenizer: the one that the model was trained with.
        prompt: a text may be empty; messages go through the tokenizer's chat template, and an
            answer ends where its turn does.
        sampling: how to choose, and when to stop.
    Returns:
        Pieces, none empty; joined they are what decoding adds to the decoded prompt.
    Raises:
        ConfigError: at the call, as ``generate`` and ``data.chat.Chat``; or the prompt is no text.
    Cost: besides ``generate``, decodes everything so far after each token, since what a token
        spells can depend on the ones before it.
    """
    texts = [prompt] if isinstance(prompt, str) else [str(each.get("content")) for each in prompt]
    try:
        "\n".join(texts).encode()
    except UnicodeEncodeError as error:  # how Python hands over an argument that is not UTF-8
        raise ConfigError(
            f"the prompt is not valid text at character {error.start + 1}; give it in UTF-8"
        ) from error
    if isinstance(prompt, str):
        prompt_ids, stops = tokenizer.encode(prompt), ()
    else:
        prompt_ids, stops = Chat(tokenizer).prompt(prompt, "the prompt"), stop_ids(tokenizer)
    size, eos_id = tokenizer.vocab_size, tokenizer.eos_id
    tokens = generate(model, prompt_ids, sampling, eos_id, size, stops)
    return _pieces(tokenizer, prompt_ids or [eos_id], tokens)


def _pieces(tokenizer: Tokenizer, ids: list[int], tokens: Iterator[int]) -> Iterator[str]:
    ids = list(ids)
    text = tokenizer.decode(ids)
    num_given = len(text)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        num_stable = len(text.rstrip(_UNDECODABLE))
        if num_stable > num_given:
            yield text[num_given:num_stable]
            num_given = num_stable
    if len(text) > num_given:
        yield text[num_given:]
