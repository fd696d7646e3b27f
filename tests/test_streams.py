"""Every stream under every policy that it allows, and Attention Residuals beside the formula."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crnet import architectures, linears, streams
from crnet.config.model_spec import model_spec
from crnet.config.sections import OptimizerConfig
from crnet.measure.contract_cost import check_kept_bytes
from crnet.measure.examples import Example
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from crnet.recompute.plan import RecomputePlan
from crnet.streams.attnres.module import average, naive_average
from shapes import TINY

each_stream = pytest.mark.parametrize("stream", streams.names())
each_linear = pytest.mark.parametrize("linear", linears.names())


def make(stream: str, linear: str = "crnet") -> LanguageModel:
    model = build(model_spec(dataclasses.replace(TINY, linear=linear, stream=stream)), 0)
    generator = torch.Generator().manual_seed(5)
    for spec, parameter in model.trained().values():
        if spec.role == "gain":  # off the point where the average is plain
            parameter.data.add_(torch.randn(spec.shape, generator=generator) * 0.3)
    return model


def gradients(model: LanguageModel) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss_sum, _ = model(tokens[:, :-1], tokens[:, 1:])
    loss_sum.backward()
    found = {}
    for name, (_, parameter) in model.trained().items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return loss_sum.detach(), found


@each_stream
@each_linear
def test_policies_agree_to_the_bit(stream: str, linear: str):
    model = make(stream, linear)
    loss, expected = gradients(model)
    for policy in streams.get(stream).policies:
        if policy == "invert":  # not exact, and not for every parameterization
            continue
        model.recompute(RecomputePlan(policy, (2,)))
        other_loss, found = gradients(model)
        assert torch.equal(loss, other_loss)
        for name, gradient in expected.items():
            assert torch.equal(gradient, found[name]), (policy, name)


@each_stream
@pytest.mark.parametrize("architecture", architectures.names())
def test_kept_bytes_with_every_architecture(stream: str, architecture: str):
    """Exact, under each policy and precision: also where writes are sums with a bias."""
    model = dataclasses.replace(TINY, num_kv_heads=None, architecture=architecture, stream=stream)
    example = Example(streams.get(stream), model, OptimizerConfig(lr=2e-2))
    assert list(check_kept_bytes(example)) == []


@each_stream
@pytest.mark.parametrize("sublayer_idx", [0, 1, 6])
def test_tensors_are_the_modules(stream: str, sublayer_idx: int):
    spec = model_spec(dataclasses.replace(TINY, stream=stream))
    where = (sublayer_idx, 6, spec.shape, spec.stream_options)
    actual = {
        name: tuple(parameter.shape)
        for name, parameter in streams.get(stream).make(*where).named_parameters()
    }
    assert actual == {
        name: each.shape for name, each in streams.get(stream).tensors(*where).items()
    }


@each_stream
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_bytes_of_reads(stream: str, dtype: torch.dtype):
    """Exact over a whole stream: each storage once, what sublayers get and write included."""
    spec = model_spec(dataclasses.replace(TINY, stream=stream))
    method, size, rows, sublayers = spec.stream, TINY.hidden_size, 6, 4
    own, kept = set(), dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    state: tuple[Tensor, ...] = (torch.randn(2, 3, size, dtype=dtype, requires_grad=True),)
    alive: list[Any] = [state]
    expected = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for idx in range(sublayers + 1):
            module = method.make(idx, sublayers, spec.shape, spec.stream_options).to(dtype)
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
                own.add(parameter.untyped_storage().data_ptr())
            x_BTD = module.read(state)
            keep(x_BTD)  # the norm behind it does
            y_BTD = torch.randn(2, 3, size, dtype=dtype, requires_grad=True)
            state = module.write(state, y_BTD) if idx < sublayers else state
            alive += [module, x_BTD, y_BTD, state]
            work = method.work(
                *(idx, sublayers, spec.shape, spec.stream_options),
                *(rows, dtype.itemsize, dtype.itemsize),
            )
            expected += work.kept_bytes + rows * size * dtype.itemsize
            expected += rows * size * dtype.itemsize if work.keeps_writes else 0
    assert sum(nbytes for address, nbytes in kept.items() if address not in own) == expected


@pytest.mark.parametrize("sources", [1, 2, 5])
def test_average_is_the_formula(sources: int):
    """Value and every gradient, fp64: rounding alone."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(2, 3, 8, dtype=torch.float64, generator=generator) * (1 + idx)
        for idx in range(sources)
    ]
    weight = torch.randn(8, dtype=torch.float64, generator=generator)
    slope = torch.randn(2, 3, 8, dtype=torch.float64, generator=generator)
    results = []
    for function in (average, naive_average):
        inputs = [tensor.clone().requires_grad_() for tensor in (weight, *leaves)]
        x_BTD = function(inputs[1:], inputs[0], 1e-6)
        results.append([x_BTD, *torch.autograd.grad(x_BTD, inputs, slope)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_average_gradcheck():
    inputs = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, *state: average(state, w, 1e-6), (weight, *inputs))


def test_average_starts_plain_and_takes_the_dtype_of_the_first():
    """bf16 outputs beside an fp32 embedding, as autocast leaves them: within a rounding of fp32."""
    first = torch.randn(2, 3, 8)
    second = torch.randn(2, 3, 8).bfloat16()
    x_BTD = average((first, second), torch.zeros(8), 1e-6)
    assert x_BTD.dtype == torch.float32
    torch.testing.assert_close(x_BTD, (first + second.float()) / 2)
    assert average((second, first), torch.zeros(8), 1e-6).dtype == torch.bfloat16


def test_average_is_fp32_under_autocast():
    """Values and gradients, bit the same as without; bf16 products would be 1e-3 off."""
    first, second = torch.randn(2, 3, 8), torch.randn(2, 3, 8).bfloat16()
    results = []
    for enabled in (False, True):
        inputs = [tensor.clone().requires_grad_() for tensor in (torch.ones(8), first, second)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            x_BTD = average(inputs[1:], inputs[0], 1e-6)
            results.append([x_BTD, *torch.autograd.grad(x_BTD.square().sum(), inputs)])
    assert all(map(torch.equal, *results))


def test_frozen_tensors_get_no_gradient():
    weight = torch.randn(4, requires_grad=True)
    frozen, trained = torch.randn(2, 4), torch.randn(2, 4, requires_grad=True)
    average((frozen, trained), weight, 1e-6).sum().backward()
    assert frozen.grad is None
    assert trained.grad is not None


def test_attention_residuals_under_autocast():
    """Every gradient is there and finite; the state is bf16 outputs beside an fp32 embedding."""
    model = make("attnres")
    with torch.autocast("cpu", torch.bfloat16):
        _, found = gradients(model)
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    moved = [name for name in found if ".streams." in name and found[name].abs().sum() > 0]
    assert len(moved) == 2 * TINY.num_layers - 1  # the first sublayer has no w
