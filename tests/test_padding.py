"""A feed-forward stored wider than declared: the same model, and no trace of it on the disk.

fp64: losses within 1e-12 of each other, relative (sums in another order); what fills up is exactly
0. Bytes of a checkpoint are compared where nothing has rounded.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crnet import linears, optimizers
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import ModelConfig, OptimizerConfig
from crnet.config.serialize import override
from crnet.cost.workload import workload
from crnet.inference.load import load_model
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from crnet.model.padding import cut, pad, stored_on
from crnet.optimizers import Settings
from crnet.recompute.plan import RecomputePlan
from crnet.storage import checkpoint
from crnet.train import run as train
from crnet.train import start
from crnet.train.resume import all_weights, snapshot
from shapes import is_legal, tiny
from test_train import losses_of, run, weights_of
from test_train import tiny as tiny_run

WIDTH = 21
SETTINGS = Settings(lr=5e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, seed=0)


def config_of(linear: str, architecture: str) -> ModelConfig:
    made = tiny(linear=linear, architecture=architecture, intermediate_size=WIDTH)
    return made if architecture == "llama" else dataclasses.replace(made, num_kv_heads=None)


PAIRS = [
    (linear, architecture)
    for architecture in ("llama", "gpt2")
    for linear in linears.names()
    if linears.get(linear).pads and is_legal(config_of(linear, architecture))
]
QUICK = {("crnet", "llama"), ("full", "llama"), ("cola", "llama"), ("crnet", "gpt2")}
each_pair = pytest.mark.parametrize(
    ("linear", "architecture"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK else [pytest.mark.slow], id="-".join(pair))
        for pair in PAIRS
    ],
)


def made(spec: ModelSpec, name: str = "adamw") -> tuple[LanguageModel, torch.optim.Optimizer]:
    torch.set_default_dtype(torch.float64)
    model = build(spec, 3, dtype=torch.float64)
    method = optimizers.get(name)
    options = getattr(OptimizerConfig(), name, None)
    return model, method.build(model.trained(), options, SETTINGS)


def trained(model: LanguageModel, optimizer: torch.optim.Optimizer, steps: int = 20) -> list[float]:
    tokens = torch.randint(0, 31, (2, 13), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(steps):
        model.recompute(RecomputePlan("replay", (2,)) if step % 2 else RecomputePlan())
        loss, count = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def filling(model: LanguageModel, tensors: dict[str, Tensor]) -> list[Tensor]:
    """What lies outside the declared shape of each tensor that has the stored one."""
    found = []
    for name, tensor in tensors.items():
        outside = torch.ones(tensor.shape, dtype=torch.bool)
        outside[tuple(map(slice, model.spec.tensors[name].shape))] = False
        found.append(tensor.detach()[outside])
    return found


def test_who_can_be_padded():
    """Not: ReLoRA, whose merge draws A anew as wide as it is; SLTrain and others, whose numbers
    hang on a place in the matrix or its width; Muon, APOLLO and others, whose updates hang on its
    shape."""
    pads = {name for name in linears.names() if linears.get(name).pads}
    assert {"crnet", "resformer", "full", "lowrank", "cola", "lora", "lax", "loro"} <= pads
    assert not pads & {"relora", "sltrain", "dlr", "lost", "fosl", "blast"}
    exact = {name for name in optimizers.names() if optimizers.get(name).pads}
    assert exact == {"adamw", "lion", "sgd"}
    assert {pair[1] for pair in PAIRS} == {"llama", "gpt2"}
    with pytest.raises(ValueError, match="cannot be padded"):
        model_spec(config_of("sltrain", "llama")).padded(64)


@each_pair
def test_padding_changes_no_loss_and_stays_zero(linear: str, architecture: str):
    spec = model_spec(config_of(linear, architecture))
    plain, plain_optimizer = made(spec)
    wide, optimizer = made(spec.padded(64))
    assert any(64 in parameter.shape for parameter in wide.parameters())
    losses = trained(wide, optimizer)
    assert losses == pytest.approx(trained(plain, plain_optimizer), rel=1e-12, abs=0)
    assert losses[-1] < losses[0] - 0.2
    tensors = dict(wide.named_parameters())
    grads = {name: each.grad for name, each in tensors.items() if each.grad is not None}
    fillings = [*filling(wide, tensors), *filling(wide, grads)]
    assert sum(each.numel() for each in fillings) > 43 * 16  # beyond 21 of 64
    assert not any(each.any() for each in fillings)
    for state in optimizer.state.values():
        assert all(not value.isnan().any() for value in state.values())
    wanted = all_weights(plain)
    for name, weight in all_weights(wide).items():
        assert weight.shape == spec.tensors[name].shape
        # A bias of the keys moves no softmax: its gradient is rounding, which Adam blows up.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(weight, wanted[name], rtol=1e-9, atol=1e-12, msg=name)


def test_what_lion_fills_up_stays_zero():
    """The sign of 0 is 0. fp64; no sign of these steps hangs on rounding."""
    spec = model_spec(config_of("crnet", "llama"))
    (plain, plain_optimizer), (wide, optimizer) = (
        made(each, "lion") for each in (spec, spec.padded(64))
    )
    losses = trained(wide, optimizer, 5)
    assert losses == pytest.approx(trained(plain, plain_optimizer, 5), rel=1e-12, abs=0)
    assert not any(each.any() for each in filling(wide, dict(wide.named_parameters())))


@each_pair
def test_a_padded_model_starts_from_the_same_numbers(linear: str, architecture: str):
    spec = model_spec(config_of(linear, architecture))
    wide, plain = all_weights(build(spec.padded(64), 3)), all_weights(build(spec, 3))
    assert wide.keys() == plain.keys()
    assert all(torch.equal(wide[name], plain[name]) for name in plain)


def test_states_come_through_a_checkpoint_in_their_declared_shape():
    """Bit for bit: cutting and padding move numbers, they compute none."""
    spec = model_spec(config_of("crnet", "llama"))
    model, optimizer = made(spec.padded(64))
    trained(model, optimizer, 2)
    state = snapshot(optimizer, model.spec)["optimizer"]
    sizes = {name: tensor.shape for name, tensor in spec.tensors.items()}
    for group in state["param_groups"]:
        for index, name in zip(group["params"], group["names"], strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                value = state["state"][index][key]
                assert value.shape == sizes[name]
                assert value.untyped_storage().nbytes() == value.numel() * 8, "saved with its zeros"
    other, again = made(spec.padded(32))
    train.restore(again, {"optimizer": state, "torch_rng": torch.get_rng_state()}, CPU, other.spec)
    for index, each in snapshot(again, other.spec)["optimizer"]["state"].items():
        for key, value in each.items():
            assert torch.equal(value, state["state"][index][key])


CPU = torch.device("cpu")


def test_pad_and_cut():
    tensor = torch.arange(6.0).view(2, 3)
    wide = pad(tensor, (4, 3))
    assert wide.shape == (4, 3)
    assert torch.equal(wide[:2], tensor)
    assert not wide[2:].any()
    assert torch.equal(cut(wide, (2, 3)), tensor)
    assert pad(tensor, (2, 3)) is tensor
    assert cut(tensor, (2, 3)) is tensor


@pytest.mark.parametrize(
    ("width", "device", "optimizer", "wanted"),
    [
        (5461, "cuda", "adamw", 5504),
        (5461, "cuda", None, 5504),
        (5461, "cpu", "adamw", 5461),
        (5461, "cuda", "muon", 5461),
        (5464, "cuda", "adamw", 5464),  # a multiple of 8 is aligned
        (13653, "cuda", "adamw", 13696),
        (21845, "cuda", "adamw", 21888),
    ],
)
def test_odd_widths_are_padded_on_cuda(width, device, optimizer, wanted):
    spec = model_spec(tiny(intermediate_size=width, num_layers=2))
    stored = stored_on(spec, device, optimizer and optimizers.get(optimizer))
    assert stored.stored_slots[1][-1].in_size == wanted
    assert stored.tensors == spec.tensors
    assert stored.slots == spec.slots


# Runs


def padded_runs(patch: pytest.MonkeyPatch) -> None:
    """From now on runs are stored on the CPU as they would be on CUDA."""
    for module in (start, train):
        patch.setattr(module, "stored_on", lambda spec, *_: spec.padded(64))


def odd_run(corpus: Path, linear: str, steps: int):
    model = {"linear": linear, "intermediate_size": 45}
    return tiny_run(corpus, model=model, train={"steps": steps, "save_every_steps": 4})


@pytest.mark.parametrize("linear", ["crnet", "full"])
def test_a_checkpoint_does_not_know_of_padding(
    linear: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bytes of every file before a step; afterwards losses to fp32's rounding, whichever side
    wrote the checkpoint that is gone on from."""
    config = odd_run(corpus, linear, 8)
    run(config, tmp_path / "plain")
    with monkeypatch.context() as patch:
        padded_runs(patch)
        result = run(config, tmp_path / "wide")
    assert result.checkpoint is not None
    saved = checkpoint.load(result.checkpoint)
    assert result.num_parameters == workload(saved.config).num_parameters()
    plain, wide = weights_of(tmp_path / "plain"), weights_of(tmp_path / "wide")
    assert {name: each.shape for name, each in wide.items()} == {
        name: each.shape for name, each in plain.items()
    }
    assert losses_of(tmp_path / "wide") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-4)
    longer = override(config, train={"steps": 12})
    with monkeypatch.context() as patch:
        padded_runs(patch)
        run(longer, tmp_path / "plain", resume=True)
    run(longer, tmp_path / "wide", resume=True)
    assert losses_of(tmp_path / "wide") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-3)


def test_files_of_a_padded_run_are_those_of_a_plain_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A rate of almost 0: the weights of both are the initial ones, and their files the same bytes.
    The state of the optimizer differs by rounding and takes as many bytes."""
    config = override(odd_run(corpus, "crnet", 1), optimizer={"lr": 1e-30})
    run(config, tmp_path / "plain")
    padded_runs(monkeypatch)
    run(config, tmp_path / "wide")
    folders = [tmp_path / side / "checkpoints" / "step_1" for side in ("plain", "wide")]
    weights = [(folder / checkpoint.WEIGHTS).read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    plain, wide = ((folder / checkpoint.STATE).stat().st_size for folder in folders)
    assert plain == wide


def test_a_padded_run_resumes_bit_for_bit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    padded_runs(monkeypatch)
    config = odd_run(corpus, "crnet", 8)
    run(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_8")
    run(config, tmp_path / "parts", resume=True)
    ends = [tmp_path / side / "checkpoints" / "step_8" for side in ("whole", "parts")]
    for file in (checkpoint.WEIGHTS, checkpoint.STATE):
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes(), file
    wide = load_model(checkpoint.load(ends[0]), spec=stored_wide(ends[0]))
    narrow = load_model(checkpoint.load(ends[0]))
    tokens = torch.arange(12).view(1, 12)
    torch.testing.assert_close(wide.logits(tokens), narrow.logits(tokens), rtol=1e-4, atol=1e-5)


def stored_wide(folder: Path) -> ModelSpec:
    return model_spec(checkpoint.load(folder).config.model).padded(64)
