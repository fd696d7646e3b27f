"""What a run will cost: predicted against measured, and the predictions' own arithmetic."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crnet.cli.commands import main
from crnet.config import presets
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.cost import activations as cost
from crnet.cost import table as estimate
from crnet.cost.activations import Plan
from crnet.errors import ConfigError
from crnet.linears.crnet import CRNetOptions
from crnet.measure.profile import Probe, measured
from crnet.report import cost_plot as figures
from test_cost import WIDE, random_case

CPU = torch.device("cpu")


def random_config(seed: int) -> RunConfig:
    """``test_cost.random_case`` as a run of two micro-batches a step."""
    step, _ = random_case(seed)
    return override(
        RunConfig(model=step.model),
        data={"sequence_length": step.length},
        train={
            "batch_size": 2 * step.sequences,
            "micro_batch_size": step.sequences,
            "precision": step.precision,
        },
    )


@pytest.mark.parametrize("seed", range(30))
def test_predicted_is_measured(seed: int):
    """Exact: parameters by term, state, kept bytes under every policy, FLOPs."""
    config = random_config(seed)
    probe = Probe(config, CPU, rounds=1)
    assert probe.parameters() == estimate.num_parameters(config)
    step, states = estimate.step_of(config), estimate.state_bytes(config)
    plans = estimate.policies(config)
    assert set(plans) >= {"none", "block", "replay"}
    for plan in plans.values():
        added = cost.added_at_first(step, plan)  # by invert's guard, at the initial betas
        assert probe.kept(plan) == sum(cost.saved_activations(step, plan, added).values())
        flops = cost.block_flops(step, plan, added)
        if config.train.precision == "fp32":
            assert probe.backward_flops(plan) == flops["backward"] + flops["recompute"]
    forward, head = probe.forward_flops()
    predicted = estimate.step_flops(config, Plan())
    assert probe.state() == states | {"total": sum(states.values())}  # takes a step: betas move
    assert 2 * forward == predicted["blocks forward"]
    assert 2 * head == predicted["head forward"] + predicted["head backward"]


def test_the_whole_table_of_llama_60m():
    """The preset itself, two micro-batches of one row: every measured term, peaks within 5%."""
    config = override(
        presets.get("llama-60m"),
        train={"batch_size": 2, "micro_batch_size": 1, "recompute": "replay"},
    )
    found = estimate.table(config, estimate.device("cpu"))
    seen = measured(config, found, CPU, rounds=1)
    assert {section.split(",")[0].split(";")[0] for section in seen} >= {
        "parameters",
        "state",
        "activations kept",
        "activations at the peak",
        "memory at the peak",
        "FLOPs of a step",
    }
    for section, terms in seen.items():
        for term, number in terms.items():
            predicted = found[section][term]
            if section.startswith("seconds"):
                assert number > 0
            elif "peak" in section:
                assert abs(predicted / number - 1) < 0.05, (section, term)
            else:
                assert predicted == number, (section, term)


def test_full_rank_60m_has_the_published_number_of_parameters():
    """Norms included: 2 x 32,000 x 512, 8 blocks, 17 norms."""
    config = override(presets.get("llama-60m"), model={"linear": "full"})
    assert estimate.num_parameters(config)["total"] == 58_073_600


def test_a_fixed_beta_costs_no_gradient_and_no_state():
    learned = override(presets.get("llama-60m"), train={"batch_size": 4})
    fixed = override(learned, model={"crnet": CRNetOptions(learnable_beta=False)})
    one, other = estimate.state_bytes(learned), estimate.state_bytes(fixed)
    assert one["weights"] == other["weights"]
    assert one["gradients"] - other["gradients"] == 4 * 7 * 7
    assert one["optimizer state"] - other["optimizer state"] == (8 + 4) * 7 * 7


# --- communication, time --------------------------------------------------------------------------


def test_pipeline_communication_is_equation_48():
    """Table 21's 70B: micro-batch 16 x 4,096, 8 stages; table 22 prints 21.00 and 238.0."""
    config = override(
        presets.get("llama-70b"),
        model={"rank": "2048"},
        data={"sequence_length": 4096},
        train={"batch_size": 16, "micro_batch_size": 16, "precision": "bf16"},
    )
    full = override(config, model={"linear": "full"})
    h, f = 8192, 21845
    for its, width, printed in ((full, h, 21.0), (config, 6 * h + 2 * f, 238.0)):
        found = estimate.communication_bytes(its, 8)
        assert found["pipeline, a boundary"] == 16 * 4096 * width * 2 * 3
        assert round(found["pipeline, all boundaries"] / 2**30, 1) == printed


def test_data_and_sharded_communication():
    config = override(presets.get("llama-60m"), train={"batch_size": 8, "micro_batch_size": 2})
    states = estimate.state_bytes(config)
    found = estimate.communication_bytes(config, 4)
    assert found["data"] == 2 * 3 / 4 * states["gradients"]
    assert found["sharded"] == 3 / 4 * (2 * 4 * states["weights"] + states["gradients"])
    assert estimate.communication_bytes(config, 1) == {}


def test_time_is_a_roofline():
    config = override(presets.get("llama-60m"), train={"batch_size": 4})
    slow, fast = estimate.device("1e12,100"), estimate.device("4e12,400")
    for plan in (Plan(), Plan("block")):
        one, other = (estimate.step_seconds(config, plan, it) for it in (slow, fast))
        assert one["products"] == pytest.approx(estimate.step_flops(config, plan)["total"] / 1e12)
        assert one["total"] == pytest.approx(4 * other["total"])
        assert one["total"] == pytest.approx(sum(one.values()) - one["total"])


@pytest.mark.parametrize("text", ["", "tpu", "1e12", "1e12,0", "-1,5", "1,2,3", "nan,1"])
def test_devices_that_are_unknown(text: str):
    with pytest.raises(ConfigError, match=r"--device .* is unknown; take a100-40g"):
        estimate.device(text)


# --- the commands ---------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 0
    return capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    return json.loads(run(capsys, *words, "--json"))


def test_cost_command(capsys: pytest.CaptureFixture[str]):
    words = (
        "cost",
        "llama-130m",
        "--train.micro-batch-size",
        "4",
        "--device",
        "h100",
        "--ranks",
        "2",
    )
    found = run_json(capsys, *words)
    assert found["parameters"]["total"] > 80e6
    kept = next(its for name, its in found.items() if name.startswith("activations kept"))
    assert set(kept) == {"none", "block", "replay", "invert"}
    assert any(name.startswith("communication") for name in found)
    assert any("h100" in name for name in found)
    assert "GiB" in run(capsys, *words)


def test_cost_follows_every_parameterization(capsys: pytest.CaptureFixture[str]):
    for linear in ("full", "lowrank"):
        found = run_json(capsys, "cost", "llama-60m", "--model.linear", linear)
        kept = next(its for name, its in found.items() if name.startswith("activations kept"))
        assert set(kept) == {"none", "block", "replay"}  # nothing to invert


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("cost", "--ranks", "0"), "--ranks is 0"),
        (("cost", "--device", "abacus"), "--device 'abacus'"),
        (("cost", "--markdown"), "--markdown goes with"),
        (("cost", "llama-9t"), "no preset is named"),
        (("cost", "--model.num-heads", "7"), "--model.num-heads"),
        (("profile", "--rounds", "0"), "--rounds is 0"),
        (("plan",), "no budget"),
        (("plan", "--parameters", "-1"), "--parameters is -1"),
        (("plan", "llama-60m", "--parameters", "30e6"), "embedding and head alone take 32.77M"),
        (("plan", "--parameters", "4e6", "--profile", "hilly"), "--profile hilly"),
        (("cost", "--paper-table", "2", "--markdown"), "say --paper-table all"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str):
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_profile_command(capsys: pytest.CaptureFixture[str]):
    shape = ("--model.hidden-size", "32", "--model.intermediate-size", "48", "--model.rank", "4")
    small = ("--model.num-layers", "2", "--model.num-heads", "2", "--data.vocab-size", "300")
    words = ("profile", *shape, *small, "--data.sequence-length", "16", "--rounds", "1")
    found = run_json(capsys, *words)
    assert found["predicted"]["parameters"] == found["measured"]["parameters"]
    out = run(capsys, *words)
    assert "difference" in out
    assert out.count(" 0\n") > 20


def test_plan_command(capsys: pytest.CaptureFixture[str]):
    """The printed command's ranks, costed by themselves, are within the budget."""
    words = ("plan", "llama-350m", "--parameters", "200e6", "--flops-frac", "0.5")
    found = run_json(capsys, *words, "--multiple", "32", "--profile", "middle-heavy")
    assert found["parameters"]["total"] <= 200e6
    assert found["flops_frac"] <= 0.5
    assert found["command"][:3] == ["crnet", "train", "llama-350m"]
    again = run_json(capsys, "cost", *found["command"][2:])
    assert again["parameters"] == found["parameters"]
    text = run(capsys, *words)
    assert "binds: --parameters" in text
    assert text.splitlines()[-1].startswith("crnet train llama-350m --model.rank")


def test_plan_shows_table_10(capsys: pytest.CaptureFixture[str]):
    """Every published choice is found again from what it takes; 24 rows and three readings."""
    rows = run_json(capsys, "plan", "--table-10")
    published = [row for row in rows if row["reading"] == "published"]
    assert len(published) == 12
    assert all(abs(row["difference"]) < 0.01 for row in published)
    assert len(run(capsys, "plan", "--table-10").splitlines()) == len(rows)


@pytest.mark.parametrize("number", ["1", "2", "3", "19", "22", "all"])
def test_paper_tables_command(capsys: pytest.CaptureFixture[str], number: str):
    assert "recomputed" in run(capsys, "cost", "--paper-table", number)
    tables = run_json(capsys, "cost", "--paper-table", number)
    assert len(tables) == (5 if number == "all" else 1)
    assert all(table["cells"] for table in tables)


def test_paper_tables_document_is_the_command(capsys: pytest.CaptureFixture[str]):
    page = Path(__file__).parents[1] / "docs" / "paper_tables.md"
    assert run(capsys, "cost", "--paper-table", "all", "--markdown") == page.read_text()


def test_cost_of_70b_is_answered_at_once():
    """Without torch, in less than half a second of a core (not of a clock: others use it too)."""
    code = (
        "import sys; from crnet.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, "-c", code, "cost", "llama-70b"]
        subprocess.run(words, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5


def test_picture(tmp_path: Path):
    config = override(presets.get("llama-60m"), train={"batch_size": 4})
    files = figures.plot(config, tmp_path / "sub" / "cost.jpg")
    assert [file.name for file in files] == ["cost.png", "cost.svg"]
    assert all(file.stat().st_size > 10_000 for file in files)
    memory, flops = figures.bars(config)
    assert set(memory) == set(flops)
    assert {name.split(",")[0] for name in memory} == {"crnet", "full", "lowrank"}
    for name, parts in memory.items():
        linear, policy = name.split(", ")
        its = override(config, model={"linear": linear})
        plan = estimate.policies(its)[policy]
        whole = cost.peak_activations(estimate.step_of(its), plan)
        states = sum(estimate.state_bytes(its).values())
        assert sum(parts.values()) * 2**30 == pytest.approx(states + whole)


def test_wide_shape_is_a_valid_one():
    assert estimate.num_parameters(RunConfig(model=WIDE))["total"] > 0
