"""``crnet report``: what is gathered is what the files say, and the page shows all of it.

Figures of the gathered data are equal to their source, by bits, unless a tolerance is named. The
page itself runs in a browser in test_report_browser.py.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from crnet.cli.app import main
from crnet.errors import ConfigError
from crnet.report import weights
from crnet.report.gather import gather, labels, open_run, thinned
from crnet.report.page import page
from crnet.storage import checkpoint, files, metrics
from test_train import rows_of, weights_of


class Reader(HTMLParser):
    """The tags of a page that is well formed, the cells of its heat maps, its words."""

    VOID = frozenset({"meta", "link", "input", "br", "img"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.data = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"] and self.tags[-1][1].get("id") == "data":
            self.data += data
        elif not {"script", "style"} & set(self.open):
            self.words += data

    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.tags if "id" in attrs]

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


# What is gathered


def test_curves_are_the_rows(runs: list[Path], gathered: dict[str, Any]) -> None:
    rows = rows_of(runs[0])
    found = gathered["runs"][0]
    for part, key in (("training", "loss"), ("validation", "val_loss")):
        wanted = [row for row in rows if key in row]
        assert found[part]["step"] == [row["step"] for row in wanted]
        # Seven digits are handed on.
        assert found[part][key] == pytest.approx([row[key] for row in wanted], rel=1e-6)
    assert found["summary"]["val_loss"] == rows[-1]["val_loss"]
    assert found["summary"]["state"] == "finished"
    assert found["problems"] == []


def test_a_row_shows_whatever_figures_it_has(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(runs[0], folder)
    rows = rows_of(folder)
    for row in rows:
        row |= {"peak_bytes": 7 << 20} if "loss" in row else {"val_bits_per_byte": 2.5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = gather([folder], samples=False)["runs"][0]
    assert set(found["training"]["peak_bytes"]) == {7 << 20}
    assert set(found["validation"]["val_bits_per_byte"]) == {2.5}
    assert found["summary"]["peak_bytes"] == 7 << 20
    assert "bits per byte" in page(gather([folder], samples=False))


def test_seconds_and_flops_of_the_curves(runs: list[Path], gathered: dict[str, Any]) -> None:
    training = [row for row in rows_of(runs[0]) if "loss" in row]
    found = gathered["runs"][0]
    tokens = [0, *(row["tokens"] for row in training)]
    seconds = sum(
        (after - before) / row["tokens_per_s"]
        for before, after, row in zip(tokens, tokens[1:], training, strict=False)
    )
    # A sum in another order, seven digits.
    assert found["training"]["seconds"][-1] == pytest.approx(seconds, rel=1e-6)
    assert found["validation"]["seconds"][0] == 0
    flops = found["training"]["flops"]
    assert flops == [flops[0] * step for step in found["training"]["step"]]
    assert flops[-1] == found["summary"]["flops"]


def test_gains_are_those_of_the_checkpoint(runs: list[Path], gathered: dict[str, Any]) -> None:
    saved = {name: w for name, w in weights_of(runs[0]).items() if name.endswith(".beta")}
    (found,) = gathered["runs"][0]["gains"]
    values = [value for row in found["values"] for value in row if value is not None]
    assert sorted(values) == sorted(weight.item() for weight in saved.values())
    assert found["count"] == len(saved) == 14  # seven positions of two blocks above the first
    assert found["values"][0] == [None] * 7
    assert sum(found["shares"].values()) == pytest.approx(1)
    middle = torch.tensor(values).double().abs().quantile(0.5)
    assert found["quantiles"]["0.5"] == middle.item()
    assert gathered["runs"][1]["gains"] == []


def test_singular_values_of_a_product_are_those_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, rank, columns in ((12, 4, 9), (5, 5, 7), (4, 6, 9)):
        a_DR = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
        b_RF = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
        wanted = torch.linalg.svdvals(a_DR @ b_RF)[:rank]
        torch.testing.assert_close(weights.product_values(a_DR, b_RF)[: len(wanted)], wanted)


def test_ranks_that_singular_values_say() -> None:
    """Of k equal values, and of one: k and 1. A matrix of zeros has none."""
    even = weights.spectrum(torch.full((5,), 3.0))
    assert (even["stable_rank"], even["effective_rank"]) == (pytest.approx(5), pytest.approx(5))
    one = weights.spectrum(torch.tensor([2.0, 0.0, 0.0]))
    assert (one["stable_rank"], one["effective_rank"]) == (pytest.approx(1), pytest.approx(1))
    none = weights.spectrum(torch.zeros(3))
    assert (none["stable_rank"], none["effective_rank"]) == (0, 0)
    long = weights.spectrum(torch.linspace(1, 0.1, 500))
    assert (long["at"][0], long["at"][-1], len(long["at"])) == (1, 500, weights.POINTS)


def test_spectra_are_of_every_map(gathered: dict[str, Any]) -> None:
    for found in gathered["runs"]:
        places = [(each["block"], each["position"]) for each in found["spectra"]]
        assert len(places) == len(set(places)) == 3 * 7
        for each in found["spectra"]:
            rank = found["ranks"]["values"][each["block"] - 1]
            rank = rank[found["ranks"]["positions"].index(each["position"])]
            assert rank is None or each["rank"] == rank
            assert 1 <= each["stable_rank"] <= each["effective_rank"] <= each["rank"]


def test_a_sample_is_the_same_every_time(runs: list[Path], gathered: dict[str, Any]) -> None:
    saved = checkpoint.resolve(runs[0])
    assert weights.sample(saved) == gathered["runs"][0]["sample"]
    assert gathered["runs"][0]["sample"]["text"]


def test_keys_that_differ(gathered: dict[str, Any], runs: list[Path]) -> None:
    found = gathered["differences"]
    assert found == {"columns": ["crnet", "full"], "rows": [["model.linear", "crnet", "full"]]}
    alone = gather(runs[:1], samples=False)["differences"]
    assert alone["columns"] == ["preset tiny", "crnet"]
    assert ["train.steps", 300, 12] in alone["rows"]


def test_many_rows_are_thinned_without_losing_a_spike() -> None:
    rows = [{"step": idx, "loss": 3.0 + idx % 7} for idx in range(50_000)]
    rows[31_234]["loss"], rows[777]["loss"] = 99.0, math.nan
    found = thinned(rows, "loss")
    assert len(found) <= 2000
    assert {49_999, 31_234, 777} <= {row["step"] for row in found}
    assert [row["step"] for row in found] == sorted(row["step"] for row in found)
    assert thinned(rows[:2000], "loss") == rows[:2000]


# What went wrong


def test_what_happened_is_told(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    manifest = json.loads((folder / "run.json").read_text())
    manifest["earlier_starts"] = [manifest | {"time": "earlier"}]
    manifest |= {"from_step": 4, "resumed_with": ["resumed with --optimizer.lr 1 (was 2)"]}
    (folder / "run.json").write_text(json.dumps(manifest))
    rows = [row for row in rows_of(folder) if row["step"] <= 10]
    rows[-2]["loss"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = gather([folder], samples=False)["runs"][0]["history"]
    assert [(each["kind"], each["step"]) for each in events] == [
        ("start", 0), ("start", 4), ("failure", 10), ("failure", 10),
    ]  # fmt: skip
    assert events[1]["text"] == "went on from step 4; resumed with --optimizer.lr 1 (was 2)"
    assert events[2]["text"] == "not finite: loss"
    assert events[3]["text"].startswith("stopped before its 12 steps")


def test_who_trains_is_seen(runs: list[Path]) -> None:
    assert open_run(runs[0], with_checkpoint=False).pid is None
    with files.alone(runs[0]):
        assert files.held_by(runs[0]) == os.getpid()
        assert files.held_by(runs[1]) is None
    assert files.held_by(runs[0]) is None


def test_damage_is_named_on_the_page(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(runs[0], folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2] = '{"step": 1, "loss": "low"}'
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for weight_file in folder.glob("checkpoints/*/model.safetensors"):
        weight_file.write_bytes(b"short")
    found = gather([folder])
    (run_,) = found["runs"]
    assert "line 3: is no row of figures (loss is 'low')" in run_["problems"][0]
    assert any("model.safetensors" in problem for problem in run_["problems"])
    assert (run_["checkpoint"], run_["sample"], run_["gains"]) == (None, None, [])
    reader = Reader(page(found))
    assert len(reader.with_class("alert")) == 1
    assert "line 3" in reader.words
    with pytest.raises(ConfigError, match=r"line 3: is no row of figures.*take the line out"):
        metrics.read(folder / "metrics.jsonl")


def test_weights_that_are_not_finite_are_named(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = weights_of(runs[0])
    broken["model.layers.1.mlp.up_proj.beta"].fill_(math.nan)
    monkeypatch.setattr(checkpoint.Checkpoint, "weights", lambda _: broken)
    (found,) = gather(runs[:1])["runs"]
    assert "model.layers.1.mlp.up_proj.beta is not finite" in found["problems"][0]
    assert (found["gains"], found["spectra"]) == ([], [])


def test_a_run_that_has_just_begun(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "begun"
    folder.mkdir()
    shutil.copy(runs[0] / "run.json", folder)
    found = gather([folder])
    assert found["runs"][0]["summary"]["train_loss"] is None
    assert found["runs"][0]["summary"]["state"] == "stopped"
    Reader(page(found))


def test_folders_that_are_no_runs(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, problem in (
        ([], "no run is named; say crnet report RUN"),
        ([tmp_path], "is no run's folder, there is no run.json in it"),
        ([runs[0], runs[0]], "named twice"),
        ([runs[0], "--no-samples", "--out", runs[0] / "run.json" / "x"], "name another file"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["report", *map(str, words)])
        assert end.value.code == 2
        assert problem in capsys.readouterr().err


def test_names_are_short_and_different() -> None:
    assert labels([Path("/a/run"), Path("/a/other")]) == ["run", "other"]
    assert labels([Path("/a/run"), Path("/b/run")]) == ["a/run", "b/run"]


# The page


def test_the_page_holds_every_part(gathered: dict[str, Any]) -> None:
    reader = Reader(page(gathered))
    ids = reader.ids()
    assert len(ids) == len(set(ids))
    assert {"curves", "runs", "differences", "run-0", "run-1", "data"} <= set(ids)
    assert len(reader.with_class("sortable")) == 2
    assert len(reader.with_class("chip")) == 2
    (gains,) = gathered["runs"][0]["gains"]
    grids = [row for each in gathered["runs"] for row in each["ranks"]["values"]]
    ranked = sum(value is not None for row in grids for value in row)
    two_kinds_of_rank = 2 * sum(len(each["spectra"]) for each in gathered["runs"])
    assert len(reader.with_class("cell")) == gains["count"] + ranked + two_kinds_of_rank
    drawn = json.loads(reader.data)["runs"]
    assert [run["name"] for run in drawn] == ["crnet", "full"]
    assert drawn[0]["training"] == gathered["runs"][0]["training"]
    for run_ in gathered["runs"]:
        assert f"{run_['summary']['val_loss']:.4f}" in reader.words


def test_the_page_asks_for_nothing_outside(gathered: dict[str, Any]) -> None:
    text = page(gathered)
    reader = Reader(text)
    for _, attrs in reader.tags:
        for key in ("src", "href", "action"):
            assert (attrs.get(key) or "#").startswith(("#", "data:")), attrs
    assert "url(" not in text.replace("url(#${", "")
    assert "@import" not in text


def test_text_of_a_run_cannot_become_markup(gathered: dict[str, Any]) -> None:
    evil = "</script><script>alert(1)</script><!--"
    found = json.loads(json.dumps(gathered))
    for run_ in found["runs"]:
        run_["name"] = run_["sample"]["text"] = run_["summary"]["device"] = evil
        run_["manifest"]["device"] = run_["history"][0]["text"] = evil
    text = page(found)
    assert evil[:20] not in text
    assert "<!--" not in text
    Reader(text)


def test_the_command_writes_page_and_json(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], gathered: dict[str, Any]
) -> None:
    out = tmp_path / "made" / "page.html"
    with pytest.raises(SystemExit) as end:
        main(["report", *map(str, runs), "--out", str(out), "--no-samples"])
    assert end.value.code == 0
    assert str(out) in capsys.readouterr().out
    assert "Sample" not in Reader(out.read_text(encoding="utf-8")).words
    with pytest.raises(SystemExit):
        main(["report", *map(str, runs), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(gathered))
