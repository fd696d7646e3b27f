"""Conversations as ids: what a chat template writes, and which of the ids are answers.

Text is text: what somebody says never becomes a special token, and what the template writes does.
Both are decided on one string. Where a message spells a special token, a mark goes in front of it;
in the rendered text, special tokens without a mark are then given names that no text has, known to
a copy of the tokenizer alone, and the marks are dropped. So the whole text is encoded at once, to
the ids that it has in transformers where nobody spells a special token. Refused: encoding piece by
piece, which changes ids at the borders of the pieces.

Which ids are answers follows from ``{% generation %}`` blocks where the template has them; else the
conversation is rendered up to every answer, and with it, and has to begin with both.

Answers and names stand between noncharacters, which Unicode keeps for a program's own use; a text
that holds one of these four is refused.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from crnet.data.conversations import ASSISTANT, Conversation, is_trained
from crnet.data.templates import BUILT_IN, NEEDED_TOKENS
from crnet.data.tokenizer import Tokenizer
from crnet.errors import ConfigError

_AS_TEXT = f"#{secrets.randbelow(10**20):020}#"
"""In front of what is text. Digits, which survive whatever a template does to what it prints (repr,
JSON, upper case), and drawn anew by every process, so that no text can hold them."""
_BEGIN, _END, _NAME, _NAME_END = map(chr, range(0xFDD0, 0xFDD4))
_SIGNS = re.compile("[\ufdd0-\ufdd3]")

_IS_NAME = re.compile(r"\W.*\w.*\W", re.DOTALL)
"""What a token looks like that is no word, no sign and no run of blanks: <think>, [INST]."""

_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError),
)
_MEND = (
    "mend the record, or name a template that takes it (--data.chat-template; chatml and plain "
    "take every conversation of texts)"
)


class Encoded(NamedTuple):
    """A document of a corpus."""

    ids: np.ndarray
    """uint32, the last one an end token."""
    text_bytes: int
    """UTF-8 length of the text; special tokens of a chat template stand for no byte."""
    lengths: np.ndarray | None
    """int64: how many of these bytes each id stands for; None: nobody asks."""
    counts: np.ndarray | None
    """uint8: 1 where an id is to be learnt; None: all are."""


class Chat:
    """A tokenizer and its chat template."""

    def __init__(self, tokenizer: Tokenizer, loss: Literal["answers", "all"] = "answers"):
        """Compile the template.

        Raises:
            ConfigError: the tokenizer has no template or is a SentencePiece model, or the template
                cannot be read or names tokens that are not there.
        Cost: opens the tokenizer once more, up to a second.
        """
        content, text = tokenizer.json_content(), tokenizer.chat_template
        if content is None:
            raise ConfigError(
                "a chat template needs a tokenizer.json, and this tokenizer is a SentencePiece "
                "model; transformers writes one: AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(...)"
            )
        if text is None:
            raise ConfigError(
                "the tokenizer has no chat template: nothing says how a conversation is written; "
                "train on conversations first (crnet finetune, --data.chat auto)"
            )
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template cannot be read: {error}; mend it") from error
        self._tokenizer, self._loss = tokenizer, loss
        self._has_blocks = re.search(r"{%[-+]?\s*generation\s*[-+]?%}", text) is not None
        described = json.loads(content)
        every = {each["content"]: each for each in described["added_tokens"]}
        specials = [each for each in every if each and every[each]["special"]]
        written = [each for each in every if each in text and _IS_NAME.fullmatch(each)]
        names = dict.fromkeys([*specials, *written])
        _check_tokens(text, every)
        self.controls = {name: int(every[name]["id"]) for name in names}
        """Ids of the special tokens, and of what else the template writes that is one token."""
        self._library = _with_names(described, self.controls)
        self._marking = {True: _Marking(specials), False: _Marking([*names])}
        # ``_finds``: a mark, or a token that has none in front of it.
        self._finds = re.compile(f"{_SIGNS.pattern}|{_AS_TEXT}|(?<!{_AS_TEXT}){_any_of([*names])}")

    def encode(self, conversations: Sequence[tuple[Conversation, str]]) -> list[Encoded]:
        """Return conversations as documents.

        Args:
            conversations: each with where it comes from, for messages.
        Raises:
            ConfigError: the template refuses one, one has no answer that counts, what is before an
                answer cannot be told from it, or a text holds a noncharacter of ours.
        Cost: renders each once, without ``{% generation %}`` two times more an answer.
        """
        marked = [self._marked(each, origin) for each, origin in conversations]
        spelled = [self._spelled(each) for each in marked]
        found = self._library.encode_batch(
            [each.text for each in spelled], add_special_tokens=False
        )
        made = [self._encoded(*pair) for pair in zip(spelled, found, strict=True)]
        for (_, origin), each in zip(conversations, made, strict=True):
            if each.counts is not None and not each.counts.any():
                raise ConfigError(
                    f"{origin}: has no answer of the {ASSISTANT}, so that no token of it would be "
                    "trained on; take the record out, or say --data.chat-loss all"
                )
        return made

    def prompt(self, messages: Sequence[Mapping[str, Any]], origin: str) -> list[int]:
        """Return the ids after which the assistant is to answer.

        Args:
            messages: ``role`` and ``content`` each.
            origin: what they come from, the beginning of a message.
        Raises:
            ConfigError: the template refuses them, or a text holds a noncharacter of ours.
        """
        marked = self._rendered({"messages": list(messages)}, origin, ask=True)
        text = self._spelled(marked).text
        return self._library.encode(text, add_special_tokens=False).ids

    # A conversation -> one text with marks

    def _rendered(self, conversation: Conversation, origin: str, *, ask: bool = False) -> str:
        """What the template writes; ``ask``: and what is in front of the next answer."""
        messages = [
            {key: value for key, value in each.items() if key != "weight"}
            for each in conversation["messages"]
        ]
        given = {
            "messages": [self._as_text(each, each.get("role"), origin) for each in messages],
            "tools": self._as_text(conversation.get("tools"), None, origin),
            "documents": None,
            "add_generation_prompt": ask,
            **self._tokenizer.token_texts,
        }
        try:
            return self._template.render(**given)
        except _TEMPLATE_ERRORS as error:
            raise ConfigError(
                f"{origin}: the chat template refuses the conversation ({error}); {_MEND}"
            ) from error

    def _as_text(self, value: Any, role: str | None, origin: str) -> Any:
        """A value of JSON with a mark in front of every special token that it spells, and of what
        one could begin with at its end. Other tokens of the template are marked too, but for what
        the assistant says."""
        if isinstance(value, dict):
            return {
                self._as_text(key, role, origin): self._as_text(each, role, origin)
                for key, each in value.items()
            }
        if isinstance(value, list):
            return [self._as_text(each, role, origin) for each in value]
        if not isinstance(value, str):
            return value
        if found := _SIGNS.search(value):
            raise ConfigError(
                f"{origin}: character {found.start()} of {value[:20]!a} is the noncharacter "
                f"{found[0]!a}, which no text should hold; take it out"
            )
        return self._marking[role == ASSISTANT].mark(value)

    def _marked(self, conversation: Conversation, origin: str) -> str:
        """The rendered text, with marks around the answers that count."""
        rendered = self._rendered(conversation, origin)
        messages = conversation["messages"]
        if self._loss == "all":
            return rendered
        if not self._has_blocks:
            return self._with_answers(rendered, conversation, origin)
        answers = [is_trained(each) for each in messages if each["role"] == ASSISTANT]
        if all(answers):
            return rendered
        if rendered.count(_BEGIN) != len(answers):
            raise ConfigError(
                f"{origin}: not every answer is to be trained on, and the chat template has not "
                f"one generation block an answer; {_MEND}"
            )
        kept = iter(answers)
        return re.sub(
            f"{_BEGIN}(.*?){_END}",
            lambda block: block[0] if next(kept) else block[1],
            rendered,
            flags=re.DOTALL,
        )

    def _with_answers(self, rendered: str, conversation: Conversation, origin: str) -> str:
        """Marks around answers that are found by rendering what comes before each, and with it."""
        pieces, done = [], 0
        messages = conversation["messages"]
        for idx, message in enumerate(messages):
            if not is_trained(message):
                continue
            upto = {**conversation, "messages": messages[:idx]}
            before = self._rendered(upto, origin, ask=True)
            after = self._rendered({**upto, "messages": messages[: idx + 1]}, origin)
            if not (after.startswith(before) and rendered.startswith(after)):
                raise ConfigError(
                    f"{origin}: where answer {idx} begins and ends does not follow from the chat "
                    "template: what it writes of the messages up to there is not how the whole "
                    "conversation begins; put {% generation %} and {% endgeneration %} around what "
                    "the assistant says in it (--data.chat-template FILE.jinja), or say "
                    "--data.chat-loss all"
                )
            start, end = len(before), self._end_of(after)
            pieces += [rendered[done:start], _BEGIN, rendered[start:end], _END]
            done = end
        return "".join([*pieces, rendered[done:]])

    def _end_of(self, text: str) -> int:
        """Where an answer ends: blanks behind its last special token are not the assistant's."""
        shorter = text.rstrip()
        return len(shorter) if shorter.endswith(tuple(self.controls)) else len(text)

    # One text with marks -> ids

    def _spelled(self, marked: str) -> _Spelled:
        """Names in the place of special tokens, and what each character is."""
        text: list[str] = []
        weights: list[np.ndarray] = []
        answers: list[np.ndarray] = []
        is_answer = False
        for piece, is_token in self._pieces(marked):
            if piece in (_BEGIN, _END):
                is_answer = piece == _BEGIN
            elif piece != _AS_TEXT:
                written = _name_of(self.controls[piece]) if is_token else piece
                text.append(written)
                weights.append(np.zeros(len(written), np.int64) if is_token else _bytes_of(piece))
                answers.append(np.full(len(written), is_answer))
        return _Spelled("".join(text), _summed(weights), _summed(answers))

    def _pieces(self, marked: str) -> Iterator[tuple[str, bool]]:
        """Texts, marks and special tokens; whether it is one of these."""
        done = 0
        for found in self._finds.finditer(marked):
            if found.start() > done:
                yield marked[done : found.start()], False
            yield found[0], found[0] in self.controls
            done = found.end()
        if done < len(marked):
            yield marked[done:], False

    def _encoded(self, spelled: _Spelled, found: Any) -> Encoded:
        ids = np.array(found.ids, np.uint32)
        spans = np.array(found.offsets, np.int64).reshape(-1, 2)
        ends = np.maximum.accumulate(spans[:, 1])
        lengths = np.diff(spelled.bytes_before[ends], prepend=0)
        size = int(spelled.bytes_before[-1])
        counts = (np.diff(spelled.answers_before[spans], axis=1)[:, 0] > 0).astype(np.uint8)
        rest = size - int(lengths.sum())
        if len(ids) and ids[-1] == self._tokenizer.eos_id:
            lengths[-1] += rest
        else:  # learnt where it is what ends an answer
            ends = bool(counts[-1:].any()) and int(ids[-1]) not in self.controls.values()
            ids = np.append(ids, np.uint32(self._tokenizer.eos_id))
            lengths = np.append(lengths, rest)
            counts = np.append(counts, np.uint8(ends))
        return Encoded(ids, size, lengths, None if self._loss == "all" else counts)


@functools.lru_cache(maxsize=4)
def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids at which a text of the assistant is at its end: the end token, and the special token
    behind an answer where the chat template writes another one.

    Cost: as ``Chat``, once a tokenizer.
    """
    found = [tokenizer.eos_id]
    if tokenizer.chat_template is not None and tokenizer.json_content() is not None:
        messages = [{"role": role, "content": "a"} for role in ("user", ASSISTANT)]
        try:
            chat = Chat(tokenizer)
            (made,) = chat.encode([({"messages": messages}, "")])
        except ConfigError:  # it wants other conversations than this one
            return (tokenizer.eos_id,)
        assert made.counts is not None
        last = int(made.ids[made.counts.nonzero()[0][-1]])
        found += [last] if last in chat.controls.values() and last not in found else []
    return tuple(found)


class _Marking:
    """Puts a mark in front of every token that a text spells, and of what could be the beginning of
    one at its end: the template may write on there."""

    def __init__(self, names: Sequence[str]):
        self._finds = re.compile(_any_of(names))
        self._begun = {name[:size] for name in names for size in range(1, len(name))}
        self._longest = max(map(len, self._begun), default=0)

    def mark(self, text: str) -> str:
        """Return the text with its marks."""
        places, found = set(), self._finds.search(text)
        while found:  # one by one: a token may begin within another
            places.add(found.start())
            found = self._finds.search(text, found.start() + 1)
        shorter = text.rstrip()
        for size in range(1, min(len(shorter), self._longest) + 1):
            if shorter[-size:] in self._begun:
                places.add(len(shorter) - size)
        cuts = [0, *sorted(places), len(text)]
        return _AS_TEXT.join(text[i:j] for i, j in itertools.pairwise(cuts))


class _Spelled(NamedTuple):
    """A text for the copy of the tokenizer."""

    text: str
    bytes_before: np.ndarray
    """int64: bytes of what was written in front of each character, and at the end."""
    answers_before: np.ndarray
    """The same for characters of answers."""


def _bytes_of(text: str) -> np.ndarray:
    """UTF-8 bytes of every character."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)


def _summed(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *pieces]))])


def _any_of(names: Sequence[str]) -> str:
    """A pattern of the longest of some names; of none where there are none."""
    longest_first = sorted(names, key=len, reverse=True)
    if not longest_first:
        return "(?!)"
    begins = "".join(re.escape(each) for each in sorted({name[0] for name in names}))
    # The look at one character spares most places the look at every name.
    return f"(?=[{begins}])(?:{'|'.join(map(re.escape, longest_first))})"


def _name_of(token_id: int) -> str:
    return f"{_NAME}{token_id}{_NAME_END}"


def _with_names(described: dict[str, Any], ids: Mapping[str, int]) -> Any:
    """A copy of a tokenizer in which tokens have names that no text has.

    Args:
        described: its tokenizer.json; altered.
        ids: of the tokens, by what they are called now.
    Raises:
        ConfigError: it cannot be made.
    """
    model = described["model"]
    for token in described["added_tokens"]:
        if token["content"] in ids:
            name = _name_of(token["id"])
            token |= {"content": name, "normalized": False, "single_word": False, "special": True}
    names = {content: _name_of(token_id) for content, token_id in ids.items()}
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    described |= {"post_processor": None, "truncation": None, "padding": None}
    try:
        made: Any = tokenizers.Tokenizer.from_buffer(json.dumps(described).encode())
    except ValueError as error:
        raise ConfigError(f"the tokenizer cannot be used for conversations ({error})") from error
    wrong = [
        content
        for content, token_id in ids.items()
        if made.encode(names[content], add_special_tokens=False).ids != [token_id]
    ]
    if wrong:
        raise ConfigError(
            f"the tokenizer cannot be used for conversations: {wrong[0]} and its id do not belong "
            "together; write the tokenizer.json again with the library that made it"
        )
    return made


def _check_tokens(text: str, every: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` where a built-in template is made of tokens that are not there."""
    for name, needed in NEEDED_TOKENS.items():
        missing = [each for each in needed if each not in every]
        if text == BUILT_IN[name] and missing:
            raise ConfigError(
                f"--data.chat-template {name}: the tokenizer has no token {' or '.join(missing)}; "
                "say --data.chat-template plain, or add them to it"
            )


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``: marks around what is inside."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        """Return the block's body between two marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (_BEGIN, _END)
        )
        return [begin, *body, end]


def _environment() -> ImmutableSandboxedEnvironment:
    """Where templates run: what transformers offers them, but no clock, so that the ids of a corpus
    do not depend on the day."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> str:
    raise jinja2.TemplateError(message)
