"""Chat templates: those that lie beside a tokenizer, two built-in ones, and which one a corpus has.

A template is a jinja text in the form of transformers: it gets ``messages`` and the texts of the
special tokens (``bos_token``, ...), and writes one text. It lies in the tokenizer's folder as
``chat_template.jinja`` (others by name in ``additional_chat_templates``), or in the
``tokenizer_config.json``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crnet.config.sections import DataConfig
from crnet.config.serialize import read_json
from crnet.errors import ConfigError

TEMPLATE = "chat_template.jinja"
DEFAULT = "default"
_OTHERS = "additional_chat_templates"
_CONFIG = "tokenizer_config.json"

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ message['content'] + '<|im_end|>' }}{%- endgeneration -%}
{%- else -%}
{{ message['content'] + '<|im_end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
PLAIN = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ 'Assistant:' }}
{%- generation -%}{{ ' ' + message['content'] + eos_token }}{%- endgeneration -%}
{%- else -%}
{{ message['role'] | capitalize + ': ' + message['content'] }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""
BUILT_IN = {"chatml": CHATML, "plain": PLAIN}
NEEDED_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}
"""Tokens that a built-in template is made of."""


@dataclass(frozen=True)
class Beside:
    """What lies beside a tokenizer for conversations."""

    templates: Mapping[str, str] = field(default_factory=dict)
    """By name; ``DEFAULT`` is the one that is meant where none is named."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Texts of the special tokens: ``bos_token`` and so on."""


def beside(folder: Path) -> Beside:
    """Read what lies in a tokenizer's folder.

    Raises:
        ConfigError: a file cannot be read.
    """
    config = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    found = named(config.get("chat_template"))
    for path in _files(folder):
        found[DEFAULT if path.name == TEMPLATE else path.stem] = _read(path)
    return Beside(found, texts_of(config))


def named(templates: Any) -> dict[str, str]:
    """Templates by name, from any form that transformers has for them."""
    if isinstance(templates, str):
        return {DEFAULT: templates}
    if isinstance(templates, list):
        pairs = [each for each in templates if isinstance(each, dict)]
        templates = {each.get("name"): each.get("template") for each in pairs}
    if not isinstance(templates, dict):
        return {}
    found = templates.items()
    return {k: text for k, text in found if isinstance(k, str) and isinstance(text, str)}


def texts_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names, as texts."""
    found = {}
    for role, value in config.items():
        value = value.get("content") if isinstance(value, dict) else value
        if role.endswith("_token") and isinstance(value, str):
            found[role] = value
    return found


def chosen(data: DataConfig, own: Mapping[str, str]) -> str:
    """The template of a corpus of conversations.

    Args:
        data: the corpus.
        own: the tokenizer's, by name.
    Raises:
        ConfigError: there is none of that name.
    """
    name = data.chat_template
    if name is None and DEFAULT in own:
        return own[DEFAULT]
    if name is None:
        raise ConfigError(
            f"--data.tokenizer {data.tokenizer}: has no chat template ({TEMPLATE}, or "
            f"chat_template in its {_CONFIG}); name one with --data.chat-template: "
            f"{', '.join(BUILT_IN)}, or a .jinja file"
        )
    if name in own or name in BUILT_IN:
        return own.get(name) or BUILT_IN[name]
    path = Path(name).expanduser()
    if not path.is_file():
        known = ", ".join([*BUILT_IN, *own])
        raise ConfigError(
            f"--data.chat-template {name}: no such file, nor a template's name (known are "
            f"{known}); check the path"
        )
    return _read(path)


def fingerprint(data: DataConfig) -> str:
    """Identify what ``chosen`` would choose from, without opening the tokenizer; its other files
    are in ``tokenizer.fingerprint``.

    Raises:
        ConfigError: a file cannot be read.
    """
    name, tokenizer = data.chat_template, Path(data.tokenizer).expanduser()
    texts = [name or "", BUILT_IN.get(name or "", "")]
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    if data.tokenizer != "train" and tokenizer.exists():
        texts += [f"{path.name}\0{_read(path)}" for path in _files(folder)]
    if name is not None and Path(name).expanduser().is_file():
        texts.append(_read(Path(name).expanduser()))
    return hashlib.sha256("\0\0".join(texts).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    own = folder / TEMPLATE
    others = sorted((folder / _OTHERS).glob("*.jinja"))
    return [path for path in (own, *others) if path.is_file()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); make it readable for this user"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error}); write it again") from error
