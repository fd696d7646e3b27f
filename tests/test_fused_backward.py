"""--optimizer.fused-backward: the same numbers as ordinary steps, less memory, and nothing lost.

Equality is by bits. That every optimizer steps one gradient as it steps all of them is its contract
(``measure.contract``); here are the runs around it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet import architectures, linears, optimizers, streams
from crnet.config.check import check
from crnet.config.model_spec import model_spec
from crnet.config.sections import DataConfig, RunConfig, TrainConfig
from crnet.config.serialize import override
from crnet.cost.step import step_memory
from crnet.cost.table import cost_rows
from crnet.cost.workload import workload
from crnet.errors import ConfigError, TrainingError
from crnet.linears._maps import SharedTensors
from crnet.measure.examples import examples
from crnet.measure.profile import Probe
from crnet.optimizers._fused_backward import updated_at_once, waits
from crnet.optimizers._fused_backward.module import FusedBackward
from crnet.storage import checkpoint
from crnet.storage.checkpoint import Progress
from crnet.train import run as train
from crnet.train.step import Step
from test_checkpoint import assert_same_run
from test_optimizer_state import assert_same
from test_train import run, tiny

CPU = torch.device("cpu")
FUSED = {"fused_backward": True}
ADAMW = examples(optimizers.get("adamw"))[0]


def config_of(example: Any = ADAMW, **sections: dict[str, Any]) -> RunConfig:
    config = RunConfig(
        model=example.model,
        optimizer=dataclasses.replace(example.optimizer, clip_norm=0.0),
        data=DataConfig(sequence_length=8),
        train=TrainConfig(steps=12, batch_size=4, threads=1, device="cpu", precision="fp32"),
    )
    return override(config, **sections)


def batch(number: int, num_parts: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(number)
    draw = functools.partial(torch.randint, 0, 31, (4 // num_parts, 8), generator=generator)
    return [(draw(), draw()) for _ in range(num_parts)]


def at(number: int) -> Progress:
    return Progress(step=number, position=4 * number, tokens=0)


def make_step(config: RunConfig) -> Step:
    check(config)
    step = train.make_step(config, model_spec(config.model), CPU, None)
    step.model.recompute(workload(config).plan)
    return step


def fused_of(step: Step) -> FusedBackward:
    assert step._fused is not None
    return step._fused


def everything(step: Step) -> Any:
    """Weights, states and what groups count."""
    weights = [each.detach().clone() for each in step.model.parameters()]
    return [weights, step.optimizer.state_dict()]


def assert_as_ordinary(config: RunConfig, num_parts: int = 1, steps: int = 4) -> None:
    found = []
    for is_fused in (True, False):
        step = make_step(override(config, optimizer={"fused_backward": is_fused}))
        done = [step(batch(number, num_parts), at(number), None) for number in range(steps)]
        figures = [(each.loss, each.grad_norm, each.lr) for each in done]
        found.append([figures, everything(step)])
        left = [spec for spec, tensor in step.model.trained().values() if tensor.grad is not None]
        if is_fused:
            assert left
            assert all(map(waits, left))
        else:
            assert not all(map(waits, left))
    assert_same(*found)


# The same bits


@pytest.mark.parametrize("linear", linears.names())
def test_every_parameterization(linear: str) -> None:
    """Also replayed, and with factors that are stepped together, where it has them."""
    config = config_of(examples(linears.get(linear))[0])
    assert_as_ordinary(config)
    done = 0
    for changes in (
        {"train": {"recompute": "replay"}},
        {"optimizer": {"name": "spectron"}},
        {"optimizer": {"decay": "composed", "weight_decay": 0.1}},
    ):
        try:
            check(override(config, **changes))
        except ConfigError:
            continue
        assert_as_ordinary(override(config, **changes), steps=3)
        done += 1
    assert done


@pytest.mark.parametrize("seam", [architectures, streams], ids=["architecture", "stream"])
@pytest.mark.parametrize("recompute", ["none", "block", "replay", "invert"])
def test_every_architecture_and_stream(seam: Any, recompute: str) -> None:
    """A bias's gradient is there before its block has been run again (GPT-2 under replay)."""
    done = []
    for name in seam.names():
        config = config_of(examples(seam.get(name))[0], model={"linear": "crnet"})
        config = override(config, train={"recompute": recompute})
        try:
            check(config)
        except ConfigError:
            continue
        assert_as_ordinary(config, steps=3)
        done.append(name)
    assert done


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"tie_embeddings": True}},
        {"model": {"tie_embeddings": True}, "train": {"recompute": "replay"}},
        {"model": {"linear": "shared"}, "train": {"recompute": "block"}},
        {"model": {"linear": "shared"}, "train": {"recompute": "replay"}},
        {"train": {"keep_as": "nf4"}},
        {"train": {"precision": "bf16-mixed"}},
    ],
    ids=str,
)
def test_a_tensor_that_is_used_more_than_once(changes: dict[str, Any]) -> None:
    """A tied head; a matrix of all blocks; the cast of a weight."""
    config = override(config_of(), **changes)
    assert_as_ordinary(config)
    shared = [each for each in make_step(config).model.modules() if type(each) is SharedTensors]
    assert bool(shared) == (config.model.linear == "shared")


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("update", ["masters", "vectors", "stochastic", "plain"])
@pytest.mark.parametrize("name", ["adamw", "galore", "lora-muon"])
def test_bf16(update: str, num_parts: int, name: str) -> None:
    example = examples(optimizers.get(name))[0]
    sizes = {"precision": "bf16", "bf16_update": update, "micro_batch_size": 4 // num_parts}
    assert_as_ordinary(config_of(example, train=sizes), num_parts)


@pytest.mark.parametrize("name", ["adamw", "muon", "loro-adam"])
def test_micro_batches_add_up_before_the_update(name: str) -> None:
    """The last backward pass alone updates: the gradient is that of the whole batch."""
    config = config_of(examples(optimizers.get(name))[0], train={"micro_batch_size": 1})
    assert_as_ordinary(config, num_parts=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, by its version
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiled_blocks(recompute: str) -> None:
    """Traced, run eagerly: one node hands out the gradients of a whole block."""
    found = []
    for is_fused in (True, False):
        optimizer = {"fused_backward": is_fused}
        step = make_step(config_of(optimizer=optimizer, train={"recompute": recompute}))
        step.model.compile_blocks("aot_eager")
        done = [step(batch(number), at(number), None) for number in range(3)]
        found.append([[(each.loss, each.grad_norm) for each in done], everything(step)])
    assert_same(*found)


def test_tensors_that_leave_the_model() -> None:
    """The guide is gone in mid-run: the optimizer is made anew, and so are the hooks."""
    config = config_of(model={"linear": "self-guided", "self_guided": {"guided_steps": 2}})
    assert_as_ordinary(config, steps=5)


# What it takes


@pytest.mark.parametrize(
    ("changes", "num_parts"),
    [
        ({}, 1),
        ({}, 2),
        ({"model": {"linear": "full"}, "optimizer": {"name": "galore"}}, 1),
        ({"model": {"linear": "full", "vocab_size": 10}}, 1),
        ({"model": {"linear": "full", "tie_embeddings": True}}, 1),
        ({"model": {"vocab_size": 10}, "optimizer": {"name": "spectron"}}, 1),
        ({"model": {"linear": "cola", "vocab_size": 10}, "optimizer": {"name": "loro-adam"}}, 1),
        ({"model": {"linear": "sltrain", "vocab_size": 10}}, 1),
        ({"model": {"linear": "shared", "vocab_size": 10}}, 1),
        ({"model": {"linear": "lora", "vocab_size": 10}}, 1),
        ({"model": {"vocab_size": 10, "architecture": "gpt2", "num_kv_heads": None}}, 1),
        ({"model": {"vocab_size": 10, "architecture": "qwen3-moe"}}, 1),
        (
            {
                "model": {"vocab_size": 10},
                "optimizer": {"decay": "composed", "weight_decay": 0.1},
                "train": {"recompute": "replay"},
            },
            1,
        ),
        ({"train": {"precision": "bf16"}}, 1),
        ({"train": {"precision": "bf16"}}, 2),
    ],
    ids=str,
)
def test_gradients_alive_are_the_closed_form(changes: dict[str, Any], num_parts: int) -> None:
    """By hooks, to the byte; with a small vocabulary the blocks have the largest gradient."""
    config = override(config_of(optimizer=FUSED), **changes)
    config = override(config, train={"micro_batch_size": 4 // num_parts})
    check(config)
    work = workload(config)
    probe = Probe(work, CPU)
    state = probe.state()
    seen = probe.gradients(state)
    for term in ("all, ordinary", "at once, fused", "saved"):
        (row,) = [row for row in cost_rows(work) if (row.section, row.term) == ("gradients", term)]
        assert row.value == seen[term], term
    assert bool(seen["saved"]) == (num_parts == 1)
    if num_parts == 1:
        assert state["gradients"] == work.state_bytes["gradients"]
        assert 0 < state["gradients"] < seen["at once, fused"] < seen["all, ordinary"]


@pytest.mark.parametrize("linear", ["full", "crnet"])
@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("length", [8, 64])
def test_the_peak_of_a_step(linear: str, num_parts: int, length: int) -> None:
    """The trace of a whole step, within 3%; gradients are more than activations, or less."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_layers": 6, "vocab_size": 128}
    config = config_of(model={"linear": linear, "rank": "16", **sizes}, optimizer=FUSED)
    keys = {"micro_batch_size": 4 // num_parts}
    config = override(config, train=keys, data={"sequence_length": length})
    work = workload(config)
    probe = Probe(work, CPU)
    seen = probe.gradients(probe.state())
    rows = {row.term: row.value for row in cost_rows(work) if row.section == "gradients"}
    fused, ordinary = (rows[f"memory at the peak, {how}"] for how in ("fused", "ordinary"))
    assert fused == pytest.approx(step_memory(work), rel=0.01)
    assert seen["memory at the peak, fused"] == pytest.approx(fused, rel=0.03)
    assert seen["memory at the peak, ordinary"] == pytest.approx(ordinary, rel=0.03)
    if num_parts > 1:
        assert fused == ordinary
    else:
        assert 0 <= ordinary - fused < work.gradient_bytes
        assert length > 8 or ordinary > fused
        before = step_memory(work.with_fused(False))
        assert before - step_memory(work) == work.gradient_bytes - work.state_bytes["gradients"]


def test_searches_know_of_it() -> None:
    """A budget that gradients would not leave room in."""
    from crnet.cost.rank_search import Budget, find, parse_profile

    config = override(config_of(), optimizer=FUSED)
    most = sum(workload(config).state_bytes.values()) / 2**30 * (1 + 1e-9)
    ordinary = override(config, optimizer={"fused_backward": False})
    ranks = [
        find(each, Budget(state_gib=most), parse_profile("uniform"), 1).rank
        for each in (config, ordinary)
    ]
    assert ranks[0] == "4"
    assert int(ranks[1]) < 4


def test_a_layout_of_one_process_alone_may_have_it() -> None:
    from crnet.cost.fleet import parse_fleet
    from crnet.cost.layout_search import LayoutSpace

    config = config_of(optimizer=FUSED)
    assert len(LayoutSpace(config, parse_fleet("1xh100", 8, None)).sizes) == 1
    space = LayoutSpace(config, parse_fleet("2xh100", 8, None))
    assert space.sizes == []
    assert LayoutSpace(override(config, optimizer={"fused_backward": False}), space.fleet).sizes


# What is not finite


def spoil(step: Step, name: str | None) -> None:
    """From now on the loss, or a gradient, is no finite number."""
    if name is None:
        forward = step.model.forward

        def call(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            loss, count = forward(tokens, targets)
            return loss + math.inf, count

        step.model.forward = call
        return
    step.model.get_parameter(name).register_hook(lambda gradient: gradient * math.nan)


def on_the_device(step: Step) -> None:
    """As on a GPU: nobody waits for a norm."""
    fused_of(step).remove()
    method = optimizers.get("adamw")
    step._fused = FusedBackward(method, step.optimizer, step.model.trained(), on_host=False)


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_loss_that_is_not_finite_changes_nothing(where: str) -> None:
    step = make_step(config_of(optimizer=FUSED))
    if where == "device":
        on_the_device(step)
    step(batch(0), at(0), None)
    before = everything(step)
    spoil(step, None)
    with pytest.raises(TrainingError, match=r"step 2: loss inf.*; the weights were not changed\."):
        step(batch(1), at(1), None)
    weights, optimizer = everything(step)
    assert_same([weights, optimizer["state"]], [before[0], before[1]["state"]])


@pytest.mark.parametrize("where", ["host", "device"])
def test_from_a_gradient_that_is_not_finite_on_nothing_changes(where: str) -> None:
    """What came before is changed, and the message says so."""
    step = make_step(config_of(optimizer=FUSED))
    if where == "device":
        on_the_device(step)
    step(batch(0), at(0), None)
    before = {name: each.detach().clone() for name, each in step.model.named_parameters()}
    bad = "model.layers.1.self_attn.o_proj.A"
    spoil(step, bad)
    good = Path("run/checkpoints/step_1")
    with pytest.raises(TrainingError, match="some weights are changed already") as caught:
        step(batch(1), at(1), good)
    message = str(caught.value)
    assert f"Last good checkpoint: {good}" in message
    assert "--resume" in message
    assert "gradient norm nan" in message
    changed = {
        name for name, each in step.model.named_parameters() if not torch.equal(each, before[name])
    }
    above = {name for name in before if ".layers.2." in name or name == "lm_head.weight"}
    above |= {f"model.layers.1.mlp.{each}_proj.{factor}" for each in MLP for factor in "AB"}
    assert changed == {name for name in above if not waits(step.model.spec.tensors[name])}
    state = step.optimizer.state_dict()["state"].values()
    assert all(bool(value.isfinite().all()) for each in state for value in each.values())


MLP = ("gate", "up", "down")


def test_the_first_gradient_of_all_is_not_finite() -> None:
    step = make_step(config_of(optimizer=FUSED))
    before = everything(step)
    spoil(step, "lm_head.weight")
    with pytest.raises(TrainingError, match="the weights were not changed"):
        step(batch(0), at(0), None)
    weights, optimizer = everything(step)
    assert_same([weights, optimizer["state"]], [before[0], {}])


def test_where_the_device_decides_the_numbers_are_the_same() -> None:
    steps = [make_step(config_of(optimizer=FUSED)) for _ in range(2)]
    on_the_device(steps[1])
    for number in range(4):
        one, other = (each(batch(number), at(number), None) for each in steps)
        assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    assert_same(*map(everything, steps))
    assert not any(step.late for step in steps)


def test_a_gradient_that_comes_twice_is_an_error() -> None:
    step = make_step(config_of(optimizer=FUSED))
    weight = step.model.get_parameter("lm_head.weight")
    with fused_of(step).updating(torch.zeros(())):
        weight.sum().backward()
        with pytest.raises(RuntimeError, match=r"gradient of lm_head\.weight came twice"):
            weight.sum().backward()


# Runs


def fused_run(corpus: Path, **sections: dict[str, Any]) -> RunConfig:
    config = tiny(corpus, optimizer={"clip_norm": 0.0, **FUSED})
    return override(config, **sections)


@pytest.fixture(scope="module")
def ordinary(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ordinary") / "run"
    assert run(fused_run(corpus, optimizer={"fused_backward": False}), folder).finished
    return folder


def in_backward(patch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Do something in the middle of the ``number``-th step of this start, weights half changed."""
    plain, count = FusedBackward._update, iter(range(1, 10_000))

    def counted(self: FusedBackward, unit: Any) -> None:
        plain(self, unit)
        if next(count) == number * len({id(each) for each in self._unit_of.values()}) - 20:
            action()

    patch.setattr(FusedBackward, "_update", counted)


class Crash(BaseException):
    """Stands for a death that nothing handles."""


def test_died_in_a_backward_pass_and_resumed(corpus: Path, ordinary: Path, tmp_path: Path) -> None:
    """Figures, checkpoints and state are those of an ordinary run, never stopped."""

    def crash() -> None:
        raise Crash

    config = fused_run(corpus)
    with pytest.MonkeyPatch.context() as patch:
        in_backward(patch, 2, crash)
        with pytest.raises(Crash):
            run(config, tmp_path / "run")
    assert run(config, tmp_path / "run", resume=True).finished
    assert_same_run(tmp_path / "run", ordinary)


def run_until_killed(corpus: str, folder: str) -> None:
    """In a process of its own, which is gone in the middle of its tenth step."""
    patch = pytest.MonkeyPatch()
    in_backward(patch, 10, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(fused_run(Path(corpus)), Path(folder))


def test_killed_in_a_backward_pass_and_resumed(
    corpus: Path, ordinary: Path, tmp_path: Path
) -> None:
    program = "import sys, test_fused_backward as it; it.run_until_killed(*sys.argv[1:])"
    words = [sys.executable, "-c", program, str(corpus), str(tmp_path / "run")]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(words, env=env, capture_output=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved = checkpoint.newest(tmp_path / "run")
    assert saved is not None
    assert saved.progress.step == 8
    assert run(fused_run(corpus), tmp_path / "run", resume=True).finished
    assert_same_run(tmp_path / "run", ordinary)


def test_a_resumed_run_may_change_its_mind(corpus: Path, ordinary: Path, tmp_path: Path) -> None:
    for until, is_fused in ((4, True), (8, False), (None, True)):
        keys = {"stop_after_steps": until}
        config = fused_run(corpus, optimizer={"fused_backward": is_fused}, train=keys)
        run(config, tmp_path / "run", resume=until != 4)
    assert_same_run(tmp_path / "run", ordinary)


def test_no_checkpoint_is_written_of_a_step_that_failed(
    corpus: Path, ordinary: Path, tmp_path: Path
) -> None:
    config, plain, count = fused_run(corpus), FusedBackward._arrived, iter(range(10_000))

    def arrived(self: FusedBackward, parameter: Tensor) -> None:
        if self._is_on and next(count) == 10 * len(self._unit_of) + 20:
            assert parameter.grad is not None
            parameter.grad.mul_(math.nan)
        plain(self, parameter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedBackward, "_arrived", arrived)
        with pytest.raises(TrainingError, match=r"step 11: .*some weights are changed already"):
            run(config, tmp_path / "run")
    saved = checkpoint.newest(tmp_path / "run")
    assert saved is not None
    assert saved.progress.step == 8
    assert run(config, tmp_path / "run", resume=True).finished
    assert_same_run(tmp_path / "run", ordinary)


def test_beside_an_adapter(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = {"linear": "full"}
    run(tiny(corpus, model=model, train={"steps": 2}), tmp_path / "base")
    keys = {"adapter": "lora", "init_from": tmp_path / "base", "steps": 4}
    for is_fused in (True, False):
        optimizer = {"fused_backward": is_fused}
        config = fused_run(corpus, model=model, optimizer=optimizer, train=keys)
        run(config, tmp_path / str(is_fused))
    assert_same_run(tmp_path / "True", tmp_path / "False")
    saved = checkpoint.newest(tmp_path / "True")
    assert saved is not None
    assert len(saved.state()["optimizer"]["state"]) > 8


# Refused


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"optimizer": {"clip_norm": 1.0}},
            r"--optimizer\.clip-norm 1: .*say --optimizer\.clip-norm 0",
        ),
        ({"parallel": {"data": 2}}, r"--parallel\.data 2: .*leave one of them out"),
        ({"parallel": {"shard": 2}}, r"--parallel\.shard 2: .*leave one of them out"),
        ({"parallel": {"tensor": 2}}, r"--parallel\.tensor 2: .*leave one of them out"),
        (
            {"parallel": {"pipeline": 2}, "train": {"micro_batch_size": 1}},
            r"--parallel\.pipeline 2: .*leave one of them out",
        ),
    ],
    ids=str,
)
def test_refused_with_the_reason_and_the_mend(changes: dict[str, Any], reason: str) -> None:
    plain = config_of(model={"linear": "full"})
    check(override(plain, **changes))
    with pytest.raises(ConfigError, match=f"--optimizer.fused-backward with {reason}"):
        check(override(plain, **{**changes, "optimizer": FUSED | changes.get("optimizer", {})}))


def test_pairs_are_updated_together_and_vectors_later() -> None:
    spec = model_spec(config_of().model)
    trained = {name: each for name, each in spec.tensors.items() if each.trained}
    factors = sum(each.role in ("factor_in", "factor_out") for each in trained.values())
    alone = updated_at_once(optimizers.get("adamw"), trained, False)
    pairs = updated_at_once(optimizers.get("spectron"), trained, False)
    assert pairs == updated_at_once(optimizers.get("adamw"), trained, True)
    assert len(alone) - len(pairs) == factors / 2
    for found in (alone, pairs):
        names = {name for unit in found for name in unit}
        assert names == {name for name, each in trained.items() if not waits(each)}
