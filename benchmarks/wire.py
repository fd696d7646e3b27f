"""Memory of a process and bytes between processes of a step, beside the closed forms, per layout.

    python benchmarks/wire.py [--preset tiny] [--rounds 3] [--layouts "data 2" ...] [--out F]
    python benchmarks/wire.py --quick [--out F]     # a tiny shape, two layouts, one model

Every layout of every model is real processes under torchrun, which take steps with the engine that
``crnet train`` has, on rows of random tokens.

``sent``: bytes that all processes together gave to the network in a step, as the kernel counts them
on each TCP connection (what gloo talks over; headers not in it), the median over rounds. Beside it
``closed``: ``cost.hardware.communication_bytes`` of all of them. gloo has no sum that ends in parts
and makes a whole one, which doubles what ``shard`` sends for its gradients: ``closed_gloo`` has
that in it. NCCL's own sum does not send it.
``held``: of the fullest process, weights, gradients and optimizer state between two steps, tensor
by tensor, beside ``cost.shared.bytes_of_rank`` (``closed_held``). ``peak``: of the fullest process,
by how much its resident memory grew at most from before the first weight to the end of the second
step, beside what ``crnet plan`` takes for it (``closed_peak``). The C library gives back at once
what is freed, and another model was trained and forgotten before, so that libraries have what they
keep. (torch's own trace of allocations misses what gloo's threads free.)

JSON: benchmark, date, command, options, processor, cores, code, layouts.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from heading import heading, write
from torch import distributed as dist

from crnet.config import presets
from crnet.config.check import check
from crnet.config.sections import (
    ParallelConfig,
    RunConfig,
    num_shares,
    num_stages,
    share_of,
)
from crnet.config.serialize import from_dict, override, to_dict
from crnet.cost.hardware import communication_bytes
from crnet.cost.layout_memory import at_the_peak, held_by
from crnet.cost.parts import part_of, stored_tensors
from crnet.cost.stages import cut
from crnet.cost.workload import Workload, num_micro_batches, workload
from crnet.parallel.engine import TokensAndTargets
from crnet.parallel.whole import is_split
from crnet.parallel.world import World, joined
from crnet.storage.checkpoint import Progress
from crnet.train.run import make_step, work_of_one
from crnet.train.step import Step

CPU = torch.device("cpu")
KEYS = {"data": "data", "shard": "sharded", "tensor": "tensor"}
"""A layout's entry among the closed forms; a pipeline's is ``pipeline, all boundaries``."""
LAYOUTS = [
    f"{kind} {number}"
    for kind in (*KEYS, "pipeline")
    for number in (2, 3 if kind == "tensor" else 4)
]
MODELS = ("crnet", "full")
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 4, "num_heads": 4, "rank": "8"}
PAIRS = {"sent": "closed_gloo", "held": "closed_held", "peak": "closed_peak"}
"""What is measured, and the closed form beside it."""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
GIVE_BACK |= {"MALLOC_TOP_PAD_": "0", "MALLOC_ARENA_MAX": "1"}
"""What has glibc return freed memory to the system."""
BYTES_SENT = 200
"""Where ``tcpi_bytes_sent`` is in Linux's ``struct tcp_info`` (since 4.19)."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two layouts, one model")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.layouts, given.models = 1, ["shard 2", "pipeline 2"], ["crnet"]
    return given


def config_of(given: argparse.Namespace, layout: str, model: str) -> RunConfig:
    """A run whose every process has four micro-batches of a step."""
    kind, number = layout.split()
    base = presets.get(given.preset)
    if given.quick:
        base = override(base, model=TINY, data={"vocab_size": 512, "sequence_length": 32})
    parallel = ParallelConfig(**{kind: int(number)})
    sizes = {"batch_size": 8 * num_shares(parallel), "micro_batch_size": 2, "device": "cpu"}
    size = base.model.vocab_size or base.data.vocab_size
    config = override(base, model={"linear": model, "vocab_size": size}, train=sizes)
    config = dataclasses.replace(config, parallel=parallel)
    check(config)
    return config


def closed_forms(config: RunConfig, layout: str) -> dict[str, int]:
    """What the cost model says."""
    kind, number = layout.split()
    parallel, ranks = config.parallel, int(number)
    work = workload(work_of_one(config, CPU))
    table = communication_bytes(work, ranks)
    # The sum over a pipeline's boundaries is all processes' already.
    sent = ranks * table[KEYS[kind]] if kind in KEYS else table["pipeline, all boundaries"]
    found = {"closed": sent, "closed_gloo": sent}
    if kind == "shard":
        scattered = work.num_micro_batches * work.state_bytes["gradients"]
        found["closed_gloo"] += (ranks - 1) * scattered
    stages = cut(work.spec, num_stages(parallel), work.micro_batch.length)
    tensors = stored_tensors(work.spec if kind != "tensor" else work.spec.in_parts(0, ranks))
    part = dataclasses.replace(work, micro_batch=part_of(work.micro_batch, parallel.tensor))
    held = held_by(part, parallel, stages, tensors)
    moments = at_the_peak(part, parallel, stages)
    found["closed_held"] = max(sum(each.state.held.values()) for each in held)
    every = zip(held, moments, strict=True)
    found["closed_peak"] = max(each.total + moment for each, moment in every)
    return {key: round(value) for key, value in found.items()}


def measured(config: RunConfig, work: Workload, world: World, rounds: int) -> dict[str, Any]:
    """What this process has and sends in a step."""
    micro_batches = random_rows(config, world)
    at = Progress(step=1, position=0, tokens=0)

    def begun() -> Step:
        step = make_step(config, work.spec, CPU, None, world)
        step.model.recompute(work.plan)
        for _ in range(2):  # connections, states and gradients are made in the first
            step(micro_batches, at, None)
        return step

    peak = grown_bytes(begun)
    step, sent = begun(), []
    for _ in range(rounds):
        dist.barrier()
        before = bytes_sent()
        step(micro_batches, at, None)
        dist.barrier()  # some bytes
        sent.append(bytes_sent() - before)
    return {"sent": sent, "held": held_bytes(step), "peak": peak}


def random_rows(config: RunConfig, world: World) -> list[TokensAndTargets]:
    """This process's share of a batch, the same for those that read the same rows."""
    rows = torch.Generator().manual_seed(world.share[0])
    shape = share_of(config), config.data.sequence_length + 1
    tokens = torch.randint(config.model.vocab_size, shape, generator=rows)
    number = num_micro_batches(work_of_one(config, CPU).train)
    return [(each[:, :-1], each[:, 1:]) for each in tokens.chunk(number)]


def held_bytes(step: Step) -> int:
    """Weights, gradients and states that lie in this process."""
    weights = list(step.model.parameters())
    states = [
        value
        for state in step.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    ]
    gradients = [each.grad for each in weights if each.grad is not None]
    local = (it.to_local() if is_split(it) else it for it in (*weights, *gradients, *states))
    return sum(each.nbytes for each in local)  # type: ignore[union-attr]


def grown_bytes(run: Callable[[], object]) -> int:
    """By how much this process's resident memory grew at most in a second ``run``."""
    run()
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the most that there was
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


def resident_bytes(key: str) -> int:
    (found,) = re.findall(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return 1024 * int(found)


def bytes_sent() -> int:
    """What this process has sent over its TCP connections since each was opened."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as connection:
                facts = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
        except OSError:
            continue  # closed meanwhile, or no TCP
        (sent,) = struct.unpack_from("<Q", facts, BYTES_SENT)
        total += sent
    return total


def of_processes(config: RunConfig, number: int, rounds: int) -> list[dict[str, Any]]:
    """``measured`` of every process of a run."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "run.json"
        given.write_text(json.dumps({"config": to_dict(config), "rounds": rounds}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(number), __file__]
        told = os.environ | {"WIRE_RUN": str(given), "OMP_NUM_THREADS": "1", **GIVE_BACK}
        done = subprocess.run(command, env=told, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        return [json.loads((Path(folder) / f"{rank}").read_text()) for rank in range(number)]


def as_one_process(run: Path) -> None:
    """What torchrun starts."""
    given = json.loads(run.read_text())
    config = from_dict(given["config"])
    torch.set_num_threads(1)
    with joined(config.parallel) as world:
        work = workload(work_of_one(config, CPU))
        found = measured(config, work, world, given["rounds"])
        (run.parent / f"{world.rank}").write_text(json.dumps(found))
        dist.barrier()


def row(given: argparse.Namespace, layout: str, model: str) -> dict[str, Any]:
    """One layout of one model: measured, closed forms, and their ratios."""
    config = config_of(given, layout, model)
    found = of_processes(config, int(layout.split()[1]), given.rounds)
    closed = closed_forms(config, layout)
    sent = statistics.median(map(sum, zip(*(each["sent"] for each in found), strict=True)))
    held, peak = (max(each[key] for each in found) for key in ("held", "peak"))
    figures = {"sent": int(sent), "held": held, "peak": peak, **closed}
    ratios = {f"{what}_ratio": figures[what] / figures[it] for what, it in PAIRS.items()}
    return figures | ratios


def main() -> None:
    given = arguments()
    layouts: dict[str, dict[str, Any]] = {}
    heads = ("sent", "closed", "", "held", "closed", "", "peak", "closed", "")
    print(f"{'MB':18}" + "".join(f"{head:>9}" for head in heads))
    for layout in given.layouts:
        for model in given.models:
            it = layouts[f"{layout}, {model}"] = row(given, layout, model)
            cells = [
                f"{it[what] / 1e6:9.3f}{it[closed] / 1e6:9.3f}{it[f'{what}_ratio']:9.3f}"
                for what, closed in PAIRS.items()
            ]
            print(f"{layout + ', ' + model:18}" + "".join(cells), flush=True)
    write(heading("wire", given) | {"layouts": layouts}, given.out)


if __name__ == "__main__":
    if "WIRE_RUN" in os.environ:
        as_one_process(Path(os.environ["WIRE_RUN"]))
    else:
        main()
