"""A record of a chat data set, in one of the usual layouts, as a conversation.

    messages            {"messages": [{"role": "user", "content": "..."}, ...]}        OpenAI
    sharegpt            {"conversations": [{"from": "human", "value": "..."}, ...]}    ShareGPT
    alpaca              {"instruction": "...", "input": "...", "output": "..."}        Alpaca
    prompt-completion   {"prompt": "...", "completion": "..."}, or a list of messages each

A conversation is messages with a role and a content each, and perhaps tools: what chat templates
are written for. It travels as one JSON text, so that everything that a corpus of texts has (sides
by hash, limits, origins) goes for conversations too. Other fields of a message (tool_calls, name,
reasoning_content, ...) are handed to the template as they are; other fields of a record are not
read. ``"weight": 0`` on an answer, OpenAI's word, says that it is not to be trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from crnet.config.sections import ChatLayout
from crnet.errors import ConfigError

ASSISTANT = "assistant"
ROLES = {
    **{role: role for role in ("system", "developer", "user", ASSISTANT, "tool")},
    "human": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "observation": "tool",
    "function": "tool",
}
"""What records call who speaks -> what chat templates do."""

Conversation = dict[str, Any]
"""``messages``: a list of objects with ``role`` and ``content``; ``tools``, where there are any."""


@dataclass(frozen=True)
class _Layout:
    needed: tuple[str, ...]
    optional: tuple[str, ...]


LAYOUTS = {
    "messages": _Layout(("messages",), ("tools",)),
    "sharegpt": _Layout(("conversations",), ("system", "tools")),
    "alpaca": _Layout(("instruction", "output"), ("input", "system")),
    "prompt-completion": _Layout(("prompt", "completion"), ("tools",)),
}
"""In the order in which a record's keys are looked at."""


def layout_of(fields: Iterable[str]) -> str | None:
    """The layout that a record with these fields has; None: none that is known."""
    found = set(fields)
    return next((name for name, each in LAYOUTS.items() if found.issuperset(each.needed)), None)


class ChatReader:
    """Finds a record's conversation; in which layout it is is settled by the first record."""

    def __init__(self, layout: ChatLayout):
        """Take ``data.chat``."""
        self._name: str | None = None if layout == "auto" else layout

    def text_of(self, record: Any, where: str) -> str:
        """Return the conversation of a record as JSON (``conversation_of``).

        Args:
            record: of any type.
            where: the beginning of a message.
        Raises:
            ConfigError: it is no conversation in that layout; the message names the field.
        """
        if not isinstance(record, dict):
            raise ConfigError(
                f"{where}: a record is an object such as {_example('messages')}; this is a "
                f"{type(record).__name__}"
            )
        self.settle(record, where)
        assert self._name is not None
        missing = [key for key in LAYOUTS[self._name].needed if record.get(key) is None]
        if missing:
            raise ConfigError(
                f"{where}: the field {missing[0]!r} is missing, which --data.chat {self._name} "
                f"needs; found are {_names(record)}; wanted is {_example(self._name)}"
            )
        messages = _MESSAGES[self._name](record, where)
        if not messages:
            raise ConfigError(f"{where}: holds no message; take the record out")
        found: Conversation = {"messages": messages}
        if "tools" in LAYOUTS[self._name].optional and record.get("tools"):
            found["tools"] = record["tools"]
        return json.dumps(found, ensure_ascii=False)

    def settle(self, fields: Iterable[str], where: str) -> list[str]:
        """Return the names of the fields that are read, found among ``fields`` at the first call.

        Raises:
            ConfigError: they are of no layout that is known.
        """
        if self._name is None:
            self._name = layout_of(fields)
        if self._name is None:
            known = "; ".join(f"{name}: {', '.join(LAYOUTS[name].needed)}" for name in LAYOUTS)
            raise ConfigError(
                f"{where}: the fields {_names(fields)} are those of no conversation ({known}); "
                "rename them, or leave --data.chat out where records are texts"
            )
        layout = LAYOUTS[self._name]
        return [*layout.needed, *layout.optional]


def conversation_of(text: str) -> Conversation:
    """Inverse of ``ChatReader.text_of``."""
    return json.loads(text)


def contents_of(text: str) -> str:
    """What is said in a conversation, message after message: text to train a tokenizer on."""
    contents = (message["content"] for message in conversation_of(text)["messages"])
    return "\n".join(each for each in contents if each)


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether a message is an answer that counts."""
    return message["role"] == ASSISTANT and message.get("weight", 1) != 0


# Layouts -> messages


def _listed(record: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    found = record[key]
    if not isinstance(found, list):
        raise ConfigError(
            f"{where}: {key!r} is a {type(found).__name__}; wanted is a list of messages, such as "
            '[{"role": "user", "content": "..."}]'
        )
    return [_message(each, f"{where}: {key}[{idx}]") for idx, each in enumerate(found)]


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message under the names of OpenAI, from those or from ShareGPT's."""
    if not isinstance(message, dict):
        raise ConfigError(
            f"{where} is a {type(message).__name__}; a message is an object with a role and a "
            "content"
        )
    named = ("from", "value") if "from" in message else ("role", "content")
    role, content = (message.get(key) for key in named)
    if not isinstance(role, str) or role not in ROLES:
        raise ConfigError(
            f"{where}: {named[0]!r} is {role!r}; known are {', '.join(ROLES)}; rename it"
        )
    others = {key: value for key, value in message.items() if value is not None}
    for key in named:
        others.pop(key, None)
    if not isinstance(content, str) and not (content is None and "tool_calls" in others):
        problem = "is missing" if content is None else f"is a {type(content).__name__}"
        raise ConfigError(
            f"{where}: {named[1]!r} {problem}; found are {_names(message)}; write what is said as "
            "one text"
        )
    if others.get("weight", 1) not in (0, 1):
        raise ConfigError(f"{where}: 'weight' is {others['weight']!r}; it is 0 or 1")
    return {"role": ROLES[role], "content": content, **others}


def _text(record: dict[str, Any], key: str, where: str) -> str:
    """A field's text; empty where there is none."""
    found = record.get(key)
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"{where}: {key!r} is a {type(found).__name__}; wanted is a text")
    return found or ""


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _system(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The message that a field ``system`` stands for."""
    text = _text(record, "system", where)
    return [_said("system", text)] if text else []


def _openai(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    return _listed(record, "messages", where)


def _sharegpt(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    return [*_system(record, where), *_listed(record, "conversations", where)]


def _alpaca(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    asked = [_text(record, key, where) for key in ("instruction", "input")]
    question = _said("user", "\n\n".join(each for each in asked if each))
    return [*_system(record, where), question, _said(ASSISTANT, _text(record, "output", where))]


def _completed(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The answers of a prompt are not trained on."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [_said("user", prompt), _said(ASSISTANT, completion)]
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ConfigError(
            f"{where}: one of 'prompt' and 'completion' is a text and the other is not; wanted are "
            "two texts, or two lists of messages"
        )
    given = _listed(record, "prompt", where)
    for message in given:
        if message["role"] == ASSISTANT:
            message["weight"] = 0
    return [*given, *_listed(record, "completion", where)]


_MESSAGES = {
    "messages": _openai,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _completed,
}


def _example(layout: str) -> str:
    listed = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    examples = {
        "messages": f'{{"messages": {listed}}}',
        "sharegpt": '{"conversations": [{"from": "human", "value": "..."}]}',
        "alpaca": '{"instruction": "...", "input": "...", "output": "..."}',
        "prompt-completion": '{"prompt": "...", "completion": "..."}',
    }
    return examples[layout]


def _names(fields: Iterable[str]) -> str:
    return ", ".join(map(repr, fields)) or "(none)"
