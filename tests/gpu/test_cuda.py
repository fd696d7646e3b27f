"""What only a CUDA device can show: the fast paths there, and a run that resumes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from crnet.config.model_spec import model_spec
from crnet.config.sections import DataConfig, ModelConfig, RunConfig, TrainConfig
from crnet.cost.micro_batch import MicroBatch
from crnet.cost.peak import peak_bytes as predicted_bytes
from crnet.kernels import naive
from crnet.kernels.carried import carried_lowrank
from crnet.measure.memory import peak_bytes
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from crnet.recompute.plan import RecomputePlan
from crnet.train import run as train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_carried_lowrank_equals_the_plain_formula(dtype):
    """bf16: within a few roundings (2^-8) of the fp64 result; fp32: 1e-4 of its largest item."""
    torch.manual_seed(0)
    shapes = ((4, 64, 96), (96, 24), (24, 160), (4, 64, 160), (1,))
    wide = [torch.randn(shape, device="cuda", dtype=torch.float64) for shape in shapes]
    fast = [tensor.to(dtype).requires_grad_() for tensor in wide]
    slow = [tensor.to(dtype).double().requires_grad_() for tensor in wide]
    y_fast, y_slow = carried_lowrank(*fast), naive.carried_lowrank(*slow)
    dy = torch.randn_like(y_slow).to(dtype)
    y_fast.backward(dy)
    y_slow.backward(dy.double())
    bound = 4e-2 if dtype == torch.bfloat16 else 1e-4
    pairs = [(y_fast, y_slow), *((a.grad, b.grad) for a, b in zip(fast, slow, strict=True))]
    for got, wanted in pairs:
        assert got is not None
        assert wanted is not None
        assert (got.double() - wanted).abs().max() <= bound * wanted.abs().max()


def make(device: str, dtype: torch.dtype = torch.float32, **changes) -> LanguageModel:
    config = dataclasses.replace(ModelConfig(), vocab_size=512, **changes)
    return build(model_spec(config), 3, device, dtype)


def test_the_same_seed_gives_the_same_weights_on_every_device():
    for left, right in zip(make("cpu").parameters(), make("cuda").parameters(), strict=True):
        assert torch.equal(left, right.cpu())


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
def test_a_run_trains_saves_and_resumes(tmp_path, precision):
    config = RunConfig(
        model=ModelConfig(hidden_size=64, intermediate_size=176, num_layers=3, num_heads=4),
        data=DataConfig(sequence_length=64, validation_tokens=8192, cache_dir=tmp_path / "cache"),
        train=TrainConfig(steps=20, batch_size=8, precision=precision, device="cuda"),
    )
    first = train.run(config, tmp_path / "run", progress=False)
    assert first.before is not None
    assert first.after is not None
    assert first.after.loss < first.before.loss - 0.5
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=24))
    second = train.run(longer, tmp_path / "run", resume=True, progress=False)
    assert second.step == 24


@pytest.mark.parametrize("keep_attention", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_changes_no_bit(dtype, keep_attention):
    """The same kernels on both sides; the flash kernel keeps its random state too."""
    tokens = torch.randint(0, 512, (4, 128), device="cuda")
    grads = []
    for plan in (RecomputePlan(), RecomputePlan("replay", (2, 4), keep_attention)):
        model = make("cuda", dtype, num_layers=6)
        model.recompute(plan)
        loss, _ = model(tokens, tokens)
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        if "embed" not in name:  # the gradient of a lookup adds in no fixed order on a GPU
            assert torch.equal(grad, grads[1][name]), name


def test_changed_weights_are_refused():
    """Through the version counter at once; the sums of bits are compared on the device, and their
    error would end the process's use of it."""
    model = make("cuda")
    model.recompute(RecomputePlan("replay", (2, 4)))
    tokens = torch.randint(0, 512, (4, 128), device="cuda")
    loss, _ = model(tokens, tokens)
    with torch.no_grad():
        model.model.blocks()[2].maps["up"].B.mul_(1.5)
    with pytest.raises(RuntimeError, match="weights were changed"):
        loss.backward()


def test_peak_falls_as_predicted():
    """The allocator's count within 10% of the closed form, which was fitted to no GPU."""
    tokens = torch.randint(0, 512, (8, 256), device="cuda")
    plans = (RecomputePlan(), RecomputePlan("block"), RecomputePlan("replay", (6, 9)))
    for plan in plans:
        model = make("cuda", torch.bfloat16, hidden_size=512, intermediate_size=1376, num_layers=12)
        model.recompute(plan)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

        def run(model=model) -> None:
            loss, _ = model(tokens, tokens)
            loss.backward()

        run()
        predicted = predicted_bytes(MicroBatch(model.spec, 8, 256, "bf16"), plan)
        assert abs(peak_bytes(run, "cuda") / predicted - 1) < 0.1
