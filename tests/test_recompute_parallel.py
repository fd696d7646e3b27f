"""DDP and FSDP2: two processes over gloo, on the CPU, that recompute, train, save and resume.

Both processes are started once (``work``), go through all of ``CASES`` and ``RUNS`` and write down
what each left behind; the tests read that. Every policy meets an ordinary graph, so ``block`` and
``replay`` are compared with ``none`` under the same parallelism, bit for bit: gradients, and
weights after steps of AdamW. Against one process, and for ``invert``, tolerances are in units of
rounding.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import functools
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from crnet import optimizers
from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig
from crnet.linears.crnet import CRNetOptions
from crnet.model.build import build, fill, lay_out, to_memory
from crnet.model.language_model import LanguageModel
from crnet.optimizers import Settings
from crnet.recompute.plan import RecomputePlan as Plan
from shapes import random_tokens, randomised, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RANKS = 2
LAYERS = 4
LIMIT_S = 600
"""Of the two processes together; a collective that one of them waits for alone gives up earlier."""

PLANS = {
    "none": Plan(),
    "block": Plan("block"),
    "replay": Plan("replay", (2,)),
    "invert": Plan("invert", (3,)),
}
SEGMENTS = ((0, 2), (2, 4))

UNIT = 2.0**-24
INVERTED = 2000
"""Units of rounding that a gradient of ``invert`` may be off: two layers are crossed, their gains
are at least 0.2, a layer adds five units: 5 x 5^2 = 125, and what is made of a Y amplifies it."""
REGROUPED = 1000
"""The same where a batch is summed in parts: some 40 rows in another order, through six
blocks; processors add in orders of their own (100 were enough on one, 420 were seen on another)."""


@dataclass(frozen=True)
class Case:
    units: str
    """``ddp``; or what FSDP2 shards: ``blocks``, each for itself, or ``segments``; and the root."""
    policy: str
    how: str = ""
    """``accumulated``: two micro-batches, reduced once. ``both-first``: two, and then one backward
    pass. ``frozen``: layers 1 to 3 and the embedding. ``bf16``: by ``MixedPrecisionPolicy``; with
    ``cast-carry`` a carry of fp32 besides, which that policy casts between blocks."""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.units, self.policy, self.how)))


CASES = [
    *(Case("ddp", policy) for policy in PLANS),
    *(Case("blocks", policy) for policy in PLANS),
    *(Case("blocks", policy, "bf16") for policy in PLANS),
    *(Case("segments", policy) for policy in ("none", "replay")),
    *(Case("ddp", policy, "accumulated") for policy in ("none", "replay")),
    *(
        Case("blocks", policy, how)
        for how in ("both-first", "frozen", "bf16 cast-carry")
        for policy in ("none", "replay")
    ),
]

MICRO = ("accumulated", "both-first")


@dataclass
class Result:
    """What one process has after a case."""

    loss: Tensor
    grads: dict[str, Tensor]
    """Whole ones; none of frozen parameters."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Of cases without a ``how``, after a step of AdamW; its epsilon is its learning rate, so that
    a weight changes by no more than its gradient."""
    hooks: Counter[str] = field(default_factory=Counter)
    """How often each parameter's gradient was announced."""
    runs: int = 0
    """Of blocks, forward and backward pass together."""
    collectives: Counter[str] = field(default_factory=Counter)
    gathered: dict[int, str] = field(default_factory=dict)
    """The layers that are whole when the gradient of layer l's input is there."""
    whole_bytes: tuple[int, int] = (0, 0)
    """Of gathered parameters: at their largest together, and when the backward pass is over."""
    whole_names: list[str] = field(default_factory=list)
    """Parameters that are not sharded when the backward pass is over."""
    added: dict[str, tuple[int, ...]] = field(default_factory=dict)


# --- in the two processes -----------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # of its parts, the local operations and collectives
        name = func.overloadpacket.__name__.strip("_")
        is_start = not name.startswith(("wait", "wrap"))
        if func.namespace in ("c10d", "_c10d_functional") and is_start:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def batch(rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Four rows with fewer and fewer targets: no two processes count the same number."""
    tokens, targets = random_tokens(4, 9), random_tokens(4, 9, seed=9)
    for row in range(4):
        targets[row, 9 - row :] = -100
    return tokens[rows], targets[rows]


NUM_TARGETS = 9 + 8 + 7 + 6


@functools.cache
def made(carry_dtype: Any) -> LanguageModel:
    config = tiny(num_layers=LAYERS, crnet=CRNetOptions(carry_dtype=carry_dtype))
    return randomised(build(model_spec(config), 0), torch.float32)


def make(case: Case) -> LanguageModel:
    model = copy.deepcopy(made("fp32" if "cast-carry" in case.how else "compute"))
    model.recompute(PLANS[case.policy])
    if case.how == "frozen":
        for part in (model.model.embed_tokens, *model.model.layers[:3]):
            part.requires_grad_(False)
    return model


def parallel(case: Case, model: LanguageModel) -> Any:
    if case.units == "ddp":
        return DistributedDataParallel(model)
    precision = MixedPrecisionPolicy(torch.bfloat16 if "bf16" in case.how else None)
    shard = functools.partial(fully_shard, reshard_after_forward=True, mp_policy=precision)
    layers = list(model.model.layers)
    for bottom, top in SEGMENTS if case.units == "segments" else ():
        shard(layers[bottom:top])
    for block in layers if case.units == "blocks" else ():
        shard(block)
    return shard(model)


@contextlib.contextmanager
def not_reduced(wrapped: Any) -> Iterator[None]:
    if isinstance(wrapped, DistributedDataParallel):
        with wrapped.no_sync():
            yield
        return
    wrapped.set_requires_gradient_sync(False)
    yield
    wrapped.set_requires_gradient_sync(True)


def watch(model: LanguageModel, result: Result) -> dict[int, Tensor]:
    """Fills ``hooks``, ``runs`` and ``gathered``; returns whole parameters as they come by."""
    whole: dict[int, Tensor] = {}

    def announced(name: str, _: Tensor) -> None:
        result.hooks[name] += 1

    def running(part: nn.Module, *_: Any) -> None:
        result.runs += part is not model
        whole.update((id(p), p) for p in part.parameters() if not isinstance(p, DTensor))
        total = sum(p.untyped_storage().nbytes() for p in whole.values())
        result.whole_bytes = (max(total, result.whole_bytes[0]), -1)

    def look(layer: int, _: Tensor) -> None:
        result.gathered[layer] = "".join(
            str(number)
            for number, block in enumerate(model.model.layers, start=1)
            if not isinstance(next(block.parameters()), DTensor)
        )

    def entered(layer: int, _: Any, args: Any) -> None:
        if args[0].requires_grad:
            args[0].register_hook(functools.partial(look, layer))

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(functools.partial(announced, name))
    for layer, block in enumerate(model.model.blocks(), start=1):
        # Not of the block: recomputation refuses forward hooks there.
        block.input_layernorm.register_forward_pre_hook(functools.partial(entered, layer))
        block.mlp.register_forward_pre_hook(functools.partial(running, block))
    model.register_forward_pre_hook(functools.partial(running, model))
    return whole


def run(case: Case, rank: int) -> Result:
    model = make(case)
    result = Result(torch.zeros(()), {})
    wrapped = parallel(case, model)
    whole = watch(model, result)

    def loss_of(rows: slice) -> Tensor:
        loss = wrapped(*batch(rows))[0] * (RANKS / NUM_TARGETS)
        result.loss = result.loss + loss.detach()
        return loss

    start = rank * 4 // RANKS
    first, second = slice(start, start + 1), slice(start + 1, start + 2)
    with Collectives() as collectives:
        if case.how == "accumulated":
            with not_reduced(wrapped):
                loss_of(first).backward()
            loss_of(second).backward()
        elif case.how == "both-first":
            (loss_of(first) + loss_of(second)).backward()
        else:
            loss_of(slice(first.start, second.stop)).backward()
    result.collectives = collectives.counts
    result.added = model.guard_added()
    if case.units != "ddp":
        left = sum(p.untyped_storage().nbytes() for p in whole.values())
        result.whole_bytes = (result.whole_bytes[0], left)
        result.whole_names = [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]
    result.grads = entire({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    if not case.how:
        torch.optim.AdamW(model.parameters(), lr=0.01, eps=0.01).step()
        result.weights = entire(dict(model.named_parameters()))
    return result


def entire(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """What ``full_tensor`` gives for each, by one collective instead of a hundred."""
    shards = {
        name: (it.to_local() if isinstance(it, DTensor) else it).detach().clone()
        for name, it in tensors.items()
    }
    if not all(isinstance(it, DTensor) for it in tensors.values()):
        return shards
    flat = torch.cat([shard.reshape(-1) for shard in shards.values()])
    of_ranks: list[Any] = [None] * RANKS
    dist.all_gather_object(of_ranks, (flat, [shard.shape for shard in shards.values()]))
    dtypes = [shard.dtype for shard in shards.values()]  # cat has taken the widest
    parts = [
        [
            part.view(shape).to(dtype)
            for part, shape, dtype in zip(flat.split(sizes), shapes, dtypes, strict=True)
        ]
        for flat, shapes in of_ranks
        for sizes in [[shape.numel() for shape in shapes]]
    ]
    found = {
        name: torch.cat(rows) for name, rows in zip(shards, zip(*parts, strict=True), strict=True)
    }
    for name, it in list(tensors.items())[:3]:
        assert torch.equal(found[name], it.full_tensor()), name
    return found


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=LIMIT_S / 2),
    )
    results: dict[Any, Any] = {case: run(case, rank) for case in CASES}
    results |= {name: started(config, dtype) for name, (config, dtype) in STARTS.items()}
    results |= {name: trained(name, rank, folder) for name in RUNS}
    results["resumed"] = trained("none", rank, folder, resumes=True)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


# --- runs of several steps ----------------------------------------------------------------------

STEPS, SAVED_STEP = 5, 3
SETTINGS = Settings(lr=0.01, beta1=0.9, beta2=0.999, eps=0.01, weight_decay=0.1, seed=0)
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
SHAPE = tiny(num_layers=LAYERS, init_std=0.2)
RUNS = {
    "none": (SHAPE, Plan()),
    "block": (SHAPE, Plan("block")),
    "replay": (SHAPE, Plan("replay", (2,))),
    "tied": (dataclasses.replace(SHAPE, tie_embeddings=True), Plan("replay", (2,))),
}
STARTS = {
    "start-bf16": (SHAPE, torch.bfloat16),
    "start-spectral": (tiny(crnet=CRNetOptions(init="spectral")), torch.float32),
}


@dataclass
class Run:
    losses: list[float]
    start: dict[str, Tensor]
    """Weights before the first step; whole, as the others."""
    weights: dict[str, Tensor]


def sharded(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model that was never whole on any rank."""
    model = lay_out(model_spec(config))
    for part in model.sharded_parts():
        fully_shard(part)
    fully_shard(model)
    to_memory(model, "cpu", dtype)
    fill(model, seed)
    return model


def started(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    return entire(dict(sharded(config, 0, dtype).named_parameters()))


def step(model: nn.Module, optimizer: Any, number: int, rows: slice, scale: float) -> float:
    tokens = random_tokens(4, 9, seed=number)
    targets = batch()[1]
    loss = model(tokens[rows], targets[rows])[0] * (scale / NUM_TARGETS)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def trained(name: str, rank: int, folder: Path, resumes: bool = False) -> Run:
    """The run ``none`` saves its state half way; a fresh model of another seed resumes from it."""
    config, plan = RUNS[name]
    model = sharded(config, seed=1 if resumes else 0)
    model.recompute(plan)
    optimizer = optimizers.get("adamw").build(model.trained(), None, SETTINGS)
    start = entire(dict(model.named_parameters()))
    path = folder / "state.pt"
    if resumes:
        state = torch.load(path, weights_only=True)
        dcp.set_model_state_dict(model, state["model"], options=WHOLE)
        dcp.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=WHOLE)
    rows = slice(rank * 4 // RANKS, (rank + 1) * 4 // RANKS)
    losses = []
    for number in range(SAVED_STEP if resumes else 0, STEPS):
        if number == SAVED_STEP and name == "none" and not resumes:
            state = {
                "model": dcp.get_model_state_dict(model, options=WHOLE),
                "optimizer": dcp.get_optimizer_state_dict(model, optimizer, options=WHOLE),
            }
            if rank == 0:
                torch.save(state, path)
            dist.barrier()
        losses.append(step(model, optimizer, number, rows, RANKS))
    return Run(losses, start, entire(dict(model.named_parameters())))


# --- in the process of the tests ----------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Case, Result]]:
    """Of each process."""
    folder = tmp_path_factory.mktemp("ranks")
    here = str(Path(__file__).parent)
    search = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(RANKS):
        code = f"import pathlib, {__name__} as it; it.work({rank}, pathlib.Path({str(folder)!r}))"
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, "-c", code]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    deadline = time.monotonic() + LIMIT_S
    try:
        # As soon as one has failed, nobody waits for the other.
        while any(it.poll() is None for it in processes) and not any(it.poll() for it in processes):
            assert time.monotonic() < deadline, f"not done in {LIMIT_S} s\n{logs(folder)}"
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [it.returncode for it in processes] == [0] * RANKS, logs(folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def logs(folder: Path) -> str:
    return "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("*.log")))


def assert_near(actual: Result, expected: Result, units: float) -> None:
    """Equal; or within so many units of rounding of a gradient's largest item, of all betas' for a
    beta, whose one item is a sum that may cancel."""
    assert actual.grads.keys() == expected.grads.keys()
    largest = {name: float(grad.abs().max()) for name, grad in expected.grads.items()}
    betas = max(size for name, size in largest.items() if name.endswith(".beta"))
    for name, grad in expected.grads.items():
        limit = units * UNIT * (betas if name.endswith(".beta") else largest[name])
        assert actual.grads[name].dtype == grad.dtype == torch.float32
        assert actual.grads[name].shape == grad.shape
        assert float((actual.grads[name] - grad).abs().max()) <= limit, name
        if actual.weights:
            weight, other = expected.weights[name], actual.weights[name]
            limit += 2 * UNIT * float(weight.abs().max()) if units else 0.0
            assert float((other - weight).abs().max()) <= limit, name


def ids(cases: list[Any]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=str)


@functools.cache
def alone(how: str) -> Result:
    """One process, everything kept; the whole batch at once, where there are micro-batches row by
    row: products of one row at a time are other products."""
    model = make(Case("", "none", how))
    rows = [slice(row, row + 1) for row in range(4)] if how in MICRO else [slice(0, 4)]
    loss = torch.zeros(())
    for part in rows:
        partial = model(*batch(part))[0] / NUM_TARGETS
        partial.backward()
        loss += partial.detach()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    torch.optim.AdamW(model.parameters(), lr=0.01, eps=0.01).step()
    return Result(loss, grads, {n: p.detach() for n, p in model.named_parameters()})


@ids([case for case in CASES if "bf16" not in case.how])
def test_as_one_process(results: list[dict[Case, Result]], case: Case):
    """Every gradient and weight, on both ranks."""
    expected = alone(case.how)
    trained = {name for name, p in make(case).named_parameters() if p.requires_grad}
    units = INVERTED if case.policy == "invert" else REGROUPED
    for rank in range(RANKS):
        actual = results[rank][case]
        assert actual.grads.keys() == trained
        assert all(bool(grad.any()) for grad in actual.grads.values())
        assert_near(actual, expected, units)
    losses = sum(float(by_rank[case].loss) for by_rank in results) / RANKS
    assert losses == pytest.approx(float(expected.loss), rel=REGROUPED * UNIT)


@ids([case for case in CASES if case.policy in ("block", "replay")])
def test_block_and_replay_are_exact(results: list[dict[Case, Result]], case: Case):
    """Bit for bit what ``none`` has; whatever is sharded together, as sums over two ranks are the
    same in any grouping."""
    units = "ddp" if case.units == "ddp" else "blocks"
    for by_rank in results:
        expected = by_rank[Case(units, "none", case.how)]
        assert torch.equal(by_rank[case].loss, expected.loss)
        assert_near(by_rank[case], expected, 0)


@ids([case for case in CASES if case.policy == "invert" and "bf16" not in case.how])
def test_invert_is_close(results: list[dict[Case, Result]], case: Case):
    for by_rank in results:
        expected = by_rank[dataclasses.replace(case, policy="none")]
        assert torch.equal(by_rank[case].loss, expected.loss)
        assert_near(by_rank[case], expected, INVERTED)
        assert by_rank[case].added == {}


@ids(CASES)
def test_both_ranks_have_the_same(results: list[dict[Case, Result]], case: Case):
    one, other = (by_rank[case] for by_rank in results)
    assert not torch.equal(one.loss, other.loss)
    assert_near(one, other, 0)
    for field_ in ("hooks", "collectives", "gathered", "whole_bytes", "added"):
        assert getattr(one, field_) == getattr(other, field_), field_


@ids(CASES)
def test_every_block_runs_twice_and_every_gradient_comes_once(
    results: list[dict[Case, Result]], case: Case
):
    """DDP announces a gradient in every backward pass, FSDP2 when it has been reduced."""
    once = results[0][case]
    passes = 2 if case.how in MICRO else 1
    more = 0 if case.policy == "none" else LAYERS
    if case.how == "frozen" and more:
        more = 1  # what is frozen below the lowest trained block is rebuilt at most, never run
    assert once.runs == passes * (LAYERS + more)
    times = 2 if (case.units, case.how) == ("ddp", "accumulated") else 1
    assert once.hooks == dict.fromkeys(once.grads, times)


FSDP = [case for case in CASES if case.units != "ddp"]


@ids(FSDP)
def test_everything_is_sharded_again(results: list[dict[Case, Result]], case: Case):
    """Parameters by name, and the memory that they were gathered into."""
    result = results[0][case]
    largest, left = result.whole_bytes
    assert largest > 0
    assert left == 0
    assert result.whole_names == []


@ids(FSDP)
def test_recomputation_gathers_no_more(results: list[dict[Case, Result]], case: Case):
    """Each unit once in a forward and once in a backward pass, as under ``none``; ``invert`` reads
    all gains in one collective more."""
    counts = results[0][case].collectives
    num_units = 1 + (LAYERS if case.units == "blocks" else len(SEGMENTS))
    expected = Counter(allgather_base=2 * num_units, reduce_scatter_base=num_units)
    if case.how in (*MICRO, "frozen"):
        expected = results[0][dataclasses.replace(case, policy="none")].collectives
    more = counts - expected
    assert counts - more == expected
    assert more.total() == (1 if case.policy == "invert" else 0), more


@pytest.mark.parametrize(
    ("units", "policy", "expected"),
    [
        ("blocks", "none", "4 3 2 1"),
        ("blocks", "block", "4 3 2 1"),
        ("blocks", "invert", "4 3 2 1"),
        ("blocks", "replay", "34 3 12 1"),
        ("segments", "none", "34 34 12 12"),
        ("segments", "replay", "34 34 12 12"),
    ],
)
def test_replay_holds_a_segment(
    results: list[dict[Case, Result]], units: str, policy: str, expected: str
):
    """The layers that are whole when layer l, from the top down, is done: under ``replay`` those of
    the segment that are still to come, as rebuilding has gathered them."""
    gathered = results[0][Case(units, policy)].gathered
    assert " ".join(gathered[layer] for layer in range(LAYERS, 0, -1)) == expected


def test_the_guard_knows_the_dtype(results: list[dict[Case, Result]]):
    """Sharded parameters are fp32 whatever the products are computed in: the guard keeps the layers
    that it keeps in one process under autocast."""
    model = make(Case("", "invert"))
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch())
    assert model.guard_added()
    assert results[0][Case("blocks", "invert", "bf16")].added == model.guard_added()


# --- runs ---------------------------------------------------------------------------------------


def assert_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def test_shards_start_as_the_whole(results: list[dict[Any, Any]]):
    """Filled from (seed, name), never whole on a rank: the bits of one process, in bf16 and where a
    value takes an SVD too."""
    for by_rank in results:
        for name, (config, dtype) in STARTS.items():
            whole = build(model_spec(config), 0, dtype=dtype)
            assert_bits(by_rank[name], dict(whole.named_parameters()))
        for name, (config, _) in RUNS.items():
            whole = build(model_spec(config), 0)
            assert_bits(by_rank[name].start, dict(whole.named_parameters()))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_one_process(results: list[dict[Any, Any]], name: str):
    """Losses and weights. A gradient whose norm is clipped to 1 errs by ``REGROUPED`` units of
    rounding of at most 1; AdamW's epsilon is its rate, so that a step passes on no more than it
    gets; the steps add up."""
    config, plan = RUNS[name]
    model = build(model_spec(config), 0)
    model.recompute(plan)
    optimizer = optimizers.get("adamw").build(model.trained(), None, SETTINGS)
    losses = [step(model, optimizer, number, slice(0, 4), 1.0) for number in range(STEPS)]
    for both in zip(losses, *(by_rank[name].losses for by_rank in results), strict=True):
        assert sum(both[1:]) / RANKS == pytest.approx(both[0], rel=STEPS * REGROUPED * UNIT)
    for by_rank in results:
        assert by_rank[name].weights.keys() == dict(model.named_parameters()).keys()
        for key, weight in model.named_parameters():
            off = float((by_rank[name].weights[key] - weight.detach()).abs().max())
            assert off < STEPS * REGROUPED * UNIT, key


def test_runs_of_every_policy_are_one(results: list[dict[Any, Any]]):
    for by_rank in results:
        for policy in ("block", "replay"):
            assert by_rank[policy].losses == by_rank["none"].losses
            assert_bits(by_rank[policy].weights, by_rank["none"].weights)


def test_a_resumed_run_is_the_uninterrupted_one(results: list[dict[Any, Any]]):
    """From whole tensors in a file; bit for bit, and from another start."""
    for by_rank in results:
        resumed, whole = by_rank["resumed"], by_rank["none"]
        assert not torch.equal(resumed.start["lm_head.weight"], whole.start["lm_head.weight"])
        assert resumed.losses == whole.losses[SAVED_STEP:]
        assert_bits(resumed.weights, whole.weights)
