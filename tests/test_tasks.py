"""lm-eval's tasks: what the harness's own HFLM answers for the same weights and tokenizer."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from crnet.cli.app import main
from crnet.data import tokenizer
from crnet.data.tokenizer import Tokenizer
from crnet.errors import ConfigError
from test_cli import train_words
from test_texts import small, transformers_llama

EXAMPLE = Path(__file__).parents[1] / "examples" / "last_word.yaml"
WINDOW = 24


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *words])
    code = end.value.code
    return (code if isinstance(code, int) else int(code is not None), *capsys.readouterr())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "run"
    with pytest.raises(SystemExit) as end:
        main(train_words(corpus, folder, train__steps="1"))
    assert not end.value.code
    return folder


@pytest.mark.slow
def test_options_that_would_have_no_effect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them at once."""
    code, _, err = asked(capsys, str(run), "--limit", "3", "--num-fewshot", "1", "--window", "8")
    assert code == 2
    for flag in ("--limit", "--num-fewshot", "--window"):
        assert flag in err
    code, _, err = asked(capsys, str(run), "--tasks", "x", "--stride", "3", "--limit", "0")
    assert code == 2
    assert "--stride has no effect" in err
    assert "--limit is 0" in err


@pytest.mark.slow
def test_a_missing_package_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = asked(capsys, str(run), "--tasks", str(EXAMPLE))
    assert code == 2
    assert "pip install 'crnet[eval]'" in err


def test_the_example_is_whole() -> None:
    """Sentences of several words, each with where it is from, and a last word to guess."""
    rows = [json.loads(line) for line in EXAMPLE.with_suffix(".jsonl").read_text().splitlines()]
    assert len(rows) >= 20
    for row in rows:
        assert set(row) == {"text", "source"}
        assert re.search(r"\w$", row["text"])


# With the harness itself


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    """A tokenizer, and its folder."""
    texts = [json.loads(line)["text"] for line in EXAMPLE.with_suffix(".jsonl").open()]
    folder = tmp_path_factory.mktemp("tokenizer")
    made = tokenizer.train(texts, 320)
    made.save(folder)
    return made, folder


@pytest.fixture(scope="module")
def both(trained: tuple[Tokenizer, Path]) -> tuple[Any, Any]:
    """Ours, and HFLM around transformers' LLaMA with the same weights."""
    pytest.importorskip("lm_eval")
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    from crnet.inference.tasks import HarnessModel

    made, folder = trained
    model = small(made.vocab_size, linear="full")
    theirs = transformers_llama(model)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token=tokenizer.END_OF_TEXT,
        pad_token=tokenizer.END_OF_TEXT,
    )
    hflm = HFLM(pretrained=theirs, tokenizer=fast, batch_size=3, max_length=WINDOW, device="cpu")
    return HarnessModel(model, made, WINDOW, batch_size=4), hflm


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
class TestBesideHFLM:
    def requests(self, kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        from lm_eval.api.instance import Instance

        return [Instance(kind, {}, each, idx) for idx, each in enumerate(arguments)]

    def test_loglikelihood(self, both: tuple[Any, Any]) -> None:
        """Short and long contexts, none, blanks at the end; many continuations of one context."""
        ours, theirs = both
        pairs = [
            ("", "Call me"),
            ("Call me ", "Ishmael"),
            ("Call me", " Ishmael"),
            ("Call me", " a"),
            ("It was the best of times, " * 5, "it was the worst"),
            ("x", "y"),
        ]
        found = ours.loglikelihood(self.requests("loglikelihood", pairs))
        wanted = theirs.loglikelihood(self.requests("loglikelihood", pairs))
        for (log, greedy), (their_log, their_greedy) in zip(found, wanted, strict=True):
            assert log == pytest.approx(their_log, rel=1e-5)
            assert greedy == their_greedy

    def test_greedy_continuations(self, both: tuple[Any, Any]) -> None:
        """What the model would write is the likeliest, in both."""
        ours, theirs = both
        prompts = ["Call me", "It was the best of times", "To be, or not to be, that", ""]
        wish = {"until": ["q", "\n"], "max_gen_toks": 9, "do_sample": False}
        arguments = [(prompt, dict(wish)) for prompt in prompts[:3]]
        found = ours.generate_until(self.requests("generate_until", arguments))
        wanted = theirs.generate_until(self.requests("generate_until", arguments))
        assert found == wanted
        assert any(found)
        assert len(ours.generate_until(self.requests("generate_until", [("", wish)]))) == 1

    def test_whole_texts(self, both: tuple[Any, Any]) -> None:
        """Longer than a window, an exact one, of one token."""
        ours, theirs = both
        texts = [("It was the season of Light. " * 6,), ("a",), ("Call me Ishmael",)]
        found = ours.loglikelihood_rolling(self.requests("loglikelihood_rolling", texts))
        wanted = theirs.loglikelihood_rolling(self.requests("loglikelihood_rolling", texts))
        assert found == pytest.approx(wanted, rel=1e-5)

    def test_a_whole_task(self, both: tuple[Any, Any]) -> None:
        from crnet.inference.tasks import evaluate_tasks

        ours, theirs = both
        for shots in (0, 1):
            found, wanted = (
                evaluate_tasks(lm, [str(EXAMPLE)], num_fewshot=shots)["tasks"]["last_word"]
                for lm in (ours, theirs)
            )
            assert found["num_fewshot"] == shots
            assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-4)
            assert found["acc"] == wanted["acc"]

    def test_word_perplexity_is_that_of_protocol_document(
        self, both: tuple[Any, Any], trained: tuple[Tokenizer, Path]
    ) -> None:
        from lm_eval.api.task import ConfigurableTask

        from crnet.inference.texts import evaluate_texts

        ours, _ = both
        texts = [json.loads(line)["text"] for line in EXAMPLE.with_suffix(".jsonl").open()]
        found = evaluate_texts(ours.model, trained[0], texts, "document", WINDOW).figures()
        logs = ours.loglikelihood_rolling(
            self.requests("loglikelihood_rolling", [(text,) for text in texts])
        )
        words = sum(len(re.split(r"\s+", text)) for text in texts)
        num_bytes = sum(len(text.encode()) for text in texts)
        assert ConfigurableTask.count_words is not None
        assert found["word_perplexity"] == pytest.approx(math.exp(-sum(logs) / words), rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(
            -sum(logs) / num_bytes / math.log(2), rel=1e-6
        )

    def test_what_a_task_cannot_ask(self, both: tuple[Any, Any]) -> None:
        ours, _ = both
        for wish, word in (
            ({"num_beams": 4, "max_gen_toks": 3}, "num_beams"),
            ({"max_gen_toks": WINDOW}, "larger --window"),
        ):
            with pytest.raises(ConfigError, match=word):
                ours.generate_until(self.requests("generate_until", [("a", wish)]))
        with pytest.raises(ConfigError, match="larger --window"):
            ours.loglikelihood(self.requests("loglikelihood", [("a", "to be or not " * 20)]))

    def test_draws_hang_on_the_seed_alone(self, both: tuple[Any, Any]) -> None:
        from crnet.inference.tasks import HarnessModel

        ours, _ = both
        wish = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8, "until": []}
        texts = []
        for seed in (0, 0, 1):
            lm = HarnessModel(ours.model, ours.ids_of, WINDOW, seed=seed)
            texts.append(lm.generate_until(self.requests("generate_until", [("Call", wish)])))
        assert texts[0] == texts[1] != texts[2]

    def test_the_command(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = [str(run), "--tasks", str(EXAMPLE), "--window", "64"]
        code, out, err = asked(capsys, *words, "--limit", "5", "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["tasks"]["last_word"]["documents"] == 5
        assert found["tasks"]["last_word"]["perplexity"] > 1
        code, out, err = asked(capsys, *words, "--num-fewshot", "1")
        assert code == 0, err
        assert "last_word (1 shots, 24 documents)" in out
        code, _, err = asked(capsys, words[0], "--tasks", "nowhere.yaml")
        assert code == 2
        assert "no such file" in err

    def test_a_name_that_the_harness_does_not_know(self) -> None:
        from lm_eval.tasks import TaskManager

        from crnet.inference import tasks

        with pytest.raises(ConfigError, match="no task of that name"):
            tasks._spec("no_such_task", TaskManager(include_defaults=False))

    def test_a_task_of_the_hub_without_network(
        self, both: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import datasets

        from crnet.inference.tasks import evaluate_tasks

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigError, match="connect to the network"):
            evaluate_tasks(both[0], ["lambada_openai"])
