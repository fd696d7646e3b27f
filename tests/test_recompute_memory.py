"""What recomputation holds, and when: nothing outlives its turn.

Exact: storages are counted, the cycle collector is off."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from crnet.layers.block import Block
from crnet.measure.memory import peak_bytes
from recompute_steps import (
    NONE,
    Plan,
    assert_agree,
    each_plan,
    fail,
    forward,
    freeze,
    intercept,
    random_model,
    step,
    tiny,
)
from shapes import random_tokens

pytestmark = pytest.mark.slow

POSITIONS = ("q", "k", "v", "o", "gate", "up", "down")
each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])


def storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


class Storages(TorchDispatchMode):
    """Every storage that an operation returns, to be asked whether it still exists."""

    def __init__(self):
        super().__init__()
        self.refs: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.refs += [storage(it) for it in tree_iter(result) if isinstance(it, Tensor)]
        return result

    def alive(self) -> set[int]:
        return {ref.cdata for ref in self.refs if not ref.expired()}


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what there is by now is not looked through once more
    gc.disable()
    yield
    gc.enable()


@each_plan
@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize(
    ("ends", "frozen"),
    [
        *((ends, "nothing") for ends in ("unused", "done", "two-graphs", "fails-forward", "fails")),
        ("done", "lower-half"),
        ("fails", "lower-half"),
    ],
)
def test_nothing_outlives_the_loss(plan: Plan, ends: str, frozen: str):
    """Without the cycle collector: once the loss is gone, all that is left of a step is gradients;
    and a step that failed leaves the next one as it should be."""
    model = random_model(tiny())
    freeze(model, frozen)
    expected = step(model, NONE)
    with Storages() as storages:
        forward(model, NONE)  # gone at once, except for what it merely looks at
    permanent = storages.alive() | {storage(parameter).cdata for parameter in model.parameters()}
    model.zero_grad()

    def run() -> None:
        losses = [forward(model, plan, seed=seed) for seed in ([3, 5] if "two" in ends else [3])]
        assert len(storages.alive() - permanent) > 20
        if ends != "unused":
            losses[0].backward()
        if ends == "done":  # with the loss still there, nothing but it and the gradients
            trained = [it for it in model.parameters() if it.requires_grad]
            assert len(storages.alive() - permanent) <= 1 + len(trained)

    hook = {"fails-forward": fail, "fails": lambda _, args: args[0].register_hook(fail) and None}
    handle = model.model.layers[3].input_layernorm.register_forward_pre_hook(
        hook.get(ends, lambda *_: None)
    )
    with Storages() as storages, contextlib.ExitStack() as stack:
        if ends in hook:
            stack.enter_context(pytest.raises(ZeroDivisionError))
        run()
    handle.remove()
    grads = {storage(p.grad).cdata for p in model.parameters() if p.grad is not None}
    assert bool(grads) == (ends not in ("unused", "fails-forward"))
    assert storages.alive() - permanent == grads
    assert_agree(step(model, plan), expected, plan)


@pytest.mark.usefixtures("_no_collector")
@each_precision
@pytest.mark.parametrize(
    ("policy", "kept_layers", "expected"),
    [
        ("replay", (), {6: "2345", 5: "234", 4: "23", 3: "2", 2: "", 1: ""}),
        ("replay", (3,), {6: "45", 5: "4", 4: "", 3: "2", 2: "", 1: ""}),
        ("invert", (), {6: "5", 5: "4", 4: "3", 3: "2", 2: "1", 1: ""}),
        ("invert", (3,), {6: "5", 5: "4", 4: "", 3: "2", 2: "1", 1: ""}),
    ],
)
def test_rebuilt_outputs_are_freed(
    monkeypatch: pytest.MonkeyPatch, precision: str, policy: Any, kept_layers: Any, expected: Any
):
    """The layers whose rebuilt outputs exist when the gradient of layer l's input is there: under
    ``replay`` those of the segment below l, under ``invert`` l - 1. (Of a dense layer 1, replay
    keeps the outputs.)"""
    model = random_model(tiny(num_layers=6), precision)
    rebuilt: list[tuple[int, StorageWeakRef]] = []
    alive: dict[int, list[int]] = {}

    def look(block: Block, *_: Any) -> None:
        alive[block.layer_idx + 1] = [at for at, ref in rebuilt if not ref.expired()]

    def note(call, layer, position, *args):
        result = call(*args)
        if layer > 1:
            rebuilt.append((layer - (policy == "invert"), storage(result)))
        return result

    for block in model.model.blocks():
        block.register_full_backward_hook(look)
    loss = forward(model, Plan(policy, kept_layers, tolerance=1e30), precision)
    intercept(monkeypatch, model, {"replay": "up_project", "invert": "carry_from"}[policy], note)
    loss.backward()
    assert alive == {at: [int(y) for y in ys for _ in POSITIONS] for at, ys in expected.items()}


@each_plan
@pytest.mark.usefixtures("_no_collector")
def test_peak_is_the_same_in_every_step(plan: Plan):
    """To the byte, and below that of keeping everything."""
    model = random_model(tiny(num_layers=6))

    def peak(plan: Plan) -> int:
        model.recompute(plan)
        model.zero_grad(set_to_none=False)
        tokens = random_tokens(2, 64)
        return peak_bytes(lambda: model(tokens, tokens)[0].backward(), "cpu")

    step(model, NONE)
    whole, *peaks = peak(NONE), *(peak(plan) for _ in range(3))
    assert len(set(peaks)) == 1
    assert peaks[0] < whole
