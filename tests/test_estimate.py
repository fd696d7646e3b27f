"""What a run will cost: predicted against measured, and the predictions' own arithmetic."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crnet import linears
from crnet.cli.app import main
from crnet.config import presets
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.config.units import GIB
from crnet.cost.hardware import DEVICES, communication_bytes, device, device_of
from crnet.cost.micro_batch import Precision
from crnet.cost.parameters import num_parameters
from crnet.cost.peak import peak_bytes
from crnet.cost.table import cost_rows, plans, titles
from crnet.cost.workload import Workload, with_linear, workload
from crnet.errors import ConfigError
from crnet.linears.crnet import CRNetOptions
from crnet.measure.profile import Probe, measured
from crnet.report import cost_plot
from test_cost import PRECISIONS, WIDE, random_case

CPU = torch.device("cpu")


def random_workload(linear: str, precision: Precision) -> Workload:
    """``test_cost.random_case`` as a run of two micro-batches a step."""
    micro_batch = random_case(linear, precision)
    config = override(
        RunConfig(model=micro_batch.spec.config),
        data={"sequence_length": micro_batch.length},
        train={
            "batch_size": 2 * micro_batch.sequences,
            "micro_batch_size": micro_batch.sequences,
            "precision": precision,
        },
    )
    return workload(config)


@pytest.mark.parametrize(
    ("linear", "precision"),
    [(name, PRECISIONS[idx % 3]) for idx, name in enumerate(linears.names())]
    + [("crnet", precision) for precision in PRECISIONS],
)
def test_predicted_is_measured(linear: str, precision: Precision):
    """Exact: parameters by term, state. (Kept bytes and FLOPs: test_cost.)"""
    work = random_workload(linear, precision)
    probe = Probe(work, CPU, rounds=1)
    assert probe.parameters() == num_parameters(work.spec)
    states = work.state_bytes
    assert probe.state() == states | {"total": sum(states.values())}


@pytest.mark.slow
def test_every_row_of_llama_60m():
    """The preset itself, two micro-batches of one row: every measured term, peaks within 5%."""
    config = override(
        presets.get("llama-60m"),
        train={"batch_size": 2, "micro_batch_size": 1, "recompute": "replay"},
    )
    work = workload(config)
    predicted = {(row.section, row.term): row for row in cost_rows(work, DEVICES["cpu"])}
    seen = measured(work, CPU, rounds=1)
    assert {row.section for row in seen} == {
        *("parameters", "state", "gradients", "kept", "peak", "memory", "flops", "seconds")
    }
    for row in seen:
        expected = predicted[row.section, row.term]
        assert expected.unit == row.unit
        if row.section == "seconds":
            assert row.value > 0
        elif row.section in ("peak", "memory") or row.term.startswith("memory at the peak"):
            assert abs(expected.value / row.value - 1) < 0.05, row
        else:
            assert expected.value == row.value, row


def test_full_rank_60m_has_the_published_number_of_parameters():
    """Norms included: 2 x 32,000 x 512, 8 blocks, 17 norms."""
    config = override(presets.get("llama-60m"), model={"linear": "full"})
    assert workload(config).num_parameters() == 58_073_600


def test_a_fixed_beta_costs_no_gradient_and_no_state():
    learned = override(presets.get("llama-60m"), train={"batch_size": 4})
    fixed = override(learned, model={"crnet": CRNetOptions(learnable_beta=False)})
    one, other = workload(learned).state_bytes, workload(fixed).state_bytes
    assert one["weights"] == other["weights"]
    assert one["gradients"] - other["gradients"] == 4 * 7 * 7
    assert one["optimizer state"] - other["optimizer state"] == (8 + 4) * 7 * 7


# --- communication, time --------------------------------------------------------------------------


def test_pipeline_communication_is_equation_48():
    """Table 21's 70B: micro-batch 16 x 4,096, 8 stages; table 22 prints 21.00 and 238.0. Three
    passes where what is kept on one side is rebuilt from the other's; else two, as the footnote has
    it for full rank, whose 21.00 is printed for three. Replay ends a segment at every boundary."""
    config = override(
        presets.get("llama-70b"),
        model={"rank": "2048"},
        data={"sequence_length": 4096},
        train={"batch_size": 16, "micro_batch_size": 16, "precision": "bf16"},
    )
    h, f = 8192, 21845
    cases = (
        ("crnet", "invert", 6 * h + 2 * f, 3, 238.0),
        ("crnet", "replay", 6 * h + 2 * f, 2, 158.7),
        ("crnet", "none", 6 * h + 2 * f, 2, 158.7),
        ("crnet", "block", 6 * h + 2 * f, 2, 158.7),
        ("full", "none", h, 2, 14.0),
        ("full", "block", h, 2, 14.0),
        ("full", "replay", h, 2, 14.0),
    )
    for linear, policy, width, passes, gib in cases:
        each = override(config, model={"linear": linear}, train={"recompute": policy})
        found = communication_bytes(workload(each), 8)
        assert found["pipeline, a boundary"] == 16 * 4096 * width * 2 * passes, (linear, policy)
        assert round(found["pipeline, all boundaries"] / 2**30, 1) == gib


def test_data_and_sharded_communication():
    config = override(presets.get("llama-60m"), train={"batch_size": 8, "micro_batch_size": 2})
    work = workload(config)
    states, found = work.state_bytes, communication_bytes(work, 4)
    assert found["data"] == 2 * 3 / 4 * states["gradients"]
    outside = 4 * sum(
        tensor.num_items for name, tensor in work.spec.tensors.items() if ".layers." not in name
    )
    gathered = 4 * (2 * states["weights"] - outside)  # four micro-batches
    scattered = work.num_micro_batches * states["gradients"]
    assert found["sharded"] == 3 / 4 * (gathered + scattered)
    # As they are stored: autocast comes after.
    mixed = workload(override(config, train={"precision": "bf16-mixed"}))
    assert communication_bytes(mixed, 4)["sharded"] == found["sharded"]
    assert communication_bytes(work, 1) == {}


@pytest.mark.parametrize("text", ["", "tpu", "1e12", "1e12,0", "-1,5", "1,2,3", "nan,1"])
def test_devices_that_are_unknown(text: str):
    with pytest.raises(ConfigError, match=r"--device .* is unknown; take a100-40g"):
        device(text)


@pytest.mark.parametrize(
    ("kind", "name", "found"),
    [
        ("cpu", "", "cpu"),
        ("cuda", "NVIDIA H100 80GB HBM3", "h100"),
        ("cuda", "NVIDIA H100 PCIe", "h100-pcie"),
        ("cuda", "NVIDIA H100 NVL", "h100-nvl"),
        ("cuda", "NVIDIA H200", "h200"),
        ("cuda", "NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("cuda", "NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("cuda", "NVIDIA A100 80GB PCIe", "a100-80g-pcie"),
        ("cuda", "NVIDIA L40S", "l40s"),
        ("cuda", "NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_devices_are_known_by_their_names(kind: str, name: str, found: str):
    assert device_of(kind, name) is DEVICES[found]


@pytest.mark.parametrize(
    "name",
    [
        *("Tesla T4", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GH200 480GB"),
        *("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "AMD Instinct MI300X"),
    ],
)
def test_a_device_that_is_unknown_is_taken_for_no_other(name: str):
    assert device_of("cuda", name) is None


def test_peaks_are_in_order():
    for each in DEVICES.values():
        assert each.bf16_flops_per_s >= each.tf32_flops_per_s >= each.fp32_flops_per_s > 0
        assert each.flops_per_s("fp32") == each.fp32_flops_per_s
        assert each.flops_per_s("bf16") == each.flops_per_s("bf16-mixed") == each.bf16_flops_per_s


# --- the commands ---------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 0
    return capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    return json.loads(run(capsys, *words, "--json"))


def terms_of(rows: list[dict], section: str) -> dict[str, float]:
    return {row["term"]: row["value"] for row in rows if row["section"] == section}


def test_cost_command(capsys: pytest.CaptureFixture[str]):
    size = ("--train.micro-batch-size", "4")
    words = ("cost", "llama-130m", *size, "--device", "h100", "--ranks", "2")
    found = run_json(capsys, *words)
    rows, titles = found["rows"], found["titles"]
    assert all(row.keys() == {"section", "term", "value", "unit"} for row in rows)
    assert {row["section"] for row in rows} == {*titles}
    assert terms_of(rows, "parameters")["total"] > 80e6
    assert {*terms_of(rows, "kept")} == {"none", "block", "replay", "invert"}
    assert terms_of(rows, "communication")
    assert "h100" in titles["seconds"]
    text = run(capsys, *words)
    assert all(title in text for title in titles.values())


def test_cost_follows_every_parameterization(capsys: pytest.CaptureFixture[str]):
    for linear in ("full", "lowrank"):
        rows = run_json(capsys, "cost", "llama-60m", "--model.linear", linear)["rows"]
        assert {*terms_of(rows, "kept")} == {"none", "block", "replay"}  # nothing to invert


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("cost", "--ranks", "0"), "--ranks is 0"),
        (("cost", "--device", "abacus"), "--device 'abacus'"),
        (("cost", "llama-9t"), "no preset is named"),
        (("cost", "--model.num-heads", "7"), "--model.num-heads"),
        (("profile", "--rounds", "0"), "--rounds is 0"),
        (("plan",), "no budget"),
        (("plan", "--parameters", "-1"), "--parameters is -1"),
        (("plan", "llama-60m", "--parameters", "30e6"), "embedding and head alone take 32.77M"),
        (("plan", "--parameters", "4e6", "--profile", "hilly"), "--profile hilly"),
        (("paper", "2", "--markdown"), "leave out 2"),
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
    for section in ("parameters", "state", "kept", "flops"):
        predicted, seen = (terms_of(found[side], section) for side in ("predicted", "measured"))
        assert seen
        assert seen == {term: predicted[term] for term in seen}
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
    rows = run_json(capsys, "cost", *found["command"][2:])["rows"]
    assert terms_of(rows, "parameters") == found["parameters"]
    text = run(capsys, *words)
    assert "binds: --parameters" in text
    assert text.splitlines()[-1].startswith("crnet train llama-350m --model.rank")


def test_plan_answers_in_one_way(capsys: pytest.CaptureFixture[str]):
    """The guard's layers are in the memory that the search is held to, and in the figures."""
    plain = ("--train.precision", "bf16", "--train.bf16-update", "plain")
    policy = ("--train.recompute", "invert", *plain)
    words = ("plan", "llama-350m", "--memory-gib", "2.4", *policy, "--train.micro-batch-size", "16")
    found = run_json(capsys, *words)
    assert 0.99 * 2.4 * GIB < found["peak_bytes"] <= 2.4 * GIB
    used = f"--memory-gib: {found['peak_bytes'] / GIB:.3f} GiB of 2.400 GiB"
    assert used in run(capsys, *words)
    rows = run_json(capsys, "cost", *found["command"][2:])["rows"]
    assert terms_of(rows, "memory")["invert"] == found["peak_bytes"]


@pytest.mark.slow
def test_paper_shows_table_10(capsys: pytest.CaptureFixture[str]):
    """Every published choice is found again from what it takes; 24 rows and three readings."""
    (table,) = run_json(capsys, "paper", "10")
    rows = table["rows"]
    published = [row for row in rows if row["reading"] == "published"]
    assert len(published) == 12
    assert all(abs(row["difference"]) < 0.01 for row in published)
    assert len(run(capsys, "paper", "10").splitlines()) == 1 + len(rows)


@pytest.mark.parametrize(
    "number", ["1", "2", "3", "19", "22", pytest.param("all", marks=pytest.mark.slow)]
)
def test_paper_command(capsys: pytest.CaptureFixture[str], number: str):
    assert "recomputed" in run(capsys, "paper", number)
    tables = run_json(capsys, "paper", number)
    assert len(tables) == (7 if number == "all" else 1)
    assert all(table.get("cells") or table["rows"] for table in tables)
    titles = [table["title"].partition(":")[0] for table in tables]
    assert titles == [
        f"Table {it}" for it in ([1, 2, 3, 4, 10, 19, 22] if number == "all" else [number])
    ]


def test_paper_tables_document_is_the_command(capsys: pytest.CaptureFixture[str]):
    page = Path(__file__).parents[1] / "docs" / "paper_tables.md"
    assert run(capsys, "paper", "--markdown") == page.read_text()


def test_cost_of_70b_is_answered_at_once():
    """Without torch. The bound is several times what a quiet machine takes, a third of a second."""
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
    assert min(spent) < 2


def test_picture(tmp_path: Path):
    config = override(presets.get("llama-60m"), train={"batch_size": 4})
    files = cost_plot.plot(config, tmp_path / "sub" / "cost.jpg")
    assert [file.name for file in files] == ["cost.png", "cost.svg"]
    assert all(file.stat().st_size > 10_000 for file in files)
    memory, flops = cost_plot.bars(config)
    assert {*memory} == {*flops}
    assert {name.split(",")[0] for name in memory} == {*linears.names()}
    for linear in linears.names():
        work = workload(with_linear(config, linear, config.model.rank))
        for policy, plan in plans(work).items():
            whole = sum(work.state_bytes.values()) + peak_bytes(work.micro_batch, plan)
            assert sum(memory[f"{linear}, {policy}"].values()) * GIB == pytest.approx(whole)


def test_wide_shape_is_a_valid_one():
    assert workload(RunConfig(model=WIDE)).num_parameters() > 0


def test_invert_with_its_guard_is_not_taken_for_algorithm_1():
    """The heading says how many outputs the guard adds; of the published algorithm it says none."""
    guarded = workload(override(presets.get("llama-60m"), train={"precision": "bf16"}))
    added = guarded.micro_batch.added_at_first(plans(guarded)["invert"])
    number = sum(map(len, added.values()))
    assert number
    assert titles(guarded)["kept"].endswith(f"invert with {number} outputs that its guard adds")
    assert "guard" not in titles(workload(presets.get("paper/llama-7b")))["kept"]
