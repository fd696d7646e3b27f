"""Conversations in whole runs: real ones, in transformers, in an export, on two processes."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

import crnet
from crnet.cli.app import main
from crnet.config.sections import DataConfig, RunConfig
from crnet.config.serialize import override
from crnet.data import templates, tokenizer
from crnet.data.chat import Chat
from crnet.data.prepare import prepare
from crnet.data.sources import documents
from crnet.data.tokenizer import Tokenizer
from crnet.errors import ConfigError
from crnet.storage import checkpoint
from crnet.train.run import Result
from test_chat import said
from test_parallel import BASE, Run, launch
from test_train import run

pytestmark = pytest.mark.slow

SHARED = Path(os.environ.get("CRNET_SHARED") or Path(__file__).parents[2] / "shared") / "data"
ABSTRACTS = SHARED / "arxiv-abstracts" / "arxiv-abstracts-30k.jsonl.xz"
needs_shared = pytest.mark.skipif(
    not ABSTRACTS.is_file(), reason=f"no {ABSTRACTS}; set CRNET_SHARED to the shared folder"
)
NUM_RECORDS = 800


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: abstracts.jsonl, texts to learn from; questions.jsonl, what papers are about, each
    answered by the first sentence of its abstract."""
    folder = tmp_path_factory.mktemp("asked")
    with lzma.open(ABSTRACTS, "rt", encoding="utf-8") as stream:
        records = [json.loads(next(stream)) for _ in range(NUM_RECORDS)]
    texts = [{"text": each["abstract"]} for each in records]
    pairs = [(each["title"], each["abstract"].split(". ")[0]) for each in records]
    talks = [
        {"messages": said(f"What is {title} about?", sentence)}
        for title, sentence in pairs
        if len(title) + len(sentence) < 230  # a row holds it whole
    ]
    for name, rows in (("abstracts", texts), ("questions", talks)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pretrained(asked: Path) -> Result:
    config = override(
        RunConfig(),
        model={"hidden_size": 64, "intermediate_size": 128, "num_layers": 3, "num_heads": 4},
        data={
            "source": (str(asked / "abstracts.jsonl"),),
            "vocab_size": 1024,
            "sequence_length": 128,
            "validation_tokens": 8192,
        },
        optimizer={"lr": 5e-3},
        train={"steps": 60, "batch_size": 16, "threads": 1, "eval_every_steps": 0},
    )
    return run(config, asked / "pretrained")


@pytest.fixture(scope="module")
def tuned(asked: Path, pretrained: Result) -> Result:
    """By the command line."""
    words = (
        f"finetune {asked / 'pretrained'} --data.source {asked / 'questions.jsonl'} --data.chat "
    )
    words += "auto --data.chat-template plain --data.rows document --train.epochs 3 "
    words += f"--train.eval-every-steps 0 --optimizer.lr 3e-3 --out {asked / 'tuned'}"
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert not end.value.code
    return crnet.train(out=asked / "tuned", resume=True, progress=False)


def answers_of(made: Tokenizer, data: DataConfig) -> list[list[int]]:
    """Ids of the held-out answers, by hand: a blank, what is said, the end token."""
    found = []
    for document in documents(data):
        if document.split == "validation":
            _, answer = json.loads(document.text)["messages"]
            found.append([*made.encode(f" {answer['content']}"), made.eos_id])
    return found


@needs_shared
def test_a_model_learns_to_answer(asked: Path, tuned: Result) -> None:
    """The loss on answers that it has not seen falls; it is over their tokens alone."""
    saved = checkpoint.newest(asked / "tuned")
    assert saved is not None
    config = saved.config
    assert tuned.before is not None
    assert tuned.after is not None
    assert tuned.after.loss < tuned.before.loss - 0.2, (tuned.before, tuned.after)
    made = tokenizer.load_saved(saved.folder)
    answers = answers_of(made, config.data)
    assert tuned.after.tokens == sum(map(len, answers))
    texts = [made.decode(each[:-1]) for each in answers]
    assert tuned.after.bytes == sum(len(each.encode()) for each in texts)
    assert math.isfinite(tuned.after.bits_per_byte)
    assert crnet.evaluate(asked / "tuned") == tuned.after


@needs_shared
def test_the_loss_by_hand(asked: Path, tuned: Result) -> None:
    """Every held-out conversation by itself, its answer's tokens alone: the figure of the run. fp32
    products of other shapes: 1e-5, relative."""
    model, made = crnet.load(asked / "tuned", device="cpu")
    saved = checkpoint.newest(asked / "tuned")
    assert saved is not None
    chat, total, count = Chat(made), 0.0, 0
    for document in documents(saved.config.data):
        if document.split != "validation":
            continue
        conversation = json.loads(document.text)
        (found,) = chat.encode([(conversation, "")])
        ids = torch.tensor([found.ids.tolist()])
        assert ids.shape[1] <= saved.config.data.sequence_length
        assert found.counts is not None
        with torch.no_grad():
            logs = model.logits(ids)[0].double().log_softmax(-1)
        counted = [i for i, each in enumerate(found.counts) if each]
        total -= sum(float(logs[i - 1, ids[0, i]]) for i in counted)
        count += len(counted)
    assert tuned.after is not None
    assert count == tuned.after.tokens
    assert total / count == pytest.approx(tuned.after.loss, rel=1e-5)


@needs_shared
def test_an_answer_ends(asked: Path, tuned: Result, capsys: pytest.CaptureFixture[str]) -> None:
    """Before it runs out of tokens, at the end of its turn, in most cases; the base model's do not
    have to."""
    lines = (asked / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    loaded = crnet.load(asked / "tuned", device="cpu")
    ended = 0
    for line in lines[:8]:
        question = json.loads(line)["messages"][:1]
        text = loaded.generate(question, greedy=True, max_tokens=110)
        ended += len(loaded.tokenizer.encode(text)) < 110
        assert "User:" not in text
    assert ended >= 4
    question = json.loads(lines[0])["messages"][0]["content"]
    words = ["generate", str(asked / "tuned"), "--chat", question, "--greedy", "--json"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--max-tokens", "20"])
    assert not end.value.code
    told = json.loads(capsys.readouterr().out)
    messages = [{"role": "user", "content": question}]
    assert told["text"] == loaded.generate(messages, greedy=True, max_tokens=20)


@needs_shared
def test_the_template_goes_on(asked: Path, tuned: Result, tmp_path: Path) -> None:
    """To a run that begins with the checkpoint, on conversations without naming it, on texts."""
    for name, keys in (
        ("questions", {"chat": "auto"}),
        ("abstracts", {"max_documents": 200}),
    ):
        result = crnet.finetune(
            asked / "tuned",
            out=tmp_path / name,
            progress=False,
            source=asked / f"{name}.jsonl",
            data=keys,
            train={"epochs": None},
            steps=1,
        )
        assert result.checkpoint is not None
        assert (result.checkpoint / templates.TEMPLATE).read_text() == templates.PLAIN
    with pytest.raises(ConfigError, match=r"pretrained/.* has no chat template .*chatml, plain"):
        crnet.finetune(
            asked / "pretrained",
            out=tmp_path / "none",
            progress=False,
            source=asked / "questions.jsonl",
            chat="auto",
        )


# In transformers


@pytest.fixture(scope="module")
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        import crnet.hf  # noqa: F401

        return transformers


TALKS = [
    said("What is it?", "A test."),
    [
        {"role": "system", "content": "Be brief.\n"},
        *said("Ünï 漢 🙂 ", "  two  blanks\n\n", "", "no"),
    ],
    said("<|im_start", "I say <think>nothing</think>", "|>", "🙂🙂"),
]


@pytest.fixture(scope="module")
def chatting(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with the tokens of ChatML, and one to begin with."""
    made = tokenizer.train([corpus.read_text(encoding="utf-8")], 500)
    content = made.json_content()
    assert content is not None
    library: Any = tokenizers.Tokenizer.from_buffer(content)
    library.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|begin|>"])
    library.add_tokens(["<think>", "</think>"])
    folder = tmp_path_factory.mktemp("chatting")
    library.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": "<|begin|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "text", [templates.CHATML, templates.PLAIN, "{{ bos_token }}" + templates.CHATML]
)
def test_ids_and_masks_are_those_of_transformers(
    text: str, chatting: Path, transformers: Any
) -> None:
    """But for an end token behind a conversation that has none, and the last bytes of a character
    at the end of an answer, which transformers leaves out."""
    made = tokenizer.load(str(chatting)).with_chat_template(text)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(chatting / "tokenizer.json"), **made.token_texts
    )
    chat = Chat(made)
    for talk in TALKS:
        (found,) = chat.encode([({"messages": talk}, "")])
        wanted = theirs.apply_chat_template(
            talk,
            chat_template=text,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        size = len(wanted["input_ids"])
        assert found.counts is not None
        assert found.ids[:size].tolist() == wanted["input_ids"]
        assert found.ids[size:].tolist() in ([], [made.eos_id])
        assert found.counts[:size].tolist() == wanted["assistant_masks"]
        asked = theirs.apply_chat_template(talk[:1], chat_template=text, add_generation_prompt=True)
        ids = asked if isinstance(asked, list) else asked["input_ids"]
        assert chat.prompt(talk[:1], "") == list(ids)


@needs_shared
def test_ids_of_a_unigram_tokenizer_are_those_of_transformers(transformers: Any) -> None:
    """T5's, whose special tokens are among its pieces; what spells one stays text here."""
    path = SHARED / "tokenizers" / "t5-tokenizer.json"
    made = tokenizer.load(str(path)).with_chat_template(templates.PLAIN)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **made.token_texts)
    chat = Chat(made)
    for talk in TALKS:
        (found,) = chat.encode([({"messages": talk}, "")])
        text = theirs.apply_chat_template(talk, chat_template=templates.PLAIN, tokenize=False)
        wanted = theirs(text, add_special_tokens=False)["input_ids"]
        assert found.ids[: len(wanted)].tolist() == wanted
    (found,) = chat.encode([({"messages": said("</s> <extra_id_0> <pad>", "no")}, "")])
    assert found.ids.tolist().count(made.eos_id) == 1  # T5 knows no line end behind it
    assert made.pad_id not in found.ids


def test_the_export_has_the_template(
    chatting: Path, transformers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers writes the same ids from the folder, and ends where a turn does."""
    text = "{{ bos_token }}" + templates.CHATML
    (tmp_path / "mine.jinja").write_text(text)
    lines = "".join(json.dumps({"messages": each}) + "\n" for each in TALKS * 8)
    for name in ("train", "held"):
        (tmp_path / f"{name}.jsonl").write_text(lines)
    data = dataclasses.replace(
        BASE.data,
        documents="auto",
        source=(str(tmp_path / "train.jsonl"),),
        validation_source=(str(tmp_path / "held.jsonl"),),
        tokenizer=str(chatting),
        sequence_length=64,
        chat="auto",
        chat_template=str(tmp_path / "mine.jinja"),
    )
    run(dataclasses.replace(override(BASE, train={"steps": 1}), data=data), tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert not end.value.code
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    made = tokenizer.load(str(tmp_path / "out"))
    assert made.hash == tokenizer.load(str(chatting)).hash
    for talk in TALKS:
        (found,) = Chat(made).encode([({"messages": talk}, "")])
        wanted = opened.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
        assert found.ids[: len(wanted)].tolist() == wanted
    assert (
        opened("Hi <|im_end|>").input_ids
        == opened("Hi <|im_end|>", add_special_tokens=False)["input_ids"]
    )
    assert model.generation_config.eos_token_id == made.eos_id  # a turn's end is the text's
    assert (opened.bos_token, opened.eos_token) == ("<|begin|>", "<|im_end|>")


# Two processes


def test_two_processes_are_one(chatting: Path, tmp_path: Path) -> None:
    """Of a batch no process has as many tokens that count as the other one; another order of
    additions in fp32: 1e-5."""
    lines = "".join(
        json.dumps({"messages": said("Why? " * (i % 7), "Because. " * (1 + i % 5))}) + "\n"
        for i in range(60)
    )
    for name in ("train", "held"):
        (tmp_path / f"{name}.jsonl").write_text(lines)
    data = dataclasses.replace(
        BASE.data,
        documents="auto",
        source=(str(tmp_path / "train.jsonl"),),
        validation_source=(str(tmp_path / "held.jsonl"),),
        tokenizer=str(chatting),
        sequence_length=96,
        chat="auto",
        chat_template="chatml",
    )
    config = dataclasses.replace(BASE, data=data)
    prepare(data, progress=False)
    alone = run(config, tmp_path / "alone")
    shared = override(config, parallel={"data": 2})
    launch(2, tmp_path, [Run("both", shared, "both")])
    told = [json.loads((tmp_path / f"both.{rank}.json").read_text())["told"] for rank in (0, 1)]
    assert told[0] == told[1]
    assert alone.after is not None
    assert told[0][:2] == [alone.step, alone.tokens]
    assert told[0][2] == pytest.approx(alone.after.loss, rel=1e-5)
