"""The paper's own runs by name: its protocol to the letter, and its perplexities beside a run's."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from crnet.cli.app import main
from crnet.config import presets
from crnet.config.serialize import flags, override
from crnet.errors import ConfigError
from crnet.paper import perplexities, protocol
from crnet.train.folders import new_run
from test_cli import train_words

SHARED = Path(os.environ.get("CRNET_SHARED") or Path(__file__).parents[2] / "shared")
PAPER = SHARED / "paper" / "cr-net-paper.md"
SIZES = ("60m", "130m", "350m", "1b", "7b", "13b")


@pytest.mark.parametrize("size", SIZES)
def test_the_protocol_to_the_letter(size: str) -> None:
    """5.1, E.2.1, tables 9 and 10, and the protocol that E.2.1 follows."""
    run, ours = presets.get(f"paper/llama-{size}"), presets.get(f"llama-{size}")
    data, train, optimizer = run.data, run.train, run.optimizer
    assert (data.source, data.subset, data.tokenizer) == (("allenai/c4",), "en", "t5-base")
    assert (data.rows, data.sequence_length, train.batch_size) == ("document", 256, 512)
    assert (train.precision, train.bf16_update) == ("bf16", "plain")
    assert (optimizer.name, optimizer.schedule, optimizer.clip_norm) == ("adamw", "cosine", 0)
    assert (optimizer.warmup_frac, optimizer.min_lr_frac) == (0.1, 0.1)
    assert (optimizer.weight_decay, optimizer.beta1, optimizer.beta2) == (0, 0.9, 0.999)
    assert run.model == ours.model
    assert (run.model.linear, run.model.rank) == ("crnet", "aligned-parameters")
    assert run.model.crnet.lr_factor == 0.25
    assert train.steps == ours.train.steps
    assert data.max_documents == train.steps * 512
    again = (train.recompute, train.recompute_layers, train.invert_tolerance)
    if size in ("7b", "13b"):
        assert again == ("invert", "every-8", 1e30)
    else:
        assert again[0] == "none"
    assert optimizer.lr in presets.RATES


def test_table_15_has_its_tokens() -> None:
    for size, billions in {"130m": 2.9, "350m": 8.0, "1b": 29.5}.items():
        run = presets.get(f"paper/llama-{size}-2048")
        assert run.data.sequence_length == 2048
        slots = run.train.steps * run.train.batch_size * 2048
        assert round(slots / 1e9, 1) == billions
        assert run.train.batch_size * 2048 == 512 * 256


def test_table_8() -> None:
    """A warm-up of 500 steps: a quarter of 2,000; of 100 all, and a fifth of the way."""
    tuned = presets.get("paper/table-8-llama3-8b")
    assert tuned.optimizer.warmup_frac * tuned.train.steps == 500
    start = presets.get("paper/table-8-llama3-8b-start")
    assert (start.optimizer.warmup_frac, start.train.steps) == (1.0, 100)
    assert start.optimizer.lr == pytest.approx(tuned.optimizer.lr * 100 / 500)
    gpt2 = presets.get("paper/table-8-gpt2")
    assert (gpt2.train.batch_size, gpt2.data.sequence_length) == (1024, 512)
    for name in presets.PAPER:
        if "table-8" in name:
            assert presets.get(name).model.linear == "full"


@pytest.mark.parametrize("name", presets.PAPER)
def test_every_difference_has_a_reason(name: str) -> None:
    found = protocol.differences(name)
    assert found
    assert all(each.why for each in found)
    base = protocol.base_of(name)
    taken = {each.key: each.paper for each in found}
    own = dict(flags(presets.get(base))) | taken | {"preset": name}
    assert own == dict(flags(presets.get(name)))


def test_every_reason_is_of_a_difference() -> None:
    keys = {each.key for name in presets.PAPER for each in protocol.differences(name)}
    used = {key if key in protocol.REASONS else key.partition(".")[0] for key in keys}
    assert used == set(protocol.REASONS)


def test_a_run_that_is_not_the_paper_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="paper/llama-60m"):
        protocol.base_of("llama-60m")
    with pytest.raises(SystemExit) as end:
        main(["protocol", "llama-60m"])
    assert end.value.code == 2
    assert protocol.beside(presets.get("llama-60m")) is None
    assert protocol.lines(presets.get("tiny")) == []


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["protocol", "paper/llama-60m", "--json"])
    assert not end.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["preset"] == "llama-60m"
    assert {each["key"] for each in found["differences"]} >= {"data.source", "train.precision"}
    assert "0.012" in found["left_open"]["optimizer.lr"]
    with pytest.raises(SystemExit):
        main(["protocol", "paper/llama-60m"])
    out = capsys.readouterr().out
    assert "--data.tokenizer  t5-base  (preset: train)" in out
    assert "table 3" in out


def test_what_a_run_may_have_otherwise() -> None:
    """Methods, ranks of the other column, the searched rate, what changes no figure; no corpus."""
    run = presets.get("paper/llama-60m")
    free = override(
        run,
        model={"rank": "aligned-memory", "vocab_size": 32_100},
        optimizer={"lr": 5e-3},
        train={"micro_batch_size": 16, "recompute": "replay", "seed": 3},
    )
    found = protocol.beside(free)
    assert found is not None
    assert found["differs"] == []
    other = override(run, data={"tokenizer": "gpt2", "rows": "packed"}, train={"steps": 5})
    found = protocol.beside(other)
    assert found is not None
    assert found["differs"] == ["--data.tokenizer", "--data.rows", "--train.steps"]
    assert protocol.lines(other)[-1].startswith("not comparable")


def test_names_of_runs_have_no_folder_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert new_run("paper/llama-60m-crnet").parent == Path("crnet-runs")


@pytest.mark.slow
def test_a_run_has_the_figures_beside_its_own(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = train_words(corpus, tmp_path / "run", train__steps="1")
    words[words.index("train") + 1 : words.index("train") + 1] = ["paper/llama-60m"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--data.tokenizer", "train", "--train.micro-batch-size", "8"])
    out, err = capsys.readouterr()
    assert not end.value.code, err
    assert "the paper's table 3: full 34.06; LoRA 34.99;" in out
    assert "not comparable with it, by --data.source, --data.tokenizer" in out
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    wanted = {"table": 3, "method": "full", "step": None, "perplexity": 34.06}
    assert manifest["published"]["rows"][0] == wanted


# The data


def test_models_of_the_data_are_runs() -> None:
    assert {f"paper/{each.model}" for each in perplexities.PERPLEXITIES} <= set(presets.PAPER)
    keys = [(each.table, each.model, each.method, each.step) for each in perplexities.PERPLEXITIES]
    assert len(set(keys)) == len(keys)


@pytest.mark.skipif(
    not PAPER.is_file(), reason=f"no {PAPER}; set CRNET_SHARED to the shared folder"
)
def test_the_data_are_those_of_the_paper() -> None:
    """Every perplexity of tables 3, 4, 6, 12, 13, 15 and 17 stands in the paper's table; of table 3
    row by row."""
    text = re.sub(r"\*\*|<b>|</b>|<i>|</i>|\*", "", PAPER.read_text(encoding="utf-8"))
    by_table: dict[int, set[str]] = {}
    for number in (3, 4, 6, 12, 13, 15, 17):
        body = text.partition(f"\nTable {number}:")[2].partition("\nTable")[0]
        by_table[number] = set(re.findall(r"\d+\.\d\d\b", body))
    for each in perplexities.PERPLEXITIES:
        assert f"{each.perplexity:.2f}" in by_table[each.table], dataclasses.astuple(each)
    names = {"full": "Full-rank", "APOLLO": "Apollo"}
    names |= {f"CR-Net, aligned {what}": "CR-Net" for what in ("parameters", "memory")}
    rows = text.partition("\nTable 3:")[2].partition("\n###")[0].splitlines()
    for method, figures in perplexities._TABLE_3.items():
        mark = {"CR-Net, aligned parameters": "diamond", "CR-Net, aligned memory": "dagger"}
        found = [
            re.findall(r"\d+\.\d\d\b", row)[::2]
            for row in rows
            if row.startswith(names.get(method, method)) and mark.get(method, "") in row
        ]
        assert figures.split() in found, method
