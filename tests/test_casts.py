"""Casts of weights that are kept for the micro-batches of a step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig
from crnet.kernels.precision import cast, cast_weight, casts_kept
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from crnet.recompute.plan import RecomputePlan
from shapes import random_tokens

MODEL = ModelConfig(
    hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, vocab_size=31, rank="4"
)


class Casts(TorchDispatchMode):
    """Counts copies of matrices to bf16."""

    def __init__(self, shapes: set[torch.Size]):
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].shape in self.shapes:
            self.count += (kwargs or {}).get("dtype") == torch.bfloat16
        return func(*args, **(kwargs or {}))


def accumulate(model: LanguageModel) -> dict[str, Tensor]:
    """Gradients of two micro-batches under autocast."""
    model.zero_grad()
    for seed in (3, 5):
        tokens, targets = random_tokens(2, 9, seed=seed), random_tokens(2, 9, seed=seed + 6)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model(tokens, targets)
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_each_weight_is_cast_once_and_gradients_keep_every_bit():
    model = build(model_spec(MODEL), seed=1)
    blocks = [p for block in model.model.blocks() for p in block.parameters() if p.dim() == 2]
    shapes = {p.shape for p in blocks}
    with Casts(shapes) as casts:
        expected = accumulate(model)
    assert casts.count == 2 * len(blocks)
    with Casts(shapes) as casts, model.fixed_weights():
        actual = accumulate(model)
    assert casts.count == len(blocks)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(grad, expected[name]) for name, grad in actual.items())
    assert all(grad.dtype == torch.float32 for grad in actual.values())


def test_a_recomputation_keeps_no_casts():
    model = build(model_spec(MODEL), seed=1)
    model.recompute(RecomputePlan("block"))
    with model.fixed_weights():
        weight = torch.nn.Parameter(torch.ones(2, 2))
        assert cast_weight(weight, torch.bfloat16) is not cast_weight(weight, torch.bfloat16)


def test_casts_of_other_steps_and_of_activations_are_new():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with casts_kept():
        first = cast_weight(weight, torch.bfloat16)
        assert cast_weight(weight, torch.bfloat16) is first
        activation = torch.ones(2, 2)
        assert cast_weight(activation, torch.bfloat16) is not cast_weight(
            activation, torch.bfloat16
        )
    with torch.no_grad():
        weight.mul_(3)
    with casts_kept():
        assert torch.equal(cast_weight(weight, torch.bfloat16), torch.full((2, 2), 3).bfloat16())


def test_a_weight_in_the_compute_dtype_is_itself():
    x, weight = torch.ones(2), torch.nn.Parameter(torch.ones(2, 2))
    with casts_kept():
        assert cast(x, weight)[1] is weight
