"""crnet compare: a study's file, its grids, what is judged and written; without training."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from crnet.compare import pictures, results, study, verdicts
from crnet.compare.align import figure, fitted
from crnet.compare.comparison import FAILED, GRAVEYARD, Comparison, evaluation_steps
from crnet.compare.foresight import foreseen, lines
from crnet.compare.rates import embedding_rates, warning
from crnet.compare.reuse import ASKED
from crnet.compare.study import Rule
from crnet.config.serialize import override, to_dict
from crnet.cost.step import step_flops
from crnet.cost.workload import workload
from crnet.errors import ConfigError
from crnet.inference.evaluate import Evaluation
from crnet.storage.checkpoint import folder_of

SHAPE = "model = { hidden_size = 32, intermediate_size = 64, num_layers = 3, num_heads = 2 }"
TEXT = f"""
seeds = [0, 1, 2]
reference = "full"
[base]
{SHAPE}
train = {{ steps = 40, batch_size = 4 }}
data = {{ vocab_size = 300, sequence_length = 16 }}
[tuning]
share = 0.25
grid."optimizer.lr" = [1e-3, 2e-3, 4e-3]
grow."optimizer.lr" = 1
[rule]
level = 0.05
[rows.full]
model.linear = "full"
[rows.crnet]
model = {{ linear = "crnet", rank = 8 }}
"""


def of(tmp_path: Path, text: str = TEXT, **more: Any) -> Comparison:
    return Comparison(study.parse("test", text), tmp_path / "out", **more)


def known(within: Comparison, row: str, losses: dict[float, float | None], step: int = 10) -> None:
    """Write runs of the first seed that ended, or failed, as if they had been trained."""
    for rate, loss in losses.items():
        chosen = within.study.rows[row]
        trial = within.trial(chosen, (("optimizer.lr", rate),), 0)
        write(within.folder(chosen, trial), loss, step)


def write(folder: Path, loss: float | None, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if loss is None:
        (folder / FAILED).write_text(json.dumps({"problem": "step 3: loss nan"}))
        return
    rows: list[dict[str, Any]] = [
        {"step": 0, **figures(loss + 1)},
        {"step": step, "tokens": step * 64, "loss": loss, "lr": 1e-3, "tokens_per_s": 100.0},
        {"step": step, **figures(loss)},
    ]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    folder_of(folder, step).mkdir(parents=True)


def edges(within: Comparison, name: str) -> list[tuple[str, int]]:
    """Where the best of a row stands."""
    row = within.study.rows[name]
    return within.edges(row, within.best(row))


def figures(loss: float) -> dict[str, Any]:
    return Evaluation(loss, tokens=100, accuracy=0.5, bytes=200).figures()


# The file


@pytest.mark.parametrize("name", study.names())
def test_built_in_studies_can_be_trained(name: str) -> None:
    """Each is read, checked row by row, and priced."""
    found = study.read(name)
    assert found.rows
    for row in found.rows.values():
        assert step_flops(workload(row.config), workload(row.config).plan)["total"] > 0


def test_the_issue_s_studies_are_there() -> None:
    sizes = {f"paper-{size}" for size in ("60m", "130m", "350m", "1b", "7b")}
    assert sizes | {"ablations-350m", "smoke", "small", "demo"} <= {*study.names()}


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ('reference = "full"', 'reference = "fulll"', "reference is 'fulll', which is no row"),
        ("seeds = [0, 1, 2]", "seeds = [0, 0]", "must list different numbers"),
        ("seeds = [0, 1, 2]", "seeds = [0]", "a rule needs two seeds"),
        ("seeds = [0, 1, 2]", "sedes = [0]", "unknown key sedes"),
        ("share = 0.25", "share = 0", "tuning.share is 0"),
        ("share = 0.25", "share = 0.25\nseeds = 4", "tuning.seeds is 4; it must be 1 to 3"),
        ("share = 0.25", "share = 0.25\nfinalists = 4", "tuning.finalists is 4; it must be 1 to 3"),
        ("[1e-3, 2e-3, 4e-3]", "[]", "must list different values"),
        (
            'grid."optimizer.lr"',
            'grid."model.init_std" = [-1.0]\ngrid."optimizer.lr"',
            "init-std is -1.0",
        ),
        ("[tuning]", '[tuning]\ngrid."model.rnk" = [3]', "no key model.rnk"),
        ('grid."optimizer.lr"', 'grid."train.seed"', "a seed is no setting"),
        ('grow."optimizer.lr" = 1', 'grow."model.rank" = 1', "names model.rank, which the grid"),
        ("[1e-3, 2e-3, 4e-3]", "[4e-3, 1e-3]", "only a grid of two or more rising numbers"),
        ("level = 0.05", "level = 2.0", "rule.level is 2.0"),
        ("level = 0.05", 'pairs = [["crnet"]]', "a pair is two rows"),
        ("rank = 8", "rnak = 8", "rows.crnet: unknown key 'rnak'"),
        ("rank = 8", "rank = 8000", "rows.crnet: --model.rank"),
        ('"crnet", rank', '"crnt", rank', "rows.crnet: --model.linear is 'crnt'"),
        ("[rows.crnet]", "[rows.crnet]\npublised = 1.0", "rows.crnet: unknown key publised"),
        ("[rows.crnet]", '[rows.crnet]\nalign = "flops"', "align and align_to go together"),
        ("[rows.crnet]", '[rows."a/b"]', "cannot be a folder"),
        ("[rows.crnet]", '[rows.crnet]\ngrid."optimizer.lr" = [1e-3]', "another number of points"),
        ("[rows.full]", "[rows.full", "is not well-formed TOML"),
        ("steps = 40", "epochs = 1", "leave train.epochs out"),
        ("steps = 40", "steps = 40, stop_after_steps = 5", "ends before tuning.share"),
        ("[base]", "[bse]\n[base]", "unknown key bse"),
        ("[base]", "[base]\nmodle.rank = 3", "modle is no section"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(was: str, now: str, said: str) -> None:
    assert was in TEXT
    with pytest.raises(ConfigError, match="test: ") as caught:
        study.parse("test", TEXT.replace(was, now, 1))
    assert said in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no study; there are ablations-1b, "):
        study.read("smal")
    with pytest.raises(ConfigError, match="there is no such file"):
        study.read(str(tmp_path / "mine.toml"))
    (tmp_path / "bad.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        study.read(str(tmp_path / "bad.toml"))


def test_settings_are_read_as_the_command_line_reads_them() -> None:
    settings = 'rank = 8 }\ntrain = { micro_batch_size = "none" }'
    row = study.parse("test", TEXT.replace("rank = 8 }", settings)).rows["crnet"]
    assert (row.config.model.rank, row.config.train.micro_batch_size) == ("8", None)
    assert row.config.model.hidden_size == 32


# Alignment


@pytest.mark.parametrize("kind", ["parameters", "memory", "flops"])
def test_a_row_gets_the_rank_that_comes_nearest(kind: Any) -> None:
    base = override(study.parse("test", TEXT).rows["crnet"].config, model={"hidden_size": 64})
    wanted = override(base, model={"rank": "13"})
    cola = override(base, model={"linear": "cola"})
    rank = int(fitted(cola, wanted, kind).model.rank)
    away = {
        each: abs(figure(override(cola, model={"rank": str(each)}), kind) - figure(wanted, kind))
        for each in range(1, 40)
    }
    assert away[rank] == min(away.values())


def test_rows_that_are_not_alike_are_refused_with_the_mend() -> None:
    text = TEXT.replace("rank = 8 }", 'rank = 8 }\nalign = "parameters"\nalign_to = "full"')
    with pytest.raises(ConfigError, match=r"has 0.7\d+ of the parameters of full.*rank = '\d+'"):
        study.parse("test", text)
    fitting = text.replace(", rank = 8", "")
    alignment = study.parse("test", fitting).rows["crnet"].alignment
    assert alignment is not None
    assert abs(alignment.ratio - 1) <= 0.01
    for other, why in (("crnet", "'crnet', which waits for it"), ("fll", "'fll', which is no row")):
        with pytest.raises(ConfigError, match=f"rows.crnet: align_to is {why}"):
            study.parse("test", text.replace('align_to = "full"', f'align_to = "{other}"'))


# Tuning


def test_every_row_is_tried_at_every_point(tmp_path: Path) -> None:
    within = of(tmp_path)
    for row in within.rows:
        trials = within.tuned(row)
        assert [each.config.optimizer.lr for each in trials] == [1e-3, 2e-3, 4e-3]
        assert {each.config.train.seed for each in trials} == {0}
        assert {each.config.train.steps for each in trials} == {40}


def test_the_grid_grows_for_every_row_where_one_stands_at_its_edge(tmp_path: Path) -> None:
    within = of(tmp_path)
    known(within, "full", {1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.5})
    known(within, "crnet", {1e-3: 3.0, 2e-3: 2.5, 4e-3: 2.0})
    assert edges(within, "full") == []
    assert edges(within, "crnet") == [("optimizer.lr", 1)]
    assert within.study.tuning
    assert within._wider(within.study.tuning) == ("optimizer.lr", 1)
    within.grow_as_known()
    for row in within.rows:
        assert [dict(point)["optimizer.lr"] for point in within.points(row)] == [
            *(1e-3, 2e-3, 4e-3, 8e-3)
        ]
    known(within, "crnet", {8e-3: 1.5})
    assert within._wider(within.study.tuning) is None, "it grew further than it may"
    assert edges(within, "crnet") == [("optimizer.lr", 1)]
    assert results.results(within)["rows"]["crnet"]["tuning"]["edges"] == ["optimizer.lr, largest"]


def test_grids_grow_below_too(tmp_path: Path) -> None:
    within = of(tmp_path)
    known(within, "full", {1e-3: 1.0, 2e-3: 2.0, 4e-3: 2.5})
    within.grow_as_known()
    assert within.grid(within.rows[0]) == {"optimizer.lr": [5e-4, 1e-3, 2e-3, 4e-3]}


def test_what_failed_is_never_the_best(tmp_path: Path) -> None:
    within = of(tmp_path)
    row = within.study.rows["full"]
    known(within, "full", {1e-3: 3.0, 2e-3: 2.0, 4e-3: None})
    assert within.best(row) == (("optimizer.lr", 2e-3),)
    found = results.results(within)
    assert results.failures(found) == ["full, lr 0.004: step 3: loss nan"]
    assert "failed" in results.tuning_table(found)


def test_the_best_at_the_end_is_chosen_among_the_finalists(tmp_path: Path) -> None:
    """Trials choose who goes on and where the grid grows; the last step chooses the point."""
    within = of(tmp_path, TEXT.replace("share = 0.25", "share = 0.25\nfinalists = 2"))
    row = within.study.rows["full"]
    known(within, "full", {1e-3: 3.0, 2e-3: 2.5, 4e-3: 2.0})
    assert foreseen(within, 1)["rows"]["full"]["runs"] == 4, "another finalist, and three seeds"
    assert [trial.values[0][1] for trial in within.finalists()["full"]] == [4e-3, 2e-3]
    assert within.finalists()["crnet"] == []
    known(within, "full", {4e-3: 1.5}, step=40)
    assert within.best(row) == (("optimizer.lr", 4e-3),), "the other one has not ended"
    assert foreseen(within, 1)["rows"]["full"]["runs"] == 3
    known(within, "full", {2e-3: 1.25}, step=40)
    assert within.best(row) == (("optimizer.lr", 2e-3),)
    assert [each.config.optimizer.lr for each in within.finals([1])["full"]] == [2e-3]
    assert within.study.tuning
    assert within._wider(within.study.tuning) == ("optimizer.lr", 1), "the best trial decides"
    found = results.results(within)
    tuning = found["rows"]["full"]["tuning"]
    assert [each["at_the_end"] for each in tuning["points"]] == [[], [1.25], [1.5]]
    assert tuning["tokens"] == (3 * 10 + 30) * 64, "three trials, and what the loser went on for"
    assert tuning["edges"] == []
    shown = results.markdown(found)
    assert "**2.5000 (1.2500)**" in shown
    assert "2.0000 (1.5000)" in shown
    assert "in brackets for the best 2" in shown
    assert foreseen(within, 1)["rows"]["full"]["runs"] == 2, "the two other seeds of the best"


def test_a_finalist_that_failed_leaves_the_other(tmp_path: Path) -> None:
    within = of(tmp_path, TEXT.replace("share = 0.25", "share = 0.25\nfinalists = 2"))
    row = within.study.rows["full"]
    known(within, "full", {1e-3: 3.0, 2e-3: 2.5, 4e-3: 2.0})
    known(within, "full", {4e-3: None})
    known(within, "full", {2e-3: 1.25}, step=40)
    assert within.best(row) == (("optimizer.lr", 2e-3),)


def test_runs_go_on_from_their_trial_and_end_where_the_study_says(tmp_path: Path) -> None:
    within = of(tmp_path, TEXT.replace("steps = 40", "steps = 40, stop_after_steps = 30"))
    known(within, "full", {1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.5})
    (final,) = within.finals([0])["full"]
    row = within.study.rows["full"]
    assert within.folder(row, final).name == "lr=0.002,seed=0"
    assert within.figures(row, final, None) is None
    write(within.folder(row, final), 1.5, 30)
    whole = within.figures(row, final, None)
    assert whole
    assert whole["val_loss"] == 1.5
    trial = within.figures(row, final, 0.25)
    assert trial
    assert trial["val_loss"] == 2.0, "the trial's own figure is lost"


@pytest.mark.parametrize(("stop", "steps"), [(256, 2048), (10, 40), (7, 70), (1000, 10_000)])
def test_trials_end_at_an_evaluation(stop: int, steps: int) -> None:
    every = evaluation_steps(stop, steps)
    assert stop % every == 0
    assert steps / every <= steps


# The folder


def test_what_another_version_of_the_study_began_goes_to_the_graveyard(tmp_path: Path) -> None:
    within = of(tmp_path)
    within.out.mkdir()
    within._begin()
    known(within, "full", {1e-3: 3.0})
    known(within, "crnet", {1e-3: 3.0})
    rows = within.study.rows.values()
    asked = {f"{row.name}/lr=0.001,seed=0": within.tuned(row)[0].config for row in rows}
    from crnet.config.serialize import to_dict

    text = json.dumps({name: to_dict(config) for name, config in asked.items()})
    (within.out / ASKED).write_text(text)
    other = of(tmp_path, TEXT.replace("rank = 8", "rank = 4"))
    other._begin()
    grave = other.out / GRAVEYARD
    assert (other.out / "full" / "lr=0.001,seed=0" / "metrics.jsonl").exists()
    assert not (other.out / "crnet" / "lr=0.001,seed=0").exists()
    buried = grave / "crnet" / "lr=0.001,seed=0"
    assert (buried / "metrics.jsonl").exists()
    said = json.loads((buried / "superseded.json").read_text())
    assert said["differs"] == {"model.rank": {"was": "8", "is": "4"}}
    assert (grave / "study.toml").read_text() == TEXT


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds something else than a study"):
        of(tmp_path)._begin()
    with pytest.raises(ConfigError, match="no such row; it has full, crnet"):
        of(tmp_path, only=("cola",))


def test_what_failed_can_be_tried_again(tmp_path: Path) -> None:
    within = of(tmp_path, retry=True)
    within.out.mkdir()
    (within.out / "study.toml").write_text(TEXT)
    known(within, "full", {4e-3: None})
    row = within.study.rows["full"]
    trial = within.tuned(row)[-1]
    assert within.figures(row, trial, 0.25) == {"problem": "step 3: loss nan"}
    from crnet.config.serialize import to_dict

    (within.out / ASKED).write_text(json.dumps({f"full/{trial.name}": to_dict(trial.config)}))
    within._begin()
    assert within.figures(row, trial, 0.25) is None


# What is called better


def test_welch_against_its_formula() -> None:
    """The statistic and its degrees of freedom from Welch 1947, p by integration of t's density."""
    ours, theirs = [3.51, 3.49, 3.53], [3.60, 3.55, 3.66, 3.58]
    parts = [statistics.variance(each) / len(each) for each in (ours, theirs)]
    t = (statistics.mean(ours) - statistics.mean(theirs)) / math.sqrt(sum(parts))
    sizes = (len(ours), len(theirs))
    freedom = sum(parts) ** 2 / sum(p**2 / (n - 1) for p, n in zip(parts, sizes, strict=True))
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    width = 1e-4
    inside = sum(
        scale * (1 + ((idx + 0.5) * width) ** 2 / freedom) ** (-(freedom + 1) / 2) * width
        for idx in range(int(abs(t) / width))
    )
    assert verdicts.welch(ours, theirs) == pytest.approx(1 - 2 * inside, abs=1e-4)


def test_holm_by_hand() -> None:
    assert verdicts.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert verdicts.holm([0.6, 0.7]) == [1.0, 1.0]
    assert verdicts.holm([]) == []


def test_a_tie_is_called_a_tie() -> None:
    losses: dict[str, list[float | None]] = {
        "base": [3.0, 3.005, 2.995],
        "better": [2.5, 2.51, 2.49],
        "worse": [3.5, 3.51, 3.49],
        "noisy": [2.0, 3.5, 3.2],
        "near": [2.96, 2.961, 2.959],
        "failed": [2.0, None, 2.0],
    }
    pairs = [(name, "base") for name in losses if name != "base"]
    rule = Rule(level=0.05, least_nats=0.05)
    called = {each.row: each for each in verdicts.judge(losses, pairs, rule)}
    assert {name: each.called for name, each in called.items()} == {
        "better": "better",
        "worse": "worse",
        "noisy": "tie",
        "near": "tie",
        "failed": "not judged",
    }
    assert "below 0.05 nats" in called["near"].why
    assert called["failed"].why.startswith("failed: not all seeds")
    assert verdicts.welch([1.0], [2.0]) is None
    assert verdicts.welch([1.0, 1.0], [2.0, 2.0]) == 0.0


def test_no_verdict_is_undone_by_a_run_that_ends_later() -> None:
    """Holm's correction counts the pairs that wait; it may only grow less strict."""
    base, near = [3.0, 3.01, 2.99], [3.03, 3.04, 3.02]
    pairs = [(name, "base") for name in ("near", "second", "third")]
    rule, found = Rule(level=0.03), {}
    for ended in (False, True):
        losses: dict[str, list[float | None]] = {
            "base": [*base],
            "near": [*near],
            "second": [*base] if ended else [3.0, None, None],
            "third": [*base] if ended else [],
        }
        found[ended] = verdicts.judge(losses, pairs, rule)
    p = verdicts.welch(near, base)
    assert p is not None
    assert p < rule.level < 3 * p, "without the pairs that wait it would be called"
    assert [each.called for each in found[False]] == ["tie", "not judged", "not judged"]
    assert found[True][0] == found[False][0]
    assert found[True][0].p_corrected == pytest.approx(3 * p)


@pytest.mark.parametrize("num_seeds", [2, 3, 6])
def test_what_a_rule_can_detect(num_seeds: int) -> None:
    """A difference a little larger is called, a little smaller one is a tie."""
    seeds = f"seeds = {list(range(num_seeds))}"
    text = TEXT.replace("seeds = [0, 1, 2]", seeds) + '[rows.third]\nmodel.linear = "cola"\n'
    wanted = study.parse("test", text)
    least = verdicts.detectable(wanted)
    assert least is not None
    spread = [1.0, -1.0] + [0.0] * (num_seeds - 2)
    unit = [each / statistics.stdev(spread) for each in spread]  # of deviation 1
    for times, called in ((1.01, "worse"), (0.99, "tie")):
        losses: dict[str, list[float | None]] = {"full": [*unit], "third": [*unit]}
        losses["crnet"] = [each + least * times for each in unit]
        assert wanted.rule is not None
        found = verdicts.judge(losses, wanted.pairs(), wanted.rule)
        assert [each.called for each in found] == [called, "tie"]
    nothing = study.parse("test", TEXT.replace("[rule]\nlevel = 0.05\n", ""))
    assert verdicts.detectable(nothing) is None


def test_the_rule_errs_as_often_as_it_says() -> None:
    """Of studies in which no row is better, about the level's share calls one so."""
    chance = random.Random(0)
    rule, wrong = Rule(level=0.1), 0
    names = ["a", "b", "c", "base"]
    pairs = [(name, "base") for name in names[:3]]
    for _ in range(400):
        losses = {name: [chance.gauss(3, 0.1) for _ in range(5)] for name in names}
        wrong += any(each.called != "tie" for each in verdicts.judge(losses, pairs, rule))
    assert 8 <= wrong <= 56  # 40 expected; Welch and Holm are both a little cautious


# Runs of other studies


def test_a_run_of_another_study_is_taken_where_it_is_the_same(tmp_path: Path) -> None:
    """Whatever its row is called there, and with other threads; not with another rank."""
    ours = of(tmp_path / "ours")
    known(ours, "full", {1e-3: 3.0, 2e-3: 2.0}, step=40)
    known(ours, "crnet", {1e-3: 3.0}, step=40)
    asked = {}
    for name, rate in (("full", 1e-3), ("full", 2e-3), ("full", 4e-3), ("crnet", 1e-3)):
        trial = ours.trial(ours.study.rows[name], (("optimizer.lr", rate),), 0)
        asked[f"{name}/{trial.name}"] = to_dict(trial.config)
    (ours.out / ASKED).write_text(json.dumps(asked))

    text = TEXT.replace('reference = "full"', 'reference = "dense"').replace("s.full]", "s.dense]")
    text = text.replace("rank = 8", "rank = 6").replace("steps = 40", "steps = 40, threads = 1")
    theirs = of(tmp_path / "theirs", text, reuse=(ours.out,))
    theirs.out.mkdir(parents=True)
    dense, other = theirs.study.rows["dense"], theirs.study.rows["crnet"]
    first, second, third = theirs.tuned(dense)
    assert theirs.elsewhere(dense, first, 0.25) is None, "not evaluated where a trial ends"
    assert theirs.elsewhere(dense, first, None) == ours.out / "full" / "lr=0.001,seed=0"
    assert theirs.elsewhere(dense, third, None) is None, "asked for, and not there"
    assert theirs.elsewhere(other, theirs.tuned(other)[0], None) is None, "another rank"
    assert not theirs.is_left(dense, second, None)

    (row,) = theirs._train({"dense": [second]}, None, None)
    assert row["from"] == str(ours.out / "full" / "lr=0.002,seed=0")
    assert (row["run"], row["val_loss"], row["step"]) == ("lr=0.002,seed=0", 2.0, 40)
    assert theirs.figures(dense, second, None) == ours.figures(ours.rows[0], second, None)
    assert theirs.elsewhere(dense, second, None) is None, "it is here"
    assert json.loads((theirs.out / ASKED).read_text()) == {
        "dense/lr=0.002,seed=0": to_dict(second.config)
    }
    with pytest.raises(ConfigError, match="is no folder of a study; name the --out of one"):
        of(tmp_path, reuse=(tmp_path / "none",))


# Rates


def test_how_fast_the_embedding_learns_beside_the_maps(tmp_path: Path) -> None:
    """1 at full rank, 4 at low rank, both in CR-Net, whose first block is dense; rows that differ
    are told so."""
    text = TEXT + '[rows.lowrank]\nmodel.linear = "lowrank"\n'
    wanted = {"full": (1.0, 1.0), "crnet": (1.0, 4.0), "lowrank": (4.0, 4.0)}
    rows = study.parse("test", text).rows
    assert {name: embedding_rates(workload(row.config)) for name, row in rows.items()} == wanted
    faster = override(rows["full"].config, model={"embedding_lr_factor": 4.0})
    assert embedding_rates(workload(faster)) == (4.0, 4.0)

    within = of(tmp_path, text)
    known(within, "full", {1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.5})
    said = "is not the same: full 1, crnet 1 to 4, lowrank 4; a part of what differs"
    assert said in "\n".join(lines(foreseen(within, 1)))
    assert said in results.markdown(results.results(within))
    alike = {name: {"embedding_rates": [4.0, 4.0]} for name in wanted}
    assert warning(alike, None) is None
    tuned = text.replace("[tuning]", '[tuning]\ngrid."model.embedding-lr-factor" = [1.0, 4.0]')
    assert "is not the same" not in "\n".join(lines(foreseen(of(tmp_path, tuned), 1)))


# What is written


def test_results_and_their_table(tmp_path: Path) -> None:
    within = of(tmp_path, TEXT.replace("[rows.full]", "[rows.full]\npublished = 34.06"))
    known(within, "full", {1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.5})
    known(within, "crnet", {1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.5})
    for name, losses in {"full": [1.5, 1.6, 1.7], "crnet": [1.0, 1.1, 1.2]}.items():
        row = within.study.rows[name]
        for seed, loss in enumerate(losses):
            trial = within.trial(row, (("optimizer.lr", 2e-3),), seed)
            write(within.folder(row, trial), loss, 40)
    found = results.results(within)
    full, ours = found["rows"]["full"], found["rows"]["crnet"]
    assert (full["val_loss"], ours["val_loss"]) == pytest.approx((1.6, 1.1))
    assert full["val_loss_sd"] == pytest.approx(0.1)
    work = workload(within.study.rows["crnet"].config)
    assert ours["flops_a_token"] == step_flops(work, work.plan)["total"] / 64
    assert ours["to_reach"]["seeds"] == 3
    assert ours["to_reach"]["flops"] == ours["to_reach"]["tokens"] * ours["flops_a_token"]
    (verdict,) = found["verdicts"]
    assert (verdict["row"], verdict["called"]) == ("crnet", "better")
    text = results.markdown(found)
    assert "| crnet (lr 0.002) | 0.7935 ± 0.0721 | 3.01 ± 0.30 | 1.1000 ± 0.1000 |" in text
    assert "34.06" in text
    assert "**2.0000**" in text
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(results.results(within)))


def test_where_a_curve_reaches_a_loss() -> None:
    curve = [(0, 5.0), (100, 4.0), (200, 2.0)]
    assert results.crossing(curve, 3.0) == 150
    assert results.crossing(curve, 5.0) == 0
    assert results.crossing(curve, 1.0) is None


def test_runs_of_two_commits_are_said() -> None:
    runs = [{"crnet": "1", "commit": "a", "dirty": False}, {"crnet": "1", "commit": "b"}]
    assert results.mixed({"full": {"runs": runs[:1]}}) == []
    assert "commit: a, b" in results.mixed({"full": {"runs": runs}})


def test_the_front_has_what_nothing_beats() -> None:
    points = [(3, 1.0), (1, 3.0), (2, 2.0), (2.5, 2.5), (4, 1.0)]
    assert pictures.pareto(points) == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_pictures_are_drawn(tmp_path: Path) -> None:
    within = of(tmp_path)
    known(within, "full", {1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.5})
    row = within.study.rows["full"]
    for seed in (0, 1, 2):
        trial = within.trial(row, (("optimizer.lr", 2e-3),), seed)
        write(within.folder(row, trial), 1.5 + seed, 40)
    drawn = pictures.draw(results.results(within), tmp_path)
    assert {path.name for path in drawn} == {
        f"{name}.{ending}" for name in ("curves", "costs", "tuning") for ending in ("png", "svg")
    }
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_what_is_foreseen(tmp_path: Path) -> None:
    """Tokens and FLOPs of what is left, exactly; a finished trial takes nothing more."""
    within = of(tmp_path)
    found = foreseen(within, 2)
    step = step_flops(workload(within.rows[0].config), workload(within.rows[0].config).plan)
    steps = 3 * 10 + 30 + 2 * 40
    assert found["rows"]["full"]["steps"] == steps
    assert found["rows"]["full"]["flops"] == steps * step["total"]
    assert found["tokens"] == 2 * steps * 64
    assert found["hours"] == pytest.approx(
        sum(row["seconds"] for row in found["rows"].values()) / 2 / 3600
    )
    known(within, "full", {1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.5})
    assert foreseen(within, 2)["rows"]["full"]["steps"] == 30 + 2 * 40
    assert "runs left" in lines(found)[0]
    whole = foreseen(of(tmp_path / "whole", TEXT.replace("share = 0.25", "share = 1.0")), 2)
    assert (whole["rows"]["full"]["runs"], whole["rows"]["full"]["steps"]) == (3 + 2, 5 * 40)
    assert found["jobs"] == 2
    assert lines(found)[-1].startswith("the rule, 3 seeds and 1 pair: about 2.3 deviations")
