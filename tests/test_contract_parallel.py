"""Every method that computes, in a run that two processes share, against the run of one.

None is named here: a new one is covered the moment its file exists. The processes are started once
for all methods. Losses and gradients agree to rounding: rows are added in another order.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch import distributed as dist

from crnet import architectures, linears, optimizers, streams
from crnet.config.sections import ParallelConfig, options_of
from crnet.data.rows import IGNORED
from crnet.measure import examples as small
from crnet.model.build import build
from crnet.model.events import run_events
from crnet.parallel import owners
from crnet.parallel.engine import Engine, lay_out_shared
from crnet.parallel.world import ALONE, World, joined

STEPS = 3
LAYOUTS = [{"data": 2}, {"shard": 2}]

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes"),
]


def all_examples() -> dict[str, small.Example]:
    """Each method with its default options and its ``examples``."""
    return {
        f"{seam.__name__.rpartition('.')[2]}-{name}-{idx}": example
        for seam in (linears, streams, architectures, optimizers)
        for name in seam.names()
        for idx, example in enumerate(small.examples(seam.get(name)))
    }


EXAMPLES = all_examples()


def rows() -> tuple[Tensor, Tensor]:
    """Four rows; no two processes have as many targets."""
    tokens, targets = small.batch()
    targets[0, 3:] = IGNORED
    return tokens, targets


def first_step(example: small.Example) -> int:
    """Of a few steps, the second with an event behind it where the method has events."""
    spec = example.spec
    due = (step for step in range(2, 2000) if spec.linear.events(step, spec.linear_options))
    return next(due, 2) - 1


def train(example: small.Example, world: World) -> dict[str, Any]:
    """Losses of a few steps, and the gradients of the first one."""
    model = build(example.spec, 0, lay=functools.partial(lay_out_shared, world=world))
    method = optimizers.get(example.optimizer.name)
    options = options_of(example.optimizer, method.name)
    optimizer = owners.build(method, model.trained(), options, example.settings, None)
    engine = Engine(model, world)
    share, num_shares = world.share
    mine = [each.chunk(num_shares)[share] for each in rows()]
    num_tokens = int((rows()[1] != IGNORED).sum())
    losses, gradients = [], {}
    first = first_step(example)
    for step in range(first - 1, first + STEPS):
        if losses:
            optimizer.step()
        run_events(model, optimizer, step, 0, engine.around_events())
        optimizer.zero_grad(set_to_none=True)
        micro_batch = (mine[0], mine[1])
        loss = engine.accumulate([micro_batch], num_tokens, contextlib.nullcontext)
        losses.append(float(world.sum(loss)) / num_tokens)
        if not gradients:
            for name, (_, parameter) in model.trained().items():
                gradient: Any = parameter.grad
                whole = gradient.full_tensor() if engine.is_split else gradient
                gradients[name] = whole.clone()
    return {"losses": losses, "gradients": gradients}


def worker(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["WORLD_SIZE"] = "2"
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for sizes in LAYOUTS:
        found = {}
        with joined(ParallelConfig(**sizes)) as world:
            for name, example in EXAMPLES.items():
                try:
                    found[name] = train(example, world)
                except Exception:  # noqa: BLE001  said by the test of this example
                    found[name] = traceback.format_exc()
        torch.save(found, folder / f"{sizes} {rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """By layout and rank: what every example came to."""
    folder = tmp_path_factory.mktemp("contract")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, folder), nprocs=2)  # type: ignore[attr-defined]
    return [[torch.load(folder / f"{sizes} {rank}.pt") for rank in (0, 1)] for sizes in LAYOUTS]


@pytest.mark.parametrize("name", EXAMPLES)
def test_as_one_process(name: str, shared: list[list[dict[str, Any]]]) -> None:
    """The same losses before each step, the same gradients, on both processes."""
    wanted = train(EXAMPLES[name], ALONE)
    for sizes, ranks in zip(LAYOUTS, shared, strict=True):
        for rank in ranks:
            found = rank[name]
            assert not isinstance(found, str), (sizes, found)
            assert found["gradients"].keys() == wanted["gradients"].keys()
            # Of the largest: a bias of keys has a gradient of rounding alone.
            atol = 2e-6 * max(float(each.abs().max()) for each in wanted["gradients"].values())
            for key, gradient in wanted["gradients"].items():
                torch.testing.assert_close(
                    found["gradients"][key], gradient, rtol=1e-4, atol=atol, msg=f"{sizes} {key}"
                )
            # Muon orthogonalises in bf16: a bit that rounds the other way is 2^-9 of an item.
            assert found["losses"] == pytest.approx(wanted["losses"], rel=2e-4), sizes


def test_what_a_run_may_meet_is_among_them() -> None:
    """Events within the steps, tensors without gradient, whole numbers, state of a stream."""
    specs = [example.spec for example in EXAMPLES.values()]
    options = [(each.spec.linear, each.spec.linear_options) for each in EXAMPLES.values()]
    seconds = [first_step(example) + 1 for example in EXAMPLES.values()]
    due = [a.events(step, b) for (a, b), step in zip(options, seconds, strict=True)]
    assert {"merge", "reset"} <= {event for events in due for event in events}
    tensors = [tensor for spec in specs for tensor in spec.tensors.values()]
    assert any(not each.trained for each in tensors)
    assert any(each.dtype == "int32" for each in tensors)
    assert {spec.stream.name for spec in specs} == set(streams.names())
