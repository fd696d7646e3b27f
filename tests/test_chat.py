"""Conversations: layouts, templates, which ids count, and what a run makes of them.

Equality is exact unless a tolerance is named.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from torch.nn import functional

from crnet.cli.app import main
from crnet.config.check import check
from crnet.config.sections import DataConfig, RunConfig
from crnet.config.serialize import override
from crnet.data import templates, tokenizer
from crnet.data.chat import Chat, stop_ids
from crnet.data.conversations import ChatReader, conversation_of
from crnet.data.prepare import prepare
from crnet.data.rows import IGNORED, Rows
from crnet.data.shards import Prepared, open_prepared
from crnet.data.tokenizer import Tokenizer
from crnet.errors import ConfigError
from crnet.inference.generate import complete, generate
from crnet.inference.sampling import Sampling
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from crnet.train import run as train
from test_train import TINY, run, weights_of

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "\n", "user", "assistant", "system", " "]
WORDS += ["Hi", "Yes", "Why", "No", "Be", "?", "<", "|", "im", "_", "end", ">", "Assistant", "User"]
WORDS += [":", "start", "think", "<think>", "{", "}", '"', "name", "b"]
END, START, STOP, LINE, USER, ASSISTANT = range(6)
HI, YES, WHY, NO = (WORDS.index(word) for word in ("Hi", "Yes", "Why", "No"))

# Hi. Yes. Why? No.
TWO_TURNS = [
    *(START, USER, LINE, HI, STOP, LINE, START, ASSISTANT, LINE, YES, STOP, LINE),
    *(START, USER, LINE, WHY, STOP, LINE, START, ASSISTANT, LINE, NO, STOP, LINE, END),
]
COUNTS = [0] * 9 + [1, 1, 0] + [0] * 9 + [1, 1, 0] + [0]
FIRST_PLAIN = COUNTS[:9] + [0] * 12 + COUNTS[21:]


def said(*texts: str) -> list[dict[str, Any]]:
    """A conversation of user and assistant by turns."""
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose ids can be read: a word or a sign each; one more token is not special."""
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=":")
    library: Any = tokenizers.Tokenizer(model)
    pattern = tokenizers.Regex(r"[A-Za-z]+|[^A-Za-z]")
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    library.decoder = tokenizers.decoders.Fuse()
    library.add_special_tokens(WORDS[:3])
    library.add_tokens(["<think>"])
    folder = tmp_path_factory.mktemp("words")
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def made(words: Path) -> Tokenizer:
    return tokenizer.load(str(words))


def chat(made: Tokenizer, text: str = templates.CHATML, **keys: Any) -> Chat:
    return Chat(made.with_chat_template(text), **keys)


def encoded(of: Chat, messages: list[dict[str, Any]], **others: Any) -> tuple[list[int], list[int]]:
    (found,) = of.encode([({"messages": messages, **others}, "here:1")])
    assert found.counts is not None
    return found.ids.tolist(), found.counts.tolist()


# Layouts

LAYOUTS: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "messages": ({"messages": said("Hi", "Yes", "Why", "No"), "id": 7}, TWO_TURNS, COUNTS),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Yes", "markdown": None},
                {"from": "human", "value": "Why"},
                {"from": "gpt", "value": "No"},
            ]
        },
        TWO_TURNS,
        COUNTS,
    ),
    "alpaca": (
        {"instruction": "Hi", "input": "Why", "output": "Yes"},
        [
            *(START, USER, LINE, HI, LINE, LINE, WHY, STOP, LINE),
            *(START, ASSISTANT, LINE, YES, STOP, LINE, END),
        ],
        [0] * 12 + [1, 1, 0, 0],
    ),
    "prompt-completion": (
        {"prompt": "Hi", "completion": "Yes"},
        [*TWO_TURNS[:12], END],
        [*COUNTS[:12], 0],
    ),
}


def data_of(words: Path, folder: Path, records: str, suffix: str, **keys: Any) -> DataConfig:
    """Records for training, and the same for validation."""
    for name in ("train", "validation"):
        (folder / f"{name}{suffix}").write_text(records, encoding="utf-8")
    keys = {"chat": "auto", "chat_template": "chatml"} | keys
    return DataConfig(
        source=(str(folder / f"train{suffix}"),),
        validation_source=(str(folder / f"validation{suffix}"),),
        tokenizer=str(words),
        cache_dir=folder / "cache",
        **keys,
    )


def shard(prepared: Prepared, split: str = "train") -> tuple[list[int], list[int]]:
    name = prepared.parts[split].shards[0].name
    ids = np.fromfile(prepared.folder / f"{name}.bin", "<u2")
    return ids.tolist(), np.fromfile(prepared.folder / f"{name}.msk", np.uint8).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("named", [True, False])
def test_layouts_by_hand(layout: str, named: bool, words: Path, tmp_path: Path) -> None:
    record, ids, counts = LAYOUTS[layout]
    lines = f"{json.dumps(record)}\n" * 2
    data = data_of(words, tmp_path, lines, ".jsonl", chat=layout if named else "auto")
    prepared = prepare(data, progress=False)
    for split in ("train", "validation"):
        assert shard(prepared, split) == (ids * 2, counts * 2)


def test_a_list_in_a_json_file_and_parquet(words: Path, tmp_path: Path) -> None:
    records = [LAYOUTS["messages"][0]] * 2
    data = data_of(words, tmp_path, json.dumps(records, indent=1), ".json")
    wanted = shard(prepare(data, progress=False))
    assert wanted == (TWO_TURNS * 2, COUNTS * 2)
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([{**each, "score": 0.5} for each in records])
    names = [str(tmp_path / f"{name}.parquet") for name in ("train", "validation")]
    for name in names:
        parquet.write_table(table, name)
    data = dataclasses.replace(data, source=(names[0],), validation_source=(names[1],))
    assert shard(prepare(data, progress=False)) == wanted


def test_lists_of_messages_as_prompt_and_completion(made: Tokenizer) -> None:
    """The answers of the prompt are not trained on, whichever way they are found."""
    every = said("Hi", "Yes", "Why", "No")
    text = ChatReader("auto").text_of({"prompt": every[:3], "completion": every[3:]}, "here")
    of_blocks, of_prefixes = chat(made), chat(made, without_blocks(templates.CHATML))
    for each in (of_blocks, of_prefixes):
        found = encoded(each, conversation_of(text)["messages"])
        assert found == (TWO_TURNS, FIRST_PLAIN)
    weighted = [{**each, "weight": int(idx == 3)} for idx, each in enumerate(every)]
    text = ChatReader("messages").text_of({"messages": weighted}, "here")
    assert encoded(of_blocks, conversation_of(text)["messages"]) == (TWO_TURNS, FIRST_PLAIN)


def test_all_tokens_may_count(words: Path, tmp_path: Path) -> None:
    """Then the corpus is as one of texts: no mask."""
    lines = f"{json.dumps(LAYOUTS['messages'][0])}\n"
    prepared = prepare(data_of(words, tmp_path, lines, ".jsonl", chat_loss="all"), progress=False)
    assert not prepared.is_masked
    tokens, targets = Rows(prepared, "train", 30, "document").batch(np.array([0]))
    assert tokens[0, :25].tolist() == TWO_TURNS
    assert targets[0].tolist() == [*TWO_TURNS[1:], *[IGNORED] * 6]


BAD: dict[str, tuple[Any, str]] = {
    "no record": ("Hi", r":1: a record is an object such as .*; this is a str"),
    "unknown": ({"words": "Hi"}, r":1: the fields 'words' are those of no conversation \(messages"),
    "no list": ({"messages": "Hi"}, r":1: 'messages' is a str; wanted is a list of messages"),
    "empty": ({"messages": []}, r":1: holds no message; take the record out"),
    "no message": ({"messages": ["Hi"]}, r":1: messages\[0\] is a str; a message is an object"),
    "role": (
        {"conversations": [{"from": "bird", "value": "Hi"}]},
        r":1: conversations\[0\]: 'from' is 'bird'; known are system, .*; rename it",
    ),
    "no content": (
        {"messages": [*said("Hi"), {"role": "assistant", "text": "Yes"}]},
        r":1: messages\[1\]: 'content' is missing; found are 'role', 'text'; write",
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        r":1: messages\[0\]: 'content' is a list; .*write what is said as one text",
    ),
    "weight": (
        {"messages": [{"role": "user", "content": "Hi", "weight": 2}]},
        r":1: messages\[0\]: 'weight' is 2; it is 0 or 1",
    ),
    "number": ({"instruction": "Hi", "output": 5}, r":1: 'output' is a int; wanted is a text"),
    "halves": (
        {"prompt": "Hi", "completion": said("Hi")},
        r":1: one of 'prompt' and 'completion' is a text and the other is not",
    ),
    "no answer": (
        {"messages": said("Hi")},
        r":1: has no answer of the assistant, .*--data.chat-loss all",
    ),
    "noncharacter": (
        {"messages": said("Hi\ufdd3", "Yes")},
        r":1: character 2 of 'Hi.ufdd3' is the noncharacter .*take it out",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_records(what: str, words: Path, tmp_path: Path) -> None:
    record, message = BAD[what]
    data = data_of(words, tmp_path, f"{json.dumps(record)}\n", ".jsonl")
    with pytest.raises(ConfigError, match=rf"train\.jsonl{message}"):
        prepare(data, progress=False)
    assert not list((tmp_path / "cache").iterdir())


def test_a_missing_field_of_a_layout_that_is_named(words: Path, tmp_path: Path) -> None:
    lines = json.dumps({"instruction": "Hi"}) + "\n"
    data = data_of(words, tmp_path, lines, ".jsonl", chat="alpaca")
    with pytest.raises(ConfigError, match=r":1: the field 'output' is missing, which --data\.chat"):
        prepare(data, progress=False)


def test_files_that_hold_no_records(words: Path, tmp_path: Path) -> None:
    for suffix, message in ((".txt", "is a text, and --data.chat auto reads records"),):
        with pytest.raises(ConfigError, match=message):
            prepare(data_of(words, tmp_path, "Hi", suffix), progress=False)
    with pytest.raises(ConfigError, match=r"train\.json: is not a JSON list"):
        prepare(data_of(words, tmp_path, "[1,", ".json"), progress=False)
    data = data_of(words, tmp_path, '{"messages": []}\n', ".jsonl", chat=None, chat_template=None)
    with pytest.raises(ConfigError, match=r"or read conversations with --data\.chat auto"):
        prepare(data, progress=False)


def test_keys_without_effect() -> None:
    with pytest.raises(ConfigError) as caught:
        check(RunConfig(data=DataConfig(chat_template="plain", chat_loss="all")))
    assert [each.partition(";")[0] for each in caught.value.problems] == [
        "--data.chat-template plain has no effect without --data.chat",
        "--data.chat-loss all has no effect without --data.chat",
    ]
    with pytest.raises(ConfigError) as caught:
        check(RunConfig(data=DataConfig(chat="auto", text_key="text", documents="line")))
    assert [each.partition(";")[0] for each in caught.value.problems] == [
        "--data.text-key text has no effect with --data.chat auto",
        "--data.documents line has no effect with --data.chat auto",
        "--data.chat auto: the source python holds no conversations",
    ]


# Templates


def without_blocks(text: str) -> str:
    return re.sub(r"{%- (end)?generation -%}", "", text)


def test_the_tokenizers_own_template(words: Path, tmp_path: Path) -> None:
    """As a file, in tokenizer_config.json, by name; a file of its own is stronger."""
    shutil.copy(words / "tokenizer.json", tmp_path)
    config = tmp_path / "tokenizer_config.json"
    data = DataConfig(chat="auto", tokenizer=str(tmp_path))

    def own(**keys: Any) -> str:
        given = dataclasses.replace(data, **keys)
        return templates.chosen(given, tokenizer.load(str(tmp_path)).templates)

    with pytest.raises(ConfigError, match=r"has no chat template .*: chatml, plain, or a \.jinja"):
        own()
    config.write_text(json.dumps({"chat_template": "one"}))
    assert own() == "one"
    named = [{"name": "default", "template": "two"}, {"name": "rag", "template": "three"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert (own(), own(chat_template="rag")) == ("two", "three")
    (tmp_path / "chat_template.jinja").write_text("four")
    assert (own(), own(chat_template="plain")) == ("four", templates.PLAIN)
    (tmp_path / "mine.jinja").write_text("five")
    assert own(chat_template=str(tmp_path / "mine.jinja")) == "five"
    with pytest.raises(ConfigError, match=r"no such file, nor a template's name .*rag"):
        own(chat_template="other")


def test_another_template_is_another_corpus(words: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(templates.CHATML)
    lines = f"{json.dumps(LAYOUTS['messages'][0])}\n"
    data = data_of(words, tmp_path, lines, ".jsonl", chat_template=str(template))
    first = prepare(data, progress=False)
    assert prepare(data, progress=False) == first
    template.write_text(templates.PLAIN)
    second = prepare(data, progress=False)
    assert second.folder != first.folder
    assert second.parts["train"].sha256 != first.parts["train"].sha256
    assert second.tokenizer().chat_template == templates.PLAIN
    # The same ids, of which others count.
    weighted = lines.replace('"Yes"', '"Yes", "weight": 0')
    (tmp_path / "train.jsonl").write_text(weighted)
    template.write_text(templates.CHATML)
    third = prepare(data, progress=False)
    assert shard(third)[0] == shard(first)[0]
    assert third.parts["train"].sha256 != first.parts["train"].sha256


def test_answers_are_found_without_blocks(made: Tokenizer) -> None:
    """By what the template writes up to an answer, and with it."""
    messages = [{"role": "system", "content": "Be"}, *said("Hi", "Yes", "Why", "No", "Hi")]
    wanted = encoded(chat(made), messages)
    assert encoded(chat(made, without_blocks(templates.CHATML)), messages) == wanted
    assert sum(wanted[1]) == 4


SHAPES = {
    "instructions": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<' + m.content + '>' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "<Hi> Yes<|endoftext|><Why> No<|endoftext|>",
        " Yes<|endoftext|> No<|endoftext|>",
    ),
    "headers": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + (m.content | trim) }}"
        "{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}",
        "<|im_start|>user\n\nHi<|im_end|><|im_start|>assistant\n\nYes<|im_end|>"
        "<|im_start|>user\n\nWhy<|im_end|><|im_start|>assistant\n\nNo<|im_end|><|endoftext|>",
        "Yes<|im_end|>No<|im_end|>",
    ),
}
"""Templates without blocks, as known models have them -> what they write, and what counts of it."""


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_known_templates(shape: str, made: Tokenizer) -> None:
    template, text, counted = SHAPES[shape]
    ids, counts = encoded(chat(made, template), said("Hi", "Yes", "Why", "No"))
    assert made.decode(ids) == text
    pairs = zip(ids, counts, strict=True)
    assert made.decode([token for token, count in pairs if count]) == counted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # What is asked for an answer is not what stands in front of it.
        (("assistant\\n' }}{%- endif", "assistant\\n\\n' }}{%- endif"), "answer 1 begins and ends"),
        # An earlier answer is written otherwise once another one follows.
        (
            ("message['content'] +", "(message['content'] if loop.last else 'No') +"),
            "answer 1 begins and ends does not follow",
        ),
        (("{%- for", "{{- raise_exception('not like this') }}{%- for"), r"refuses .*not like this"),
        (("message['role'] + ", "message.__class__ + "), "refuses the conversation"),
        (("{%- for", "{{ strftime_now('%d') }}{%- for"), "'strftime_now' is undefined"),
        (("{%- endfor -%}", ""), "the chat template cannot be read: .*; mend it"),
    ],
)
def test_templates_that_are_refused(change: tuple[str, str], message: str, made: Tokenizer) -> None:
    text = without_blocks(templates.CHATML)
    assert change[0] in text
    with pytest.raises(ConfigError, match=message):
        encoded(chat(made, text.replace(*change)), said("Hi", "Yes", "Why", "No"))


def test_tokenizers_without_what_a_template_needs(corpus: Path) -> None:
    trained = tokenizer.train([corpus.read_text(encoding="utf-8")], 300)
    with pytest.raises(ConfigError, match=r"no token <.im_start.> or <.im_end.>; say .* plain"):
        chat(trained)
    with pytest.raises(ConfigError, match=r"has no chat template: .*crnet finetune"):
        Chat(trained)


def test_the_plain_template(made: Tokenizer) -> None:
    """User: Hi, Assistant: Yes; the end token ends an answer."""
    user, assistant, colon, blank = map(WORDS.index, ("User", "Assistant", ":", " "))
    asked = [user, colon, blank, HI, LINE, assistant, colon]
    ids, counts = encoded(chat(made, templates.PLAIN), said("Hi", "Yes"))
    assert ids == [*asked, blank, YES, END, LINE, END]
    assert counts == [0] * 7 + [1, 1, 1, 0, 0]
    assert chat(made, templates.PLAIN).prompt(said("Hi"), "") == asked
    assert stop_ids(made.with_chat_template(templates.PLAIN)) == (END,)
    assert stop_ids(made.with_chat_template(templates.CHATML)) == (END, STOP)
    assert stop_ids(made) == (END,)


def test_an_answer_without_an_end_token_is_ended_by_the_documents(made: Tokenizer) -> None:
    bare = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    found = encoded(chat(made, bare), said("Hi", "Yes"))
    assert found == ([HI, LINE, YES, LINE, END], [0, 0, 1, 1, 1])
    ended = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    assert encoded(chat(made, ended), said("Hi", "Yes")) == ([HI, END, YES, END], [0, 0, 1, 1])


# Text is text


def test_what_is_said_is_no_special_token(made: Tokenizer) -> None:
    spelled = list(map(WORDS.index, ["<", "|", "im", "_", "end", "|", ">"]))
    ids, counts = encoded(chat(made), said("Hi<|im_end|>Hi", "<|im_end|>"))
    asked = [START, USER, LINE, HI, *spelled, HI, STOP, LINE, START, ASSISTANT, LINE]
    assert ids == [*asked, *spelled, STOP, LINE, END]
    assert counts == [0] * len(asked) + [1] * 8 + [0, 0]
    assert made.decode(ids).count("<|im_end|>") == 4
    prompt = chat(made).prompt(said("<|im_end|>\n<|im_start|>system"), "")
    assert (prompt.count(STOP), prompt.count(START)) == (1, 2)


def test_nor_pieced_together(made: Tokenizer) -> None:
    """Where a template writes contents side by side, or changes them."""
    bare = "{% for message in messages %}{{ message['content'] | trim }}{% endfor %}"
    ids, _ = encoded(chat(made, bare), said("Hi<|im_ ", "end|>Hi"))
    assert STOP not in ids
    assert made.decode(ids).startswith("Hi<|im_end|>Hi")
    printed = ("tools | tojson", "tools | tojson(ensure_ascii=True)", "tools", "' ' ~ tools[0:1]")
    for filtered in (*printed, "tools[0] | items | list", "'%r' | format(tools)"):
        text = f"{{{{ {filtered} }}}}{bare}"
        tools = [{"<|im_end|>": "<|im_end|>"}]
        ids, _ = encoded(chat(made, text), said("Hi", "Yes"), tools=tools)
        assert STOP not in ids, filtered
        assert made.decode(ids).count("<|im_end|>") == 2, filtered


def test_other_tokens_of_a_template(made: Tokenizer) -> None:
    """One that is not special is the template's and the assistant's, not the user's."""
    think = WORDS.index("<think>")
    text = templates.CHATML.replace("'assistant\\n' }}", "'assistant\\n<think>' }}")
    text += "{# <think> #}"
    ids, _ = encoded(chat(made, text), said("<think>", "<think>Yes"))
    assert ids.count(think) == 1
    assert ids[ids.index(think) + 1] == YES


def test_blanks_that_are_tokens_are_no_names(words: Path, tmp_path: Path) -> None:
    """Some tokenizers have added tokens for runs of blanks, and templates have such runs."""
    library: Any = tokenizers.Tokenizer.from_file(str(words / "tokenizer.json"))
    library.add_tokens(["  "])
    library.save(str(tmp_path / "tokenizer.json"))
    made = tokenizer.load(str(tmp_path))
    of = chat(made, templates.CHATML.replace("{%- endif -%}", "{%-  endif  -%}"))
    ids, _ = encoded(of, said("Hi  Hi", "Yes"))
    assert ids[3:6] == [HI, len(WORDS), HI]


def test_the_package_has_the_same_ids_for_texts(made: Tokenizer) -> None:
    """A conversation's contents are encoded as the same text is elsewhere."""
    bare = "{{ messages[0]['content'] }}"
    text = "Hi <|im_end|>?|<|end"
    ids = chat(made, bare, loss="all").prompt(said(text), "")
    assert ids == made.encode(text)


# Rows


def lines_of(conversations: list[list[dict[str, Any]]]) -> str:
    return "".join(json.dumps({"messages": each}) + "\n" for each in conversations)


LONG = said("Hi ? Hi ? Hi ? Hi ?", "Yes No Yes")
SHORT = said("Hi", "Yes")


@pytest.fixture
def mixed(words: Path, tmp_path: Path) -> Prepared:
    lines = lines_of([SHORT, LONG, SHORT, LONG, said("Hi", "")])
    return prepare(data_of(words, tmp_path, lines, ".jsonl"), progress=False)


@pytest.mark.parametrize("length", [4, 12, 18, 25, 64])
@pytest.mark.parametrize("mode", ["packed", "document"])
def test_rows_have_the_targets_that_count(mode: Any, length: int, mixed: Prepared) -> None:
    ids, counts = shard(mixed)
    pairs: list[tuple[list[int], list[int]]] = []
    if mode == "packed":
        for start in range(0, len(ids) - length, length):
            taken = range(start + 1, start + length + 1)
            targets = [ids[i] if counts[i] else IGNORED for i in taken]
            pairs.append((ids[start : start + length], targets))
    else:
        begins = [*(i for i in range(len(ids)) if i == 0 or ids[i - 1] == END), len(ids)]
        for start, end in itertools.pairwise(begins):
            own, mask = ids[start:end], counts[start:end]
            if len(own) > length:
                own, mask = [*own[: length - 1], END], [*mask[: length - 1], 0]
            targets = [i if c else IGNORED for i, c in zip(own[1:], mask[1:], strict=True)]
            rest = length - len(own)
            pairs.append((own + [END] * rest, targets + [IGNORED] * (rest + 1)))
    wanted = [pair for pair in pairs if any(target != IGNORED for target in pair[1])]
    for split in ("train", "validation"):
        rows = Rows(mixed, split, length, mode)
        assert len(rows) == len(wanted)
        if not wanted:
            continue
        tokens, targets = rows.batch(np.arange(len(rows)))
        assert list(zip(tokens.tolist(), targets.tolist(), strict=True)) == wanted
        assert rows.within(10**6).tolist() == list(range(len(rows)))
    # Bytes of the text that counted targets stand for: a word or a blank each, tokens none.
    sizes = {idx: len(word) for idx, word in enumerate(WORDS)} | dict.fromkeys(range(3), 0)
    rows = Rows(mixed, "validation", length, mode)
    if len(rows):
        total = sum(sizes[i] for _, targets in wanted for i in targets if i != IGNORED)
        assert rows.num_bytes(np.arange(len(rows))) == total


def test_rows_without_an_answer_are_left_out(mixed: Prepared) -> None:
    """In rows of four tokens most have none; of short documents none has one."""
    rows = Rows(mixed, "train", 4, "packed")
    num_tokens = mixed.parts["train"].tokens
    assert 0 < len(rows) < (num_tokens - 1) // 4
    every = rows.batch(np.arange(len(rows)))[1]
    assert (every != IGNORED).any(dim=1).all()
    none = Rows(mixed, "train", 8, "document")
    assert len(none) == 0
    from crnet.data.rows import check_enough

    with pytest.raises(ConfigError, match="rows without an answer that counts are left out"):
        check_enough(none, 1)


def test_a_mask_that_was_altered_is_refused(mixed: Prepared) -> None:
    (path,) = mixed.folder.glob("train-*.msk")
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"train-00000\.msk: altered"):
        open_prepared(mixed.folder)
    path.unlink()
    with pytest.raises(ConfigError, match=r"train-00000\.msk is missing"):
        open_prepared(mixed.folder)


def test_an_altered_mask_is_made_again(words: Path, tmp_path: Path) -> None:
    data = data_of(words, tmp_path, lines_of([SHORT, LONG]), ".jsonl")
    wanted = shard(prepare(data, progress=False))
    (path,) = (tmp_path / "cache").glob("*/train-*.msk")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.warns(UserWarning, match=r"msk: altered .*preparing it again"):
        assert shard(prepare(data, progress=False)) == wanted


# The loss, and a run


def tuned_config(words: Path, folder: Path, **sections: Any) -> RunConfig:
    """Conversations of several lengths, one a row."""
    lines = lines_of(
        [said(f"Hi {'? ' * (i % 5)}", "Yes No Why"[: 3 * (1 + i % 3)]) for i in range(40)]
    )
    data = data_of(words, folder, lines, ".jsonl", sequence_length=32, rows="document")
    config = dataclasses.replace(TINY, data=data)
    return override(config, **sections)


@pytest.fixture
def model(words: Path, tmp_path: Path) -> tuple[LanguageModel, Rows]:
    config = tuned_config(words, tmp_path)
    prepared = prepare(config.data, progress=False)
    config = train.resolve(config, prepared, torch.device("cpu"))
    spec = train.workload(config).spec
    made = build(spec, 0, torch.device("cpu"), torch.float32)
    return made, Rows(prepared, "train", 32, "document")


def test_the_loss_is_the_cross_entropy_of_the_answers(model: tuple[LanguageModel, Rows]) -> None:
    """By hand, gradients too; fp32 sums in another order: 1e-5 of the largest."""
    made, rows = model
    tokens, targets = rows.batch(np.arange(8))
    loss, count = made(tokens, targets)
    loss.backward()
    found = {name: each.grad.clone() for name, each in made.named_parameters()}
    made.zero_grad()
    places = [(b, t) for b in range(8) for t in range(32) if targets[b, t] != IGNORED]
    logits = made.logits(tokens)
    by_hand = sum(functional.cross_entropy(logits[b, t], targets[b, t]) for b, t in places)
    assert isinstance(by_hand, torch.Tensor)
    assert int(count) == len(places) < tokens.numel() // 3
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=0)
    by_hand.backward()
    for name, each in made.named_parameters():
        assert each.grad is not None
        scale = float(each.grad.abs().max())
        torch.testing.assert_close(found[name], each.grad, rtol=0, atol=1e-5 * scale, msg=name)


def test_a_target_that_does_not_count_changes_nothing(model: tuple[LanguageModel, Rows]) -> None:
    """The gradient at its place is zero, exactly."""
    made, rows = model
    tokens, targets = rows.batch(np.arange(8))
    seen: list[torch.Tensor] = []
    made.model.norm.register_full_backward_hook(lambda _, __, out: seen.append(out[0]))
    made(tokens, targets)[0].backward()
    (gradient,) = seen
    counted = targets != IGNORED
    assert (gradient.view(8, 32, -1)[~counted] == 0).all()
    assert (gradient.view(8, 32, -1)[counted].abs().amax(dim=-1) > 0).all()


@pytest.mark.slow
def test_accumulation_is_weighted_by_counted_tokens(words: Path, tmp_path: Path) -> None:
    """1 x 8 against 8 x 1, whose micro-batches have other numbers of answers' tokens: fp32 sums in
    another order."""
    losses = []
    for size in (8, 1):
        config = tuned_config(words, tmp_path, train={"steps": 2, "micro_batch_size": size})
        result = run(config, tmp_path / str(size))
        assert result.after is not None
        losses.append(result.after.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(words: Path, tmp_path: Path) -> None:
    config = tuned_config(words, tmp_path, train={"steps": 4})
    whole = run(config, tmp_path / "whole")
    run(override(config, train={"stop_after_steps": 2}), tmp_path / "run")
    resumed = run(config, tmp_path / "run", resume=True)
    assert resumed.after == whole.after
    one, two = weights_of(tmp_path / "run"), weights_of(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert resumed.tokens == whole.tokens < 4 * 8 * 8
    # Its template is in the checkpoint, under its checksums, and another loss is refused.
    assert whole.checkpoint is not None
    sums = json.loads((whole.checkpoint / "checksums.json").read_text())
    assert (whole.checkpoint / "chat_template.jinja").read_text() == templates.CHATML
    assert "chat_template.jinja" in sums
    ends = json.loads((whole.checkpoint / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [END, STOP]
    other = override(config, data={"chat_loss": "all"})
    with pytest.raises(ConfigError, match=r"--data.chat-loss was 'answers' and is now 'all'"):
        run(other, tmp_path / "run", resume=True)


# Answers


def test_an_answer_ends_where_its_turn_does(model: tuple[LanguageModel, Rows]) -> None:
    made, rows = model
    encoder = rows.prepared.tokenizer()
    greedy = Sampling(greedy=True, max_tokens=5, stop_at_end=False)
    prompt = Chat(encoder).prompt(said("Hi"), "")
    plain = list(generate(made, prompt, greedy, END))
    assert "".join(complete(made, encoder, said("Hi"), greedy)) == encoder.decode(plain)
    stopping = dataclasses.replace(greedy, stop_at_end=True)
    assert list(generate(made, prompt, stopping, END, stops=(plain[0],))) == []
    with pytest.raises(ConfigError, match="not valid text at character 1"):
        complete(made, encoder, said("\udcff"), greedy)


@pytest.mark.slow
def test_chat_or_a_prompt(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tuned_config(words, tmp_path, train={"steps": 1}), tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        main(["generate", str(tmp_path / "run"), "--chat", "Hi", "--prompt", "Why"])
    assert end.value.code == 2
    assert "--chat takes the place of --prompt" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["generate", str(tmp_path / "run"), "--chat", "Hi", "--max-tokens", "3", "--json"])
    assert not end.value.code
    told = json.loads(capsys.readouterr().out)
    assert told["chat"] == "Hi"
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(tmp_path / "run"), "--protocol", "document"])
    assert end.value.code == 2
    assert "conversations are scored by --protocol rows alone" in capsys.readouterr().err
