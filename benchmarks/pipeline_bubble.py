"""How long the processes of a pipeline wait: measured, beside what the simulation foresees.

    python benchmarks/pipeline_bubble.py [--steps 10] [--sequences 2] [--micro-batches 8] [--out F]
    python benchmarks/pipeline_bubble.py --quick [--out F]    # a tiny shape, two processes

The processes run ``crnet``'s own pipeline over gloo on this machine, a thread each, and write down
when every pass starts and ends, on the machine's one monotonic clock. A step is from the start of
its first pass to the end of its last; the bubble is the share of it in which processes are in no
pass. Two kinds:

- ``real``: the model computes. Only with as many cores as processes.
- ``sleeping``: engine, schedule and messages are real, but a pass sleeps for the time that it takes
  alone, and its numbers are zeros. So four processes on two cores show the schedule and not the
  cores.

Before, stage after stage computes alone while the others wait (``alone_s``), and what crosses each
boundary goes to and fro (``send_s``). ``cost.timeline`` makes of these a step: ``simulated`` with
free sending, ``sending`` with the time that it took, ``passes`` with it and with the medians of the
passes as they were inside the pipeline (``pipeline_s``). Medians over steps; the first two are a
warm-up.

JSON: benchmark, date, command, options, processor, cores, code, load, cases.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from heading import heading, write
from torch import Tensor
from torch import distributed as dist
from torch.distributed.pipelining import PipelineStage

from crnet.config import presets
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.cost.timeline import Timeline, equal_bubble, simulate
from crnet.cost.workload import resolved
from crnet.model.build import build
from crnet.parallel import pipeline
from crnet.parallel.cores import num_cores
from crnet.parallel.world import World, joined
from crnet.train.run import make_engine

SCHEDULES = ("1f1b", "interleaved")
WARM_UP = 2
ALONE_REPEATS = 12
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 4, "num_heads": 2, "rank": "8"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-60m")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two processes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # a process of the pipeline
    given = parser.parse_args()
    if given.quick:
        given.steps, given.processes, given.micro_batches = 2, [2], 4
        given.length, given.vocab_size = 16, 300
    return given


def configured(given: argparse.Namespace, processes: int, schedule: str) -> RunConfig:
    return resolved(
        override(
            presets.get(given.preset),
            model=TINY if given.quick else {},
            data={"vocab_size": given.vocab_size, "sequence_length": given.length},
            train={
                "batch_size": given.sequences * given.micro_batches,
                "micro_batch_size": given.sequences,
                "device": "cpu",
                "precision": "fp32",
                "recompute": "none",
            },
            parallel={"pipeline": processes, "schedule": schedule},
        )
    )


# --- inside a process -----------------------------------------------------------------------------


class Slept(torch.autograd.Function):
    """Zeros of some shapes, after a sleep; zeros backward, after another."""

    @staticmethod
    def forward(ctx, shapes, forward_s: float, backward_s: float, *inputs: Tensor):
        time.sleep(forward_s)
        ctx.backward_s = backward_s
        ctx.like = [(each.shape, each.dtype, each.requires_grad) for each in inputs]
        return tuple(torch.zeros(shape) for shape in shapes)

    @staticmethod
    def backward(ctx, *_: Tensor):  # type: ignore[override]
        time.sleep(ctx.backward_s)
        zeros = [torch.zeros(s, dtype=d) if wanted else None for s, d, wanted in ctx.like]
        return None, None, None, *zeros


def sleeping(part: Any, seconds: tuple[float, float]) -> Callable[..., Any]:
    """In the place of a part's own computation: the same shapes."""
    anchor = next(part.parameters())

    def compute(tensors: tuple[Tensor, ...], _: Tensor | None) -> Any:
        rows = tuple(tensors[0].shape[:2])
        shapes = [(*rows, each.width) for each in part.leaving] or [()]
        made = Slept.apply(shapes, *seconds, anchor, *tensors)
        assert isinstance(made, tuple)
        return made[0] if part.stage.is_last else made

    return compute


@contextlib.contextmanager
def written_down(passes: list[list[Any]]) -> Iterator[None]:
    """Every pass of this process: direction, stage, micro-batch, start, end."""

    def timed(direction: str, of: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: PipelineStage, number: int, *args: Any, **more: Any) -> Any:
            start = time.monotonic()
            found = of(self, number, *args, **more)
            passes.append([direction, self.stage_index, number, start, time.monotonic()])
            return found

        return run

    forward = timed("forward", PipelineStage.forward_one_chunk)
    backward = timed("backward", PipelineStage.backward_one_chunk)
    with (
        mock.patch.object(PipelineStage, "forward_one_chunk", forward),
        mock.patch.object(PipelineStage, "backward_one_chunk", backward),
    ):
        yield


def alone(part: Any, tokens: Tensor, targets: Tensor) -> tuple[float, float]:
    """Median seconds of one micro-batch in a stage, forward and backward; nobody else computes."""
    times: list[list[float]] = []
    rows = tuple(tokens.shape)
    for _ in range(ALONE_REPEATS):
        inputs = [torch.randn(*rows, each.width, requires_grad=True) for each in part.entering]
        begin = time.monotonic()
        found = part(*(inputs or [tokens]), targets=targets)
        middle = time.monotonic()
        outputs = [found] if part.stage.is_last else [each for each in found if each.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])
        times.append([middle - begin, time.monotonic() - middle])
        part.zero_grad()
    forward, backward = (statistics.median(column) for column in zip(*times[2:], strict=True))
    return forward, backward


def send_seconds(part: Any, rows: tuple[int, int], to: int, pipe: Any, first: bool) -> float:
    """Median seconds that a boundary's tensors take one way: to and fro, by half."""
    tensors = [
        torch.zeros(*rows, each.width) for each in (part.leaving if first else part.entering)
    ]
    times = []
    for _ in range(ALONE_REPEATS):
        begin = time.monotonic()
        for kind in (dist.isend, dist.irecv) if first else (dist.irecv, dist.isend):
            ops = [dist.P2POp(kind, each, group=pipe, group_peer=to) for each in tensors]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
        times.append((time.monotonic() - begin) / 2)
    return statistics.median(times[2:])


def in_turn(engine: Any, world: World, batch: Any) -> tuple[dict[int, Any], dict[int, float]]:
    """By stage: seconds alone; by the stage below a boundary: seconds of sending."""
    rank, size = dist.get_rank(world.pipe), world.parallel.pipeline
    (tokens, targets), found, sent = batch[0], {}, {}
    with engine.model.fixed_weights():
        for turn in range(size):
            dist.barrier()
            if turn == rank:
                found = {part.stage.idx: alone(part, tokens, targets) for part in engine.parts}
    last = engine.parts[0].stage.num_stages - 1
    for idx in range(last):
        dist.barrier()
        for part in engine.parts:
            if part.stage.idx == idx:
                sent[idx] = send_seconds(part, tokens.shape, (rank + 1) % size, world.pipe, True)
            if part.stage.idx == idx + 1:
                send_seconds(part, tokens.shape, (rank - 1) % size, world.pipe, False)
    dist.barrier()
    return found, sent


def steps(engine: Any, batch: Any, number: int) -> list[list[list[Any]]]:
    """The passes of this process, step by step."""
    found = []
    num_tokens = sum(targets.numel() for _, targets in batch)
    for _ in range(WARM_UP + number):
        passes: list[list[Any]] = []
        dist.barrier()
        with written_down(passes):
            engine.accumulate(batch, num_tokens, contextlib.nullcontext)
        engine.model.zero_grad()
        found.append(passes)
    return found[WARM_UP:]


def one_schedule(given: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        given.vocab_size, (given.micro_batches, given.sequences, given.length), generator=generator
    )
    batch = [(each, each) for each in tokens]
    with joined(config.parallel) as world:
        lay = functools.partial(pipeline.lay_out_part, world=world, length=given.length)
        device = torch.device("cpu")
        model = build(model_spec(config.model), 0, device, torch.float32, lay)
        engine: Any = make_engine(config, model, device, world)
        times, sent = in_turn(engine, world, batch)
        found: dict[str, Any] = {"alone": times, "send": sent, "real": None}
        if config.parallel.pipeline <= num_cores():
            found["real"] = steps(engine, batch, given.steps)
        for part in engine.parts:
            part._forward = sleeping(part, times[part.stage.idx])
        found["sleeping"] = steps(engine, batch, given.steps)
    return found


def inside(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    for schedule in SCHEDULES:
        found = one_schedule(given, configured(given, size, schedule))
        (given.inside / f"{schedule}.{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


# --- what the processes saw -----------------------------------------------------------------------


def whole_step(rows: list[list[Any]], processes: int) -> tuple[float, float]:
    """Seconds of a step, and its bubble."""
    seconds = max(row[4] for row in rows) - min(row[3] for row in rows)
    return seconds, 1 - sum(row[4] - row[3] for row in rows) / (processes * seconds)


def in_pipeline(found: list[list[list[Any]]], num_stages: int) -> list[list[float]]:
    """Median seconds of the passes, forward and backward, by stage."""
    rows = list(itertools.chain(*found))
    return [
        [
            statistics.median(row[4] - row[3] for row in rows if (row[0], row[1]) == (kind, stage))
            for stage in range(num_stages)
        ]
        for kind in ("forward", "backward")
    ]


def told(line: Timeline) -> dict[str, float]:
    return {"seconds": line.seconds, "bubble_frac": line.bubble}


def case(
    seen: list[dict[str, Any]], kind: str, schedule: str, micro_batches: int
) -> dict[str, Any] | None:
    """One measured pipeline beside its simulations."""
    if seen[0][kind] is None:
        return None
    processes = len(seen)
    alone = {int(idx): pair for each in seen for idx, pair in each["alone"].items()}
    sent = {int(idx): value for each in seen for idx, value in each["send"].items()}
    send_s = [sent[idx] for idx in sorted(sent)]
    forward, backward = ([alone[idx][way] for idx in sorted(alone)] for way in (0, 1))
    found = [list(itertools.chain(*step)) for step in zip(*(s[kind] for s in seen), strict=True)]
    measured = [whole_step(rows, processes) for rows in found]
    passes = in_pipeline(found, len(alone))
    simulated = functools.partial(
        simulate, schedule, micro_batches=micro_batches, num_processes=processes
    )
    bubbles = sorted(bubble for _, bubble in measured)
    return {
        "processes": processes,
        "schedule": schedule,
        "stages": len(alone),
        "alone_s": {"forward": forward, "backward": backward},
        "send_s": send_s,
        "pipeline_s": dict(zip(("forward", "backward"), passes, strict=True)),
        "equal_stages": equal_bubble(processes, len(alone), micro_batches),
        "measured": {
            "seconds": statistics.median(seconds for seconds, _ in measured),
            "bubble_frac": statistics.median(bubbles),
            "least_frac": bubbles[0],
            "most_frac": bubbles[-1],
        },
        "simulated": told(simulated(forward=forward, backward=backward)),
        "sending": told(simulated(forward=forward, backward=backward, transfer=send_s)),
        "passes": told(simulated(forward=passes[0], backward=passes[1], transfer=send_s)),
    }


def start(processes: int, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(processes), __file__, *sys.argv[1:], "--inside", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])


def main() -> None:
    given = arguments()
    if given.inside:
        inside(given)
        return
    load = {"before": os.getloadavg()[0]}
    cases: dict[str, Any] = {}
    for processes in given.processes:
        with tempfile.TemporaryDirectory() as root:
            start(processes, Path(root))
            for kind, schedule in itertools.product(("real", "sleeping"), SCHEDULES):
                files = [Path(root) / f"{schedule}.{rank}.json" for rank in range(processes)]
                seen = [json.loads(file.read_text()) for file in files]
                made = case(seen, kind, schedule, given.micro_batches)
                if made is not None:
                    cases[f"{kind}, {processes} processes, {schedule}"] = made
    load["after"] = os.getloadavg()[0]
    print(f"{'':36}{'equal':>9}{'simulated':>11}{'sending':>9}{'passes':>9}{'measured':>10}")
    for name, made in cases.items():
        shown = [made["equal_stages"]] + [made[of]["bubble_frac"] for of in
                 ("simulated", "sending", "passes", "measured")]  # fmt: skip
        print(f"{name:36}" + "".join(f"{each:>9.3f}" for each in shown))
    write(
        heading("pipeline_bubble", given, hidden=("inside",)) | {"load": load, "cases": cases},
        given.out,
    )


if __name__ == "__main__":
    main()
