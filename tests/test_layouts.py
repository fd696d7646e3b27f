"""Layouts on devices that are not here: closed forms by hand, legality, memory, the choice."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shlex
import subprocess
import sys
from functools import cache

import pytest

from crnet.cli.app import main
from crnet.config import presets
from crnet.config.check import check
from crnet.config.sections import (
    SIZES,
    ParallelConfig,
    RunConfig,
    num_processes,
    num_shares,
)
from crnet.config.serialize import override
from crnet.config.units import GIB
from crnet.cost import stage_clock
from crnet.cost.clock import Way, clock_of
from crnet.cost.fleet import REACHED_FRAC, START_S, Fleet, parse_fleet
from crnet.cost.hardware import DEVICES, tensor_bytes
from crnet.cost.layout_choice import CLOSE_FRAC, choose
from crnet.cost.layout_memory import gathered_at_once
from crnet.cost.layout_search import Layout, LayoutSpace
from crnet.cost.layout_seconds import pipeline_seconds, simulated_seconds
from crnet.cost.parts import part_of, stored_tensors
from crnet.cost.peak import peak_bytes
from crnet.cost.shared import bytes_of_rank
from crnet.cost.stage_clock import Seconds, stage_seconds
from crnet.cost.stage_memory import process_bytes
from crnet.cost.stages import cut
from crnet.cost.workload import workload
from crnet.errors import ConfigError
from crnet.recompute.plan import POLICIES, Policy, RecomputePlan

H100 = DEVICES["h100"]


def small(**train) -> RunConfig:
    model = {"hidden_size": 512, "intermediate_size": 1376, "num_layers": 8, "num_heads": 8}
    config = override(presets.get("llama-60m"), model=model | {"rank": "128"})
    return override(config, train={"batch_size": 64} | train, data={"sequence_length": 1024})


@cache
def space(number: int = 16, node: int = 8, linear: str = "crnet") -> LayoutSpace:
    config = override(small(), model={"linear": linear})
    return LayoutSpace(config, parse_fleet(f"{number}xh100", node))


def layouts(of: LayoutSpace) -> list[Layout]:
    return [
        Layout(parallel, size, policy, compiles)
        for parallel in of.sizes
        for policy, compiles in of.ways(parallel)
        for size in of.micro_batches(parallel)
    ]


# Devices


def test_fleets() -> None:
    fleet = parse_fleet("64xh100")
    assert (fleet.device, fleet.size, fleet.node) == (H100, 64, 8)
    assert parse_fleet("h100") == Fleet(H100, 1, 1, 50e9)
    assert parse_fleet("4xh200", 2, 100).network_bytes_per_s == 12.5e9
    # What is left free holds where a sheet's GB are of 10^9 bytes, too.
    assert parse_fleet("a100-80g").memory_bytes < 80e9 < 80 * GIB


@pytest.mark.parametrize("text", ["", "x", "8x", "0xh100", "xh100", "8xtpu", "4xcpu", "-1xh100"])
def test_fleets_that_are_unknown(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--devices .* is unknown; write .*64xh100"):
        parse_fleet(text)


def test_machines_are_full() -> None:
    with pytest.raises(ConfigError, match="machines of 8 leaves one part empty"):
        parse_fleet("12xh100")
    with pytest.raises(ConfigError, match="--node is 0"):
        parse_fleet("8xh100", 0)
    with pytest.raises(ConfigError, match="--network-gbps is 0"):
        parse_fleet("8xh100", 8, 0)


def test_rates_by_hand() -> None:
    """64 devices, eight a machine; NVLink 450 GB/s, network 50 GB/s a device."""
    fleet = parse_fleet("64xh100")
    # Inside a machine; all of them, whose machines bring eight cards; one member in each machine.
    assert fleet.ring_bytes_per_s(8, 1) == 0.8 * 450e9
    assert fleet.ring_bytes_per_s(64, 1) == 0.8 * 400e9
    assert fleet.ring_bytes_per_s(8, 8) == 0.8 * 50e9
    assert fleet.ring_bytes_per_s(16, 4) == 0.8 * 100e9
    assert fleet.gather_s(8e9, 8, 1) == 7e9 / 0.8 / 450e9 + START_S
    assert fleet.sum_s(8e9, 8, 8, 3) == 14e9 / 0.8 / 50e9 + 3 * START_S
    assert fleet.sum_s(8e9, 1, 1) == 0
    assert fleet.send_s(1e9, 2, 4) == 1e9 / REACHED_FRAC / 450e9 + START_S
    assert fleet.send_s(1e9, 2, 8) == 1e9 / REACHED_FRAC / 50e9 + START_S


# Seconds


def of(parallel: ParallelConfig, size: int = 2, policy: Policy = "none"):
    found = space(num_processes(parallel), 8, "full")
    return found, found.of(Layout(parallel, size, policy, False))


def alone_s(size: int, number: int) -> tuple[float, float]:
    """Forward and backward of one micro-batch on one process."""
    train = {"batch_size": size * number, "micro_batch_size": size, "device": "cuda"}
    work = workload(override(small(**train), model={"linear": "full"}))
    on = clock_of(work.micro_batch, H100)
    (alone,) = stage_seconds(on, work.plan, cut(work.spec, 1, 1024))
    return alone.forward_s, alone.backward_s


def optimizer_s(state_bytes: float, gradients: float) -> float:
    """fp32 weights, two moments: read and written; gradients read."""
    return (2 * state_bytes + gradients) / (0.8 * H100.bytes_per_s)


def test_seconds_of_copies_by_hand() -> None:
    parallel = ParallelConfig(data=8)
    found, work = of(parallel)
    forward, backward = alone_s(2, 4)
    gradients = 4 * work.num_parameters()
    sums = 2 * 7 / 8 * gradients / (0.8 * 450e9) + (1 + gradients // (25 * 2**20)) * START_S
    states = work.state_bytes
    after = optimizer_s(states["weights"] + states["optimizer state"], gradients)
    seconds = found.price(Layout(parallel, 2, "none", False)).seconds
    # The sums hide behind the last of four backward passes.
    overlapped = 4 * (forward + backward) + max(0.0, sums - backward) + after
    assert seconds.overlapped == pytest.approx(overlapped, rel=1e-9)
    assert seconds.apart == pytest.approx(4 * (forward + backward) + sums + after, rel=1e-9)
    assert seconds.bubble_frac == pytest.approx(0, abs=1e-12)


def test_seconds_of_a_split_model_by_hand() -> None:
    parallel = ParallelConfig(shard=8)
    found, work = of(parallel)
    forward, backward = alone_s(2, 4)
    sizes = {name: 4 * each.num_items for name, each in work.spec.tensors.items()}
    blocks = sum(size for name, size in sizes.items() if ".layers." in name)
    whole, layers, rate = sum(sizes.values()), work.spec.num_layers, 0.8 * 450e9
    gather = 7 / 8 * whole / rate + (layers + 1) * START_S
    again = 7 / 8 * blocks / rate + layers * START_S
    held = bytes_of_rank(work.spec.tensors, work.optimizer, parallel, 0).held
    scatter = 7 / 8 * 8 * held["gradients"] / rate + (layers + 1) * START_S
    after = optimizer_s(held["weights"] + held["optimizer state"], held["gradients"])
    seconds = found.price(Layout(parallel, 2, "none", False)).seconds
    step = max(backward, again + scatter)
    overlapped = 4 * (max(forward, gather) + step) + after
    assert seconds.overlapped == pytest.approx(overlapped, rel=1e-9)
    apart = 4 * (forward + gather + backward + again + scatter) + after
    assert seconds.apart == pytest.approx(apart, rel=1e-9)


def test_seconds_of_parts_by_hand() -> None:
    """Sums are waited for in both figures; at full rank four a block, h wide."""
    parallel = ParallelConfig(tensor=8)
    found, work = of(parallel)
    number, rows = 32, 2 * 1024
    widths = 4 * 512 * 8
    assert abs(tensor_bytes(work) - number * rows * 2 * widths) < 8
    one = 2 * 7 / 8 * rows * 2 * widths / (0.8 * 450e9) + 4 * 8 * START_S
    tensors = stored_tensors(work.spec.in_parts(0, 8))
    on = clock_of(work.micro_batch, H100)
    (alone,) = stage_seconds(on, work.plan, cut(work.spec, 1, 1024), tensors)
    items = sum(each.num_items for each in tensors.values())
    seconds = found.price(Layout(parallel, 2, "none", False)).seconds
    # AdamW counts its steps, 4 bytes a tensor.
    after = optimizer_s(12 * items + 4 * len(tensors), 4 * items)
    wanted = number * (alone.both_s + one) + after
    assert seconds.overlapped == seconds.apart == pytest.approx(wanted, rel=1e-6)


def test_seconds_of_equal_stages_by_hand() -> None:
    """(P - 1)/(M + P - 1) of the time, half of that with two stages a process; pass by pass too."""
    equal = Seconds(1.0, 2.0)
    for schedule, chunks in (("1f1b", 1), ("interleaved", 2)):
        parallel = ParallelConfig(pipeline=4, schedule=schedule)
        for way in (pipeline_seconds, simulated_seconds):
            seconds, bubble = way(parallel, [equal] * 4 * chunks, 8, 0.0)
            assert seconds == pytest.approx(3.0 * (8 * chunks + 3)), (schedule, way)
            assert bubble == pytest.approx(3 / (8 * chunks + 3)), (schedule, way)


def test_the_closed_form_of_a_pipeline_is_near_the_simulated_one() -> None:
    """Stages that differ, transfers: within 15% (sending while others compute costs less)."""
    stages = [Seconds(1.0, 2.0), Seconds(1.1, 2.1), Seconds(0.9, 2.0), Seconds(1.3, 2.4)]
    for number, transfer in itertools.product((4, 8, 32), (0.0, 0.1)):
        parallel = ParallelConfig(pipeline=4)
        closed, _ = pipeline_seconds(parallel, stages, number, transfer)
        exact, _ = simulated_seconds(parallel, stages, number, transfer)
        assert closed == pytest.approx(exact, rel=0.15), (number, transfer)


@pytest.mark.parametrize("policy", ["none", "block", "replay"])
def test_blocks_that_are_alike_are_priced_once(policy: Policy, monkeypatch) -> None:
    """As if each were priced: its kind has all that a block's seconds follow from."""
    config = small(device="cuda", recompute=policy, micro_batch_size=2)
    work = workload(override(config, model={"linear": "crnet", "rank": "64x3,96x4"}))
    stages = cut(work.spec, 3, 1024)
    on = clock_of(work.micro_batch, H100)
    ways: list[Way] = ["eager", "compiled"] if policy != "replay" else ["eager"]
    once = [stage_seconds(on, work.plan, stages, way=way) for way in ways]
    priced = []
    block = stage_clock._block
    monkeypatch.setattr(stage_clock, "_block", lambda *of: priced.append(of) or block(*of))
    assert once[0] == stage_seconds(on, work.plan, stages)
    assert len(priced) < work.spec.num_layers
    monkeypatch.setattr(stage_clock, "_kind", id)
    assert once == [stage_seconds(on, work.plan, stages, way=way) for way in ways]


# Legality


def test_layouts_are_legal_and_complete() -> None:
    """Each is taken by ``config.check``; and of all products that it takes, none is left out."""
    of = space()
    found = layouts(of)
    for layout in found:
        config = of.config_of(layout)
        check(config)
        assert num_processes(config.parallel) == 16
    legal = set()
    for sizes in itertools.product((1, 2, 4, 8, 16), repeat=4):
        named = dict(zip(SIZES, sizes, strict=True))
        if ParallelConfig(**named).tensor > 8 or num_processes(ParallelConfig(**named)) != 16:
            continue
        config = override(of.base, parallel=named, train={"micro_batch_size": 1})
        with contextlib.suppress(ConfigError):
            check(config)
            legal.add(tuple(sizes))
    assert legal == {
        tuple(getattr(each.parallel, key) for key in SIZES)
        for each in found
        if each.parallel.schedule == "1f1b"
    }


def test_what_is_given_is_kept() -> None:
    config = small(recompute="block", micro_batch_size=2, compile=True)
    found = layouts(LayoutSpace(config, parse_fleet("8xh100")))
    assert found
    assert {(it.policy, it.micro_batch_size, it.compiles) for it in found} == {("block", 2, True)}
    with pytest.raises(ConfigError, match=r"--parallel.data 2: crnet plan --devices finds it"):
        LayoutSpace(override(config, parallel={"data": 2}), parse_fleet("8xh100"))
    with pytest.raises(
        ConfigError, match=r"--train.keep-as nf4: .* weighs activations as they are"
    ):
        LayoutSpace(small(keep_as="nf4"), parse_fleet("8xh100"))


# Memory


def test_memory_is_that_of_the_closed_forms() -> None:
    """Of copies, a split model and a pipeline, by the functions that measured processes confirm.
    A split stage is measured in test_pipeline.py."""
    of = space(8, 8)
    for layout in layouts(of):
        sizes, work, peak = layout.parallel, of.of(layout), of.peak(layout)
        if sizes.tensor > 1 or sizes.pipeline > 1 < sizes.shard:
            continue
        if sizes.pipeline > 1:
            every = [sum(each.values()) for each in process_bytes(work, sizes)]
            plan = work.plan
            moment = peak_bytes(work.micro_batch, plan) - _kept(work, plan)
            assert peak == max(every) + max(0, moment), layout
            continue
        state = max(
            sum(bytes_of_rank(work.spec.tensors, work.optimizer, sizes, rank).held.values())
            for rank in range(sizes.shard)
        )
        state += gathered_at_once(work, sizes, work.spec.tensors) if sizes.shard > 1 else 0
        assert peak == state + peak_bytes(work.micro_batch, work.plan), layout


def _kept(work, plan: RecomputePlan) -> int:
    from crnet.cost.kept import kept_bytes

    return sum(kept_bytes(work.micro_batch, plan).values())


def test_what_a_split_model_gathers_by_hand() -> None:
    """Full rank: blocks are equal."""
    _, work = of(ParallelConfig(shard=8))
    split, stage = ParallelConfig(shard=8), ParallelConfig(shard=4, pipeline=2)
    sizes = {name: 4 * each.num_items for name, each in work.spec.tensors.items()}
    block = sum(size for name, size in sizes.items() if ".layers.0." in name)
    outside = sum(size for name, size in sizes.items() if ".layers." not in name)
    one = outside + 3 * block + 2 * max(block, outside)
    assert gathered_at_once(work, split, work.spec.tensors) == one
    # In a pipeline of several micro-batches all gradients stay whole until the last.
    several = outside + 3 * block + sum(sizes.values()) + max(block, outside)
    assert gathered_at_once(work, stage, work.spec.tensors) == several
    once = dataclasses.replace(work, num_micro_batches=1)
    assert gathered_at_once(once, stage, work.spec.tensors) == one


def test_parts_take_less_and_together_no_less() -> None:
    """Of activations: what is whole on every process is counted there."""
    for linear in ("full", "crnet", "lowrank"):
        work = workload(override(small(micro_batch_size=2), model={"linear": linear}))
        whole = work.micro_batch
        for policy in POLICIES[:2]:
            plan = RecomputePlan(policy)
            two, four = (peak_bytes(part_of(whole, parts), plan) for parts in (2, 4))
            assert four <= two <= peak_bytes(whole, plan) <= 2 * two, (linear, policy)
            # Beside the loss, which every process computes whole.
            assert four < two or policy == "block"
        assert part_of(whole, 1) is whole


# The choice


def test_the_choice_fits_and_is_the_simplest_of_the_fastest() -> None:
    config = override(presets.get("llama-130m"), data={"sequence_length": 2048})
    choice = choose(config, parse_fleet("16xh100"))
    best, most = choice.best, choice.space.fleet.memory_bytes
    for each in choice.layouts:
        assert each.peak_bytes == choice.space.peak(each.layout) <= most
        assert best.seconds.overlapped <= (1 + CLOSE_FRAC) * each.seconds.overlapped
        assert each.seconds.overlapped <= each.seconds.apart
        if each.seconds.overlapped <= best.seconds.overlapped:
            assert best.layout.simplicity <= each.layout.simplicity
    check(choice.config)


@pytest.mark.parametrize("text", ["h100", "8xh100"])
def test_the_largest_micro_batch_is_the_largest(text: str) -> None:
    config = override(presets.get("llama-1b"), data={"sequence_length": 2048})
    choice = choose(config, parse_fleet(text))
    parallel, space = choice.best.layout.parallel, choice.space
    share = config.train.batch_size // num_shares(parallel)
    for policy, size in choice.largest_micro_batch.items():
        fitting = [
            n
            for n in range(1, share + 1)
            if share % n == 0 and space.fits(Layout(parallel, n, policy, False))
        ]
        assert max(fitting, default=0) == size
        assert 0 < size < share  # memory is what ends it


def test_several_micro_batches_of_a_split_model_fit() -> None:
    """Split in 8: no gradient is whole behind its micro-batch (27 GB of 7B at full rank)."""
    config = override(presets.get("llama-7b"), model={"linear": "full"})
    config = override(config, data={"sequence_length": 4096}, train={"batch_size": 16})
    space, parallel = LayoutSpace(config, parse_fleet("8xl40s")), ParallelConfig(shard=8)
    one, two = (Layout(parallel, size, "block", False) for size in (1, 2))
    assert space.peak(one) < space.peak(two)
    assert space.fits(one)
    assert space.largest(parallel, "block") == 2


def test_more_copies_are_never_slower() -> None:
    """Of one batch, until it is spent; within a machine and beyond."""
    config = small(micro_batch_size=1)
    seconds = []
    for number in (1, 2, 4, 8, 16, 32, 64):
        space = LayoutSpace(config, parse_fleet(f"{number}xh100"))
        layout = Layout(ParallelConfig(data=number), 1, "none", False)
        seconds.append(space.price(layout).seconds.overlapped)
    assert seconds == sorted(seconds, reverse=True)


def test_nothing_fits() -> None:
    config = override(presets.get("llama-7b"), model={"linear": "full"})
    with pytest.raises(ConfigError) as error:
        choose(config, parse_fleet("h100"))
    (problem,) = error.value.problems
    assert "closest is alone, recompute" in problem
    helps = problem.partition("what would fit: ")[2]
    assert "2 devices" in helps or "4 devices" in helps or "8 devices" in helps
    assert "--model.linear crnet" in helps
    choose(override(config, model={"linear": "crnet"}), parse_fleet("h100"))


# The command line


def printed(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(["plan", *words])
    assert not end.value.code
    return capsys.readouterr().out


def test_text_and_json_agree_and_the_command_is_taken(capsys) -> None:
    words = ["llama-60m", "--devices", "16xh100", "--data.sequence-length", "512"]
    text = printed(*words, capsys=capsys)
    found = json.loads(printed(*words, "--json", capsys=capsys))
    last = shlex.split(text.strip().splitlines()[-1])
    assert last == found["command"]
    assert last[:5] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "8"]
    best = found["layouts"][0]
    row = next(line for line in text.splitlines() if f"{best['step_s']:.3f}" in line)
    for figure in (f"{best['peak_bytes'] / GIB:.1f}", f"{best['tokens_per_s']:,.0f}"):
        assert figure in row
    sizes = ", ".join(f"{key} {size}" for key, size in found["largest_micro_batch"].items())
    assert f"largest micro-batch that fits this layout: {sizes}" in text
    config = parsed(last[last.index("crnet") + 1 :])
    check(config)
    assert num_processes(config.parallel) == 16
    assert config.train.micro_batch_size == best["micro_batch_size"]
    assert found["memory_bytes"] >= best["peak_bytes"]


def parsed(words: list[str]) -> RunConfig:
    """What ``crnet`` makes of a command's words; nothing is run."""
    from crnet.cli.app import app_for

    _, bound, _ = app_for(words).parse_args(words, exit_on_error=False, print_error=False)
    preset = bound.arguments["preset"]
    return bound.arguments["settings"].of(preset)


def test_ranks_and_layout_together(capsys) -> None:
    words = ["llama-60m", "--parameters", "60e6", "--devices", "8xh100", "--json"]
    found = json.loads(printed(*words, capsys=capsys))
    alone = json.loads(printed(*words[:3], "--json", capsys=capsys))
    assert found["rank"] == alone["rank"] == found["config"]["model"]["rank"]
    assert "--model.rank" in found["command"]


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--parameters", "60e6", "--node", "4"], "--node has no effect without --devices"),
        (["--devices", "8xh100", "--multiple", "8"], "--multiple has no effect without a budget"),
    ],
)
def test_flags_without_an_effect(words: list[str], flag: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", "llama-60m", *words])
    assert end.value.code
    assert flag in capsys.readouterr().err


def test_no_torch() -> None:
    program = (
        "import sys; from crnet.__main__ import main\n"
        "try: main(['plan', 'llama-60m', '--devices', '8xh100'])\n"
        "finally: sys.stderr.write(' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy"} & set(done.stderr.split())
