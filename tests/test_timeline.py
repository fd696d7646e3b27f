"""The timeline of a pipeline: torch's order of passes, closed forms of the bubble, the clock."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import _ComputationType

from crnet.cli.app import main
from crnet.config import presets
from crnet.config.sections import ParallelConfig, num_stages
from crnet.config.serialize import override
from crnet.cost.clock import WAYS, Way, clock_of
from crnet.cost.hardware import DEVICES, Device, device
from crnet.cost.plan_choice import usual_plan
from crnet.cost.stage_clock import num_kernels, stage_seconds, step_seconds
from crnet.cost.stages import Stage, boundary_bytes, cut, in_flight
from crnet.cost.timeline import equal_bubble, order, picture, simulate, timeline_of
from crnet.cost.workload import Workload, workload
from crnet.errors import ConfigError
from crnet.recompute.plan import RecomputePlan

SIZES = [(p, m) for p, most in ((2, 8), (3, 9), (4, 16)) for m in range(p, most + 1, p)]
CASES = [
    (schedule, processes, chunks, number)
    for processes, number in SIZES
    for schedule, chunks in (("1f1b", 1), ("interleaved", 2), ("interleaved", 3))
]


class Place:
    """As much of torch's stage as its schedules read; writes down what it is told to compute."""

    def __init__(self, idx: int, num_stages: int, processes: int):
        self.stage_index, self.num_stages = idx, num_stages
        self.group_size, self.group_rank = processes, idx % processes
        self.has_backward, self.is_first, self.is_last = True, idx == 0, idx == num_stages - 1
        self.submod, self.device = torch.nn.Identity(), torch.device("cpu")
        self.stage_index_to_group_rank = {each: each % processes for each in range(num_stages)}
        self.told: list[tuple[str, int, int]] = []

    def forward_one_chunk(self, number: int, *_: Any, **__: Any) -> None:
        self.told.append(("forward", self.stage_index, number))

    def backward_one_chunk(self, number: int, **_: Any) -> None:
        self.told.append(("backward", self.stage_index, number))

    def get_ops(self, _: int) -> list[Any]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = get_ops

    def perform_reduce_grad(self, _: int) -> None: ...


class OneByOne(Schedule1F1B):
    """Asks its stage for passes, and computes nothing."""

    def _initialize_stage(self, *_: Any) -> None: ...

    def _maybe_compute_loss(self, *_: Any) -> None: ...

    def _maybe_get_loss(self, *_: Any) -> None: ...


def torchs(schedule: str, process: int, processes: int, chunks: int, number: int) -> list[Any]:
    """The passes that torch's engine runs. ``Schedule1F1B.pipeline_order`` is no witness: torch
    2.13 draws it, numbers the last stage's forward passes from 1, and runs something else."""
    if schedule == "1f1b":
        stage: Any = Place(process, processes, processes)
        OneByOne(stage, number)._step_microbatches([()] * number, [{}] * number)
        return stage.told
    stages: list[Any] = [
        Place(idx, processes * chunks, processes)
        for idx in range(process, processes * chunks, processes)
    ]
    kinds = {_ComputationType.FORWARD: "forward", _ComputationType.FULL_BACKWARD: "backward"}
    return [
        (kinds[each.computation_type], each.stage_index, each.microbatch_index)
        for each in ScheduleInterleaved1F1B(stages, number).pipeline_order[process]
        if each is not None and each.computation_type in kinds
    ]


@pytest.mark.parametrize(("schedule", "processes", "chunks", "number"), CASES)
def test_the_order_is_torchs(schedule: str, processes: int, chunks: int, number: int):
    for process in range(processes):
        found = order(schedule, process, processes, processes * chunks, number)
        assert found == torchs(schedule, process, processes, chunks, number)
        assert len(found) == 2 * chunks * number


@pytest.mark.parametrize(("schedule", "processes", "chunks", "number"), CASES)
def test_equal_stages_have_the_closed_bubble(
    schedule: str, processes: int, chunks: int, number: int
):
    """(P - 1) / (v M + P - 1), v stages a process; whole numbers of seconds: exact."""
    num_stages = processes * chunks
    for forward, backward in ((1, 2), (1, 1), (3, 2)):
        found = simulate(
            schedule, [forward] * num_stages, [backward] * num_stages, number, processes
        )
        assert found.bubble == (processes - 1) / (chunks * number + processes - 1)
        assert found.seconds == (chunks * number + processes - 1) * (forward + backward)


@pytest.mark.parametrize(("schedule", "processes", "chunks", "number"), CASES)
def test_in_flight_is_the_cost_models(schedule: str, processes: int, chunks: int, number: int):
    num_stages = processes * chunks
    found = simulate(schedule, [1] * num_stages, [2] * num_stages, number, processes)
    stages = [Stage(idx, num_stages, idx, idx + 1) for idx in range(num_stages)]
    assert found.in_flight == tuple(in_flight(each, processes, number) for each in stages)


def test_passes_wait_for_what_they_read():
    """Unequal stages and boundaries: no process does two things at once, nothing is read early, and
    every pass begins as soon as it can."""
    forward, backward, sent = [3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8], [1, 2, 3, 2, 1]
    found = simulate("interleaved", forward, backward, 6, 3, sent)
    ends = {(each.direction, each.stage, each.micro_batch): each.end_s for each in found.spans}
    for process in range(3):
        row = found.of_process(process)
        assert row[0].start_s == (0 if process == 0 else ends["forward", process - 1, 0] + process)
        for before, each in itertools.pairwise(row):
            step = -1 if each.direction == "forward" else 1
            below = (each.direction, each.stage + step, each.micro_batch)
            come = 0
            if below in ends:
                come = ends[below] + sent[min(each.stage, each.stage + step)]
            assert each.start_s == max(come, before.end_s)
            length = (forward if each.direction == "forward" else backward)[each.stage]
            assert each.end_s - each.start_s == length
    assert len(ends) == 2 * 6 * 6


def test_the_slowest_stage_sets_the_pace():
    """1F1B, the last stage slower: the others wait for it, and before and after it works once."""
    found = simulate("1f1b", [1, 1, 2], [2, 2, 4], 100, 3)
    assert found.seconds == 2 * 1 + 100 * (2 + 4) + 2 * 2
    assert found.bubble == pytest.approx(1 - 100 * (3 + 3 + 6) / (3 * 606))


def test_sending_delays_the_first_and_the_last_micro_batch():
    """Two processes, one micro-batch: up and down once."""
    found = simulate("1f1b", [1, 1], [2, 2], 1, 2, 0.5)
    assert found.seconds == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("zero", [1], [1], 1, 1), "take 1f1b or interleaved"),
        (("1f1b", [1, 1], [1, 1], 2, 1), "take interleaved"),
        (("interleaved", [1] * 3, [1] * 3, 2, 2), "take a multiple"),
        (("interleaved", [1] * 4, [1] * 4, 3, 2), "multiple of 2 micro-batches, not 3"),
        (("1f1b", [1, 1], [1], 2, 2), "2 forward, 1 backward"),
        (("1f1b", [1, 1], [1, 1], 2, 2, [1, 1]), "2 transfer"),
        (("1f1b", [], [], 2, 0), "must be 1 or more"),
        (("1f1b", [1], [1], 0, 1), "must be 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(arguments: Any, words: str):
    with pytest.raises(ConfigError, match=words):
        simulate(*arguments)


# --- seconds of the cost model --------------------------------------------------------------------


def published(linear: str, precision: str) -> Workload:
    return workload(
        override(
            presets.get("llama-130m"),
            model={"linear": linear},
            train={"batch_size": 32, "micro_batch_size": 32, "precision": precision},
        )
    )


@pytest.mark.parametrize("policy", ["none", "block", "replay"])
@pytest.mark.parametrize("linear", ["full", "crnet"])
def test_stages_add_up_to_the_whole(linear: str, policy: Any):
    """In every way and precision: what a step takes without the optimizer, where the host is never
    the limit."""
    for precision, count in (("fp32", 2), ("bf16", 12), ("bf16-mixed", 5)):
        work = published(linear, precision)
        plan = usual_plan(work.micro_batch, policy)
        stages = cut(work.spec, count, work.micro_batch.length)
        whole = step_seconds(work, plan, device("5e13,900"))
        for way in WAYS:
            if f"{way}: total" not in whole:
                continue
            forward, backward = passes(work, stages, plan, device("5e13,900"), way)
            wanted = whole[f"{way}: total"] - whole[f"{way}: optimizer"]
            assert sum(forward) + sum(backward) == pytest.approx(wanted)
            assert len(forward) == len(backward) == count
            assert all(b > f > 0 for f, b in zip(forward[:-1], backward[:-1], strict=True))


def passes(
    work: Workload, stages: Sequence[Stage], plan: RecomputePlan, on: Device, way: Way = "eager"
) -> tuple[list[float], list[float]]:
    """Seconds of each stage, forward and backward."""
    computed = stage_seconds(clock_of(work.micro_batch, on), plan, stages, way=way)
    return [each.forward_s for each in computed], [each.backward_s for each in computed]


def test_the_head_is_in_the_last_forward_pass():
    """As much as the cost model says of the whole; the blocks below are alike."""
    work = published("full", "bf16")
    stages = cut(work.spec, 12, work.micro_batch.length)
    forward, backward = passes(work, stages, work.plan, device("5e13,900"))
    head = step_seconds(work, work.plan, device("5e13,900"))["eager: head"]
    assert forward[-1] - forward[-2] == pytest.approx(head, rel=0.05)
    assert forward[1:-2] == pytest.approx([forward[1]] * 9)
    assert backward[1:-2] == pytest.approx([backward[1]] * 9)


def test_no_pass_is_faster_than_its_host():
    """One short row on an H100: the host's operations are what takes the time."""
    work = workload(
        override(
            presets.get("llama-130m"),
            train={"batch_size": 1, "precision": "bf16"},
            data={"sequence_length": 64},
        )
    )
    stages = cut(work.spec, 4, 64)
    forward, backward = passes(work, stages, work.plan, device("h100"))
    kernels = num_kernels(clock_of(work.micro_batch, DEVICES["h100"]), work.plan)
    assert sum(forward) + sum(backward) == pytest.approx(kernels * DEVICES["h100"].issue_s)


def test_a_run_is_cut_and_timed_as_its_configuration_says():
    """The same stages, seconds and boundaries as the parts say one by one."""
    run = override(
        presets.get("llama-130m"),
        train={"batch_size": 8, "micro_batch_size": 1, "precision": "bf16"},
        parallel={"pipeline": 2, "schedule": "interleaved"},
    )
    work, on = workload(run), device("5e13,900")
    stages = cut(work.spec, 4, work.micro_batch.length)
    forward, backward = passes(work, stages, work.plan, on)
    sent = [boundary_bytes(work.micro_batch, each.bottom) / 1e9 for each in stages[1:]]
    assert min(sent) > 0
    for link, transfer in ((None, 0.0), (1e9, sent)):
        found = timeline_of(work, run.parallel, on, link)
        assert found == simulate("interleaved", forward, backward, 8, 2, transfer)
    with pytest.raises(ConfigError, match=r"--parallel\.pipeline 2 or more"):
        timeline_of(work, ParallelConfig(), on)


def test_the_picture_is_the_timeline():
    """A column a second: 1F1B of two processes, three micro-batches, backward twice forward."""
    found = simulate("1f1b", [1, 1], [2, 2], 3, 2)
    assert picture(found, 12) == ["01..aa2bb.cc", ".0aa1bb2cc.."]
    assert [found.waiting(process) for process in range(2)] == [0.25, 0.25]
    assert found.bubble == 0.25 == equal_bubble(2, 2, 3)


# --- the command ----------------------------------------------------------------------------------


def called(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int | str | None, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["timeline", *words])
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


RUN = ("llama-130m", "--parallel.pipeline", "2", "--train.micro-batch-size", "64")


def test_the_command_prints_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    code, out, _ = called(capsys, *RUN, "--json")
    found = json.loads(out)
    assert (code, found["micro_batches"], len(found["spans"])) == (0, 8, 2 * 2 * 8)
    run = override(
        presets.get("llama-130m"),
        train={"micro_batch_size": 64, "device": "cuda"},
        parallel={"pipeline": 2},
    )
    line = timeline_of(workload(run), run.parallel, device("h100"))
    assert (found["seconds"], found["bubble_frac"]) == (line.seconds, line.bubble)
    assert found["equal_stages_bubble_frac"] == 1 / 9
    code, out, err = called(capsys, *RUN, "--plot", str(tmp_path / "sub" / "line.jpg"))
    assert code == 0
    assert picture(line)[1] in out
    assert f"bubble {line.bubble:.4f}" in out
    files = [tmp_path / "sub" / f"line{ending}" for ending in (".png", ".svg")]
    assert err == "".join(f"picture {file}\n" for file in files)
    assert all(file.stat().st_size > 5_000 for file in files)


def test_copies_and_links_count(capsys: pytest.CaptureFixture[str]):
    """Two copies have half of the micro-batches each; a slow link makes the step longer."""
    whole, copies, slow = (
        json.loads(called(capsys, *RUN, *more, "--json")[1])
        for more in ((), ("--parallel.data", "2"), ("--link-gbps", "10"))
    )
    assert copies["micro_batches"] == whole["micro_batches"] / 2
    assert copies["bubble_frac"] > whole["bubble_frac"]
    assert slow["seconds"] > whole["seconds"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("llama-130m",), "--parallel.pipeline 2 or more"),
        ((*RUN, "--link-gbps", "0"), "--link-gbps is 0.0"),
        ((*RUN, "--device", "abacus"), "--device 'abacus' is unknown"),
        ((*RUN, "--plot", "/dev/null/line"), "--plot /dev/null/line: cannot be written"),
    ],
)
def test_bad_words_are_refused(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
):
    code, _, err = called(capsys, *words)
    assert code == 2
    assert message in err


# --- what was measured ----------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
COLUMNS = ("simulated", "sending", "passes", "measured")


def measured_table() -> list[str]:
    report = json.loads((ROOT / "benchmarks/2026-11-26-pipeline-bubble.json").read_text())
    lines = []
    for name, case in report["cases"].items():
        bubbles = [case["equal_stages"], *(case[column]["bubble_frac"] for column in COLUMNS)]
        cells = [f"{each:.3f}" for each in bubbles]
        cells += [f"{case[column]['seconds']:.2f}" for column in ("sending", "measured")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def test_the_document_has_what_was_measured():
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert "\n".join(measured_table()) in text


def test_what_was_simulated_then_is_simulated_now():
    report = json.loads((ROOT / "benchmarks/2026-11-26-pipeline-bubble.json").read_text())
    number = report["options"]["micro_batches"]
    for case in report["cases"].values():
        times = {**case["alone_s"], "micro_batches": number, "num_processes": case["processes"]}
        for column, transfer in (("simulated", 0.0), ("sending", case["send_s"])):
            found = simulate(case["schedule"], transfer=transfer, **times)
            assert found.bubble == pytest.approx(case[column]["bubble_frac"])
            assert found.seconds == pytest.approx(case[column]["seconds"])


def test_the_documents_figures_of_7b():
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for schedule in ("1f1b", "interleaved"):
        parallel = {"pipeline": 4, "schedule": schedule}
        run = override(presets.get("llama-7b"), train={"device": "cuda"}, parallel=parallel)
        work = workload(run)
        number, stages = work.num_micro_batches, num_stages(run.parallel)
        lines = [timeline_of(work, run.parallel, device("h100"), link) for link in (None, 50e9)]
        cells = [equal_bubble(4, stages, number), *(line.bubble for line in lines)]
        shown = " | ".join(f"{each:.3f}" for each in cells)
        assert f"| {schedule} | {shown} |" in text
