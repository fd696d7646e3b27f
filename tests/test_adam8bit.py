"""8-bit Adam: bitsandbytes' own to the bit, close to AdamW, and a byte of 0 is 0."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from crnet import optimizers
from crnet.config.model_spec import model_spec
from crnet.errors import ConfigError
from crnet.measure.examples import batch, small_model
from crnet.model.build import build
from crnet.optimizers import Settings
from crnet.optimizers._eight_bits import BLOCK
from crnet.optimizers.adam8bit import Adam8bitOptions
from crnet.specs import Forget, TensorSpec, normal

pytest.importorskip("bitsandbytes")

SETTINGS = Settings(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, seed=0)
SHAPE = (40, 130)
"""No whole number of blocks."""


def begun(options: Adam8bitOptions) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 0.1
    parameter = torch.nn.Parameter(weight)
    spec = TensorSpec(SHAPE, "matrix", normal(0.1))
    made = optimizers.get("adam8bit").build({"w": (spec, parameter)}, options, SETTINGS)
    return parameter, made


def gradients(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def test_equals_the_package_it_takes_the_kernel_of() -> None:
    """20 steps, to the bit; AdamW's differ by a few percent of the way."""
    from bitsandbytes.optim import AdamW8bit

    ours, optimizer = begun(Adam8bitOptions(min_items=1))
    start = ours.detach().clone()
    theirs, exact = (torch.nn.Parameter(start.clone()) for _ in range(2))
    betas, decay = (SETTINGS.beta1, SETTINGS.beta2), SETTINGS.weight_decay
    other = AdamW8bit([theirs], lr=1e-2, betas=betas, weight_decay=decay, min_8bit_size=1)
    adam = torch.optim.AdamW([exact], lr=1e-2, betas=betas, weight_decay=decay)
    for gradient in gradients(20):
        for parameter, each in ((ours, optimizer), (theirs, other), (exact, adam)):
            parameter.grad = gradient.clone()
            each.step()
    assert torch.equal(ours, theirs)
    error = (ours - exact).norm() / (exact - start).norm()
    assert 0 < error < 0.05


def test_state_is_bytes_and_maxima_of_blocks() -> None:
    parameter, optimizer = begun(Adam8bitOptions())
    parameter.grad = gradients(1)[0]
    optimizer.step()
    state = optimizer.state[parameter]
    blocks = -(-parameter.numel() // BLOCK)
    assert {name: (each.dtype, each.numel()) for name, each in state.items()} == {
        "step": (torch.float32, 1),
        "exp_avg": (torch.uint8, parameter.numel()),
        "exp_avg_sq": (torch.uint8, parameter.numel()),
        "exp_avg_max": (torch.float32, blocks),
        "exp_avg_sq_max": (torch.float32, blocks),
    }


def test_what_is_small_and_what_reads_tokens_keeps_32_bits() -> None:
    config = small_model(linear="crnet", hidden_size=64, intermediate_size=96)
    model = build(model_spec(config), seed=0)
    options = Adam8bitOptions(min_items=1000)
    optimizer = optimizers.get("adam8bit").build(model.trained(), options, SETTINGS)
    loss, count = model(*batch())
    (loss / count).backward()
    optimizer.step()
    for name, (spec, parameter) in model.trained().items():
        narrow = optimizer.state[parameter]["exp_avg"].dtype == torch.uint8
        is_map = spec.role in ("matrix", "factor_in", "factor_out")
        assert narrow == (is_map and spec.num_items >= 1000), name
    assert not {"embedding", "head"} & {
        spec.role
        for spec, parameter in model.trained().values()
        if optimizer.state[parameter]["exp_avg"].dtype == torch.uint8
    }


def test_what_is_forgotten_is_zero() -> None:
    """The next step is that of moments with zeros in these places, and no others."""
    parameter, optimizer = begun(Adam8bitOptions(min_items=1))
    for gradient in gradients(5):
        parameter.grad = gradient
        optimizer.step()
    generator = torch.Generator().manual_seed(7)
    optimizers.forget(optimizer, parameter, Forget("w", kept_frac=0.5), generator)
    lost = optimizer.state[parameter]["exp_avg"] == 0
    assert 0.4 < lost.float().mean() < 0.6
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = before * (1 - SETTINGS.lr * SETTINGS.weight_decay)
    torch.testing.assert_close(parameter[lost], decayed[lost], rtol=1e-6, atol=1e-9)
    assert not torch.isclose(parameter[~lost], decayed[~lost], rtol=1e-6, atol=1e-9).all()


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {"bitsandbytes", *(it for it in sys.modules if it.startswith("bitsandbytes."))}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'crnet\[optim8bit\]'"):
        begun(Adam8bitOptions())
