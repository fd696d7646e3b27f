"""One step and one evaluation from near: what a late step leaves alone, what moves to the device,
what an evaluation casts, and what is read how often.

Equality is by bits unless a tolerance is named.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crnet.config.model_spec import model_spec
from crnet.config.sections import DataConfig, ModelConfig, RunConfig, TrainConfig
from crnet.config.serialize import override
from crnet.data.prepare import prepare
from crnet.data.rows import IGNORED, Rows
from crnet.errors import TrainingError
from crnet.inference import evaluate as evaluation
from crnet.inference.evaluate import evaluate, evaluate_unless, widened
from crnet.linears.crnet.module import CRNetMap
from crnet.model.build import build, initial_values, set_dtype
from crnet.recompute.plan import RecomputePlan
from crnet.storage import checkpoint, metrics
from crnet.storage.checkpoint import Progress
from crnet.train import loop as loops
from crnet.train import run as train
from crnet.train import start
from crnet.train.deterministic import WORKSPACE, deterministic
from crnet.train.resume import snapshot
from crnet.train.step import Step, in_parts, one_tensor

CPU = torch.device("cpu")
TINY = RunConfig(
    model=ModelConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=2,
        rank="8",
        vocab_size=300,
    ),
    data=DataConfig(
        documents="paragraph", vocab_size=300, sequence_length=16, validation_tokens=600
    ),
    train=TrainConfig(
        steps=12, batch_size=8, threads=1, device="cpu", log_every_steps=3, eval_every_steps=0
    ),
)
NO_CLIP = {"clip_norm": 0.0}


def batch(number: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(number)
    draw = functools.partial(torch.randint, 0, 300, generator=generator)
    return [(draw((4, 16)), draw((4, 16))) for _ in range(2)]


def at(step: int) -> Progress:
    return Progress(step=step, position=8 * step, tokens=0)


def make_step(config: RunConfig, *, late: bool) -> Step:
    plain = train.make_step(config, model_spec(config.model), CPU, None)
    return Step(config, plain.engine, plain.optimizer, CPU, late=late)


def everything(step: Step) -> list[Tensor]:
    """Weights, moments and counters."""
    states = step.optimizer.state_dict()["state"]
    found = [each.detach() for each in step.model.parameters()]
    found += [value for state in states.values() for value in state.values()]
    return [each.clone() for each in found]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def spoil(step: Step, what: str) -> None:
    """From now on the loss, or every gradient, is no finite number."""
    forward = step.model.forward

    def call(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, count = forward(tokens, targets)
        if what == "loss":
            return loss + math.inf, count
        loss.register_hook(lambda grad: grad * math.nan)
        return loss, count

    step.model.forward = call


# Late steps


def test_late_steps_without_clipping_are_the_same_bits() -> None:
    config = override(TINY, optimizer=NO_CLIP)
    late, plain = make_step(config, late=True), make_step(config, late=False)
    assert late.late
    assert not plain.late
    for number in range(4):
        ours, theirs = (each(batch(number), at(number), None) for each in (late, plain))
        assert (ours.loss, ours.grad_norm, ours.lr) == (theirs.loss, theirs.grad_norm, theirs.lr)
    assert same(everything(late), everything(plain))


@pytest.mark.parametrize("clip_norm", [1e-3, 0.5, 1e3])
def test_late_steps_are_clipped(clip_norm: float) -> None:
    """A division as gradients are read, in place of a product before: another rounding, 2^-23 of an
    item. Where gradients are as small as Adam's eps it counts for more: 1e-4 of a step's 1.5e-3."""
    config = override(TINY, optimizer={"clip_norm": clip_norm})
    late, plain = make_step(config, late=True), make_step(config, late=False)
    for number in range(3):
        for each in (late, plain):
            each(batch(number), at(number), None)
    for ours, theirs in zip(everything(late), everything(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1.5e-7)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("good_steps", [0, 2])
def test_a_late_step_that_is_not_finite_changes_nothing(what: str, good_steps: int) -> None:
    """Nor does the one after it: the error comes before its update, and names the right step."""
    step = make_step(TINY, late=True)
    for number in range(good_steps):
        step(batch(number), at(number), None)
    weights = [each.detach().clone() for each in step.model.parameters()]
    moments = everything(step)
    spoil(step, what)
    done = step(batch(good_steps), at(good_steps), None)
    assert same([each.detach() for each in step.model.parameters()], weights)
    if good_steps:
        assert same(everything(step), moments)
    named = rf"step {good_steps + 1}: .*positions {8 * good_steps} to {8 * good_steps + 7}"
    with pytest.raises(TrainingError, match=named):
        done.check()
    with pytest.raises(TrainingError, match=named):
        step(batch(9), at(good_steps + 1), None)
    with pytest.raises(TrainingError, match=named):
        step.check()
    assert same([each.detach() for each in step.model.parameters()], weights)


def test_an_event_waits_for_the_figures() -> None:
    """A merge of weights cannot be undone: the error of its own step comes before it."""
    relora = {"linear": "relora", "relora": {"merge_every": 2, "reset_every": 2}}
    config = override(TINY, model=relora)
    step = make_step(config, late=True)
    step(batch(0), at(0), None)
    assert step.model.has_events(2)
    assert not step.model.has_events(1)
    before = everything(step)
    spoil(step, "gradient")
    with pytest.raises(TrainingError, match="step 2: "):
        step(batch(1), at(1), None)
    assert same(everything(step), before)


@pytest.mark.parametrize("name", ["muon", "apollo"])
def test_an_optimizer_that_cannot_pass_over_a_step_is_never_late(name: str) -> None:
    step = make_step(override(TINY, optimizer={"name": name}), late=True)
    assert not step.late
    before = everything(step)
    spoil(step, "gradient")
    with pytest.raises(TrainingError, match="step 1: "):
        step(batch(0), at(0), None)
    assert same(everything(step), before)


@pytest.fixture
def late_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "Step", functools.partial(Step, late=True))


def run(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    train.run(config, folder, progress=False)
    rows = metrics.read(folder / "metrics.jsonl")
    return [
        {key: row[key] for key in row if key not in ("tokens_per_s", "peak_bytes")} for row in rows
    ]


def on(corpus: Path, **sections: Any) -> RunConfig:
    config = override(TINY, data={"source": (str(corpus),)}, model={"vocab_size": None})
    return override(config, **sections)


def test_a_late_run_is_the_same_run(
    corpus: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = on(corpus, optimizer=NO_CLIP, train={"save_every_steps": 4})
    plain = run(config, tmp_path / "plain")
    request.getfixturevalue("late_runs")
    assert run(config, tmp_path / "late") == plain
    ours, theirs = (checkpoint.newest(tmp_path / name) for name in ("late", "plain"))
    assert ours is not None
    assert theirs is not None
    wanted = theirs.weights()
    assert all(torch.equal(weight, wanted[name]) for name, weight in ours.weights().items())


@pytest.mark.parametrize("bad_step", [4, 5, 12])
def test_a_late_run_saves_and_logs_nothing_of_a_bad_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_runs: None, bad_step: int
) -> None:
    """At a step that is due for a checkpoint, at one where nothing is due, at the last."""
    build_model, calls = start.build, iter(range(1, 100))

    def spoiled(*arguments: Any) -> Any:
        model = build_model(*arguments)
        forward = model.forward

        def call(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            loss, count = forward(tokens, targets)
            return (loss * math.nan if model.training and next(calls) == bad_step else loss), count

        model.forward = call
        return model

    monkeypatch.setattr(start, "build", spoiled)
    with pytest.raises(TrainingError, match=f"step {bad_step}: loss nan"):
        run(on(corpus, train={"save_every_steps": 4}), tmp_path / "run")
    saved = checkpoint.newest(tmp_path / "run")
    newest = 4 * ((bad_step - 1) // 4)
    assert (saved.progress.step if saved else 0) == newest
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(3, bad_step, 3))


# To the device


def test_batches_travel_as_one_tensor() -> None:
    parts = [(torch.arange(n * 5).view(n, 5), torch.full((n, 5), IGNORED)) for n in (3, 3, 1)]
    both = one_tensor(parts)
    assert both.dtype == torch.int32
    assert both.shape == (2, 7, 5)
    back = in_parts(both, [3, 3, 1])
    for ours, theirs in zip(back, parts, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == torch.int64
            assert torch.equal(one, other)


# What is read how often


def test_the_guard_of_invert_reads_the_gains_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And anew after every update."""
    read: list[int] = []
    gain = CRNetMap.gain
    monkeypatch.setattr(CRNetMap, "gain", lambda self: read.append(1) or gain(self))
    step = make_step(TINY, late=False)
    step.model.recompute(RecomputePlan("invert"))
    for number in range(3):
        step(batch(number), at(number), None)
        assert len(read) == 14 * (number + 1)  # two blocks of seven maps, not twice for two parts
    step.model(*batch(0)[0])
    step.model(*batch(0)[0])
    assert len(read) == 14 * 5  # outside a step nobody promised that weights stay


def test_initial_values_hang_on_no_thread() -> None:
    spectral = {"crnet": {"init": "spectral"}}
    for config in (TINY, override(TINY, model=spectral)):
        spec = model_spec(config.model)
        alone = list(initial_values(spec, 7))
        try:
            torch.set_num_threads(3)
            together = list(initial_values(spec, 7))
        finally:
            torch.set_num_threads(1)
        assert [name for name, _ in together] == list(spec.tensors)
        for (_, ours), (name, wanted) in zip(together, alone, strict=True):
            assert torch.equal(ours, wanted), name


def test_a_model_is_built_without_torchs_compiler() -> None:
    """Nor its symbols, in a process of its own: importing them is a second of every start."""
    program = (
        "import sys\n"
        "from crnet.config.model_spec import model_spec\n"
        "from crnet.config.sections import ModelConfig\n"
        "from crnet.model.build import build\n"
        "for name in ('llama', 'gpt2'):\n"
        "    config = ModelConfig(architecture=name, hidden_size=12, vocab_size=9, rank='2')\n"
        "    build(model_spec(config), 0)\n"
        "print('torch' in sys.modules, 'torch._dynamo' in sys.modules, 'sympy' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "False"], done.stderr


def test_drawing_values_may_be_given_up() -> None:
    """Whoever stops reading leaves no thread at work."""
    try:
        torch.set_num_threads(3)
        values = initial_values(model_spec(TINY.model), 0)
        next(values)
        values.close()
        assert list(values) == []
    finally:
        torch.set_num_threads(1)


# Evaluation


@pytest.fixture
def rows(corpus: Path) -> Rows:
    return Rows(prepare(on(corpus).data, progress=False), "validation", 16, "packed")


def narrow_model(**changes: Any) -> Any:
    config = override(TINY, model=changes)
    return build(model_spec(config.model), 3, CPU, torch.bfloat16)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"architecture": "gpt2"}])
def test_a_bf16_model_is_evaluated_as_its_fp32_copy(rows: Rows, changes: Any) -> None:
    model = narrow_model(**changes)
    wide = copy.deepcopy(model)
    set_dtype(wide, torch.float32)
    kept = dict(model.named_parameters())
    assert evaluate(model, rows, 600) == evaluate(wide, rows, 600)
    now = dict(model.named_parameters())
    assert now.keys() == kept.keys()
    assert all(now[name] is kept[name] for name in kept)
    narrow = {name for name, spec in model.spec.tensors.items() if spec.dtype == "model"}
    assert {now[name].dtype for name in narrow} == {torch.bfloat16}
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.modules())


def test_one_block_at_a_time_is_wide(rows: Rows) -> None:
    model = narrow_model(num_layers=5)
    blocks = model.model.blocks()
    seen: list[int] = []

    def is_wide(module: nn.Module) -> bool:
        return all(each.dtype == torch.float32 for each in module.parameters())

    with widened(model):
        # Behind the hooks of ``widened``, hence with the block as it runs.
        for block in blocks:
            block.register_forward_pre_hook(lambda *_: seen.append(sum(map(is_wide, blocks))))
        with torch.no_grad():
            model(*batch(0)[0])
        assert not any(map(is_wide, blocks))
        assert is_wide(model.lm_head)
    assert seen == [1] * 5


@pytest.mark.parametrize("what", ["a block fails", "stopped"])
def test_the_weights_come_back_whatever_happens(rows: Rows, what: str) -> None:
    model = narrow_model()
    kept = dict(model.named_parameters())
    model.train()
    stopped: Callable[[], bool] = lambda: what == "stopped"  # noqa: E731
    if what == "stopped":
        assert evaluate_unless(stopped, model, rows, 600) is None
    else:
        model.model.blocks()[1].self_attn.forward = None
        with pytest.raises(TypeError):
            evaluate_unless(stopped, model, rows, 600)
    assert all(each is kept[name] for name, each in model.named_parameters())
    assert model.training


def test_in_bf16_products_are_autocasts(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(model_spec(TINY.model), 3, CPU)
    found = evaluate_unless(lambda: False, model, rows, 600, "bf16")
    assert found is not None
    monkeypatch.setattr(evaluation, "computing", lambda *_: torch.no_grad())
    with torch.autocast("cpu", torch.bfloat16):
        wanted = evaluate_unless(lambda: False, model, rows, 600)
    assert found == wanted
    assert found != evaluate(model, rows, 600)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, by its version
def test_compiled_blocks_are_evaluated_as_written(rows: Rows) -> None:
    """No graph is made for the shapes of an evaluation, and its bits are those without."""
    model, compiled = (build(model_spec(TINY.model), 3, CPU) for _ in range(2))
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for block in compiled.model.blocks():
        block.compile(backend=backend)
    assert evaluate(compiled, rows, 600) == evaluate(model, rows, 600)
    assert graphs == []
    compiled(*batch(0)[0])
    assert graphs != []


def test_before_the_first_step_a_few_tokens_are_enough(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "TOKENS_BEFORE_TRAINING", 64)
    found = run(on(corpus, train={"steps": 2}), tmp_path / "run")
    read = {row["step"]: row["val_tokens"] for row in found if "val_tokens" in row}
    assert read[0] == 64
    assert 64 < read[2] <= 600
    assert {row["val_precision"] for row in found if "val_tokens" in row} == {"fp32"}


# Determinism


def test_deterministic_on_a_gpu_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches alone: they can be set without a device."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    cuda = torch.backends.cuda

    def switches() -> tuple[bool, ...]:
        allowed = cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
        return torch.are_deterministic_algorithms_enabled(), *allowed, cuda.flash_sdp_enabled()

    before = switches()
    with deterministic(torch.device("cuda")):
        assert switches() == (True, False, False, True)
        assert os.environ[WORKSPACE] == ":4096:8"
    assert switches() == before
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic(torch.device("cuda")):
        assert os.environ[WORKSPACE] == ":16:8"


def test_deterministic_on_a_cpu_is_what_it_is_anyway(corpus: Path, tmp_path: Path) -> None:
    plain = run(on(corpus, train={"steps": 3}), tmp_path / "plain")
    fixed = run(on(corpus, train={"steps": 3, "deterministic": True}), tmp_path / "fixed")
    assert fixed == plain
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_on_the_cpu_asks_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking a GPU for its random state makes a context on it, in a machine that has some."""

    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("a GPU was asked")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state", "get_rng_state_all", "current_device"):
        monkeypatch.setattr(torch.cuda, name, asked)
    step = make_step(TINY, late=False)
    state = snapshot(step.optimizer, step.model.spec)
    assert set(state) == {"optimizer", "torch_rng"}
