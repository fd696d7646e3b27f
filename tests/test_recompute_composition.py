"""Recomputation among everything else: accumulation, frozen parts, hooks, changed weights.

Equalities are those of ``recompute_steps``; what cannot be right is refused by name. Memory:
``test_recompute_memory``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as modules
from torch.utils.flop_counter import FlopCounterMode

from crnet.linears.crnet import CRNetOptions
from crnet.model.language_model import LanguageModel
from crnet.recompute.engine import Recomputation
from recompute_steps import (
    FROZEN,
    NONE,
    PLANS,
    Plan,
    Result,
    assert_agree,
    assert_same,
    each_plan,
    each_rebuilding,
    fail,
    forward,
    freeze,
    gradients,
    random_model,
    same_bits,
    step,
    tiny,
)
from shapes import random_tokens

pytestmark = pytest.mark.slow

# --- 1. composition -----------------------------------------------------------------------------


@each_plan
@pytest.mark.parametrize("order", ["one-by-one", "older-graph-first", "both-at-once"])
def test_accumulation_and_clipping(plan: Plan, order: str):
    """Two micro-batches into one gradient, then clipped: the second forward pass after the first
    backward pass, or before it, or one backward pass through both graphs."""
    model = random_model(tiny())

    def accumulated(plan: Plan) -> Result:
        model.zero_grad()
        losses = [forward(model, plan)]
        if order == "one-by-one":
            losses.pop().backward()
        losses.append(forward(model, plan, seed=5))
        for loss in [sum(losses)] if order == "both-at-once" else losses:
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss.detach(), gradients(model)

    assert_agree(accumulated(plan), accumulated(NONE), plan)


@each_plan
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters(plan: Plan, frozen: str):
    """Those that are trained have their gradient, the others none."""
    model = random_model(tiny(crnet=CRNetOptions(learnable_beta=frozen != "betas")))
    if frozen != "betas":
        freeze(model, frozen)
    assert all(p.requires_grad for p in model.parameters()) == (frozen == "nothing")
    assert_agree(step(model, plan), step(model, NONE), plan)


@each_plan
def test_nothing_is_recomputed_without_a_graph(monkeypatch: pytest.MonkeyPatch, plan: Plan):
    """Losses and logits of an evaluation, cached ones with gradients on too: the same bits."""
    model = random_model(tiny()).eval()
    tokens = random_tokens(2, 9)

    def results() -> list[Tensor]:
        found = []
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                caches = model.new_caches(9)
                found += [model.logits(part, caches) for part in tokens.split((5, 1, 3), dim=1)]
                if not torch.is_grad_enabled():
                    found += [model(tokens, tokens)[0], model.logits(tokens)]
        return found

    expected = results()
    model.recompute(plan)
    monkeypatch.setattr(Recomputation, "__call__", fail)
    with pytest.raises(ZeroDivisionError):
        model(tokens, tokens)
    for actual, wanted in zip(results(), expected, strict=True):
        assert same_bits(actual, wanted)


@each_plan
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_before_the_backward_pass(plan: Plan, mode: Any):
    model = random_model(tiny())
    expected = step(model, NONE)
    model.zero_grad()
    loss = forward(model, plan)
    with mode():
        model(random_tokens(2, 5), random_tokens(2, 5))
        model.logits(random_tokens(2, 5), model.new_caches(5))
    loss.backward()
    assert_agree((loss.detach(), gradients(model)), expected, plan)


@each_plan
@pytest.mark.parametrize("wanted", ["layers.3.", "layers.1.", "embed", "beta"])
def test_gradients_of_some(plan: Plan, wanted: str):
    """``torch.autograd.grad`` visits those nodes alone that it needs; the next step is as ever."""
    model = random_model(tiny())
    expected = step(model, NONE)
    some = {name: p for name, p in model.named_parameters() if wanted in name}
    loss = forward(model, plan)
    grads = dict(zip(some, torch.autograd.grad(loss, list(some.values())), strict=True))
    assert_agree((loss.detach(), grads), (expected[0], {n: expected[1][n] for n in some}), plan)
    assert_agree(step(model, plan), expected, plan)


@each_plan
def test_copies(plan: Plan):
    """A copy, made before or after a step, trains by itself."""
    model = random_model(tiny())
    expected = step(model, NONE)
    for _ in range(2):
        model.zero_grad()
        other = copy.deepcopy(model)
        assert_agree(step(other, plan), expected, plan)
        assert_agree(step(model, plan), expected, plan)


@pytest.mark.slow
@pytest.mark.parametrize("linear", ["crnet", "lowrank"])
@pytest.mark.parametrize("policy", ["none", "block"])
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_compiled_blocks(linear: str, policy: Any):
    """Loss and gradients of compiled blocks: within 1000 units of rounding (6e-5) of the largest
    item (of all betas' for a beta), as fused loops round sums of some 40 items in another order,
    and less often, through four blocks and back. Seen: 504, where vectors are of 16 items."""
    model = random_model(tiny(linear=linear))
    loss, expected = step(model, NONE)
    model.compile_blocks()
    try:
        for _ in range(2):
            compiled, actual = step(model, Plan(policy))
            assert compiled.item() == pytest.approx(loss.item(), rel=100 * 2**-24)
            assert_same((loss, actual), (loss, expected), units=1000)
    finally:
        torch.compiler.reset()


# --- 2. changed between the passes --------------------------------------------------------------


def optimizer_step(kind: Any, **options: Any) -> Callable[[LanguageModel], None]:
    def change(model: LanguageModel) -> None:
        parameters = list(model.model.blocks()[2].parameters())
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.1)
        kind(parameters, lr=1e-3, **options).step()
        model.zero_grad()

    return change


def of_one_map(change: Callable[[Tensor], Any]) -> Callable[[LanguageModel], None]:
    return lambda model: change(model.model.blocks()[2].maps["up"].B)


def set_data(b_RF: Tensor) -> None:
    b_RF.data = b_RF.data * 1.5


def one_bit(b_RF: Tensor) -> None:
    """Of one item: what a sum of all would round away."""
    b_RF.data.view(-1).view(torch.int32)[5] += 1


@torch.no_grad()
def in_place(b_RF: Tensor) -> None:
    b_RF.mul_(1.5)


CHANGES: dict[str, Callable[[LanguageModel], Any]] = {
    "in-place": of_one_map(in_place),
    "data-in-place": of_one_map(lambda b_RF: b_RF.data.add_(1e-3)),
    "data-set": of_one_map(set_data),
    "data-one-bit": of_one_map(one_bit),
    "untrained": lambda model: model.model.blocks()[1].maps["q"].beta.data.neg_(),
    "adamw-fused": optimizer_step(torch.optim.AdamW, fused=True),
    "sgd-foreach": optimizer_step(torch.optim.SGD, foreach=True),
    "adamw-foreach": optimizer_step(torch.optim.AdamW, foreach=True),
}


@each_rebuilding
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_refused(policy: str, change: str):
    """A block run once more with other weights would mix two models' gradients. The next step is as
    ever, with the weights that it finds."""
    model = random_model(tiny(crnet=CRNetOptions(learnable_beta=change != "untrained")))
    loss = forward(model, PLANS[policy])
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match="weights were changed between the forward and"):
        loss.backward()
    assert_agree(step(model, PLANS[policy]), step(model, NONE), PLANS[policy])


def test_what_none_and_block_do_with_changed_weights():
    """``none`` is torch: its version counters raise, but edits through ``.data`` and by fused
    optimizers pass, and what was kept by reference has the new values. ``block`` is torch's
    checkpointing: it runs a block once more with the new weights and says nothing of any."""
    model = random_model(tiny())
    _, expected = step(model, NONE)
    for change in ("in-place", "sgd-foreach"):
        loss = forward(model, NONE)
        CHANGES[change](model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    silent = ("data-in-place", "adamw-fused")
    cases = [*(("none", change) for change in silent), *(("block", change) for change in CHANGES)]
    for policy, change in cases:
        model = random_model(tiny())
        loss = forward(model, Plan(policy))  # type: ignore[arg-type]
        CHANGES[change](model)
        loss.backward()
        assert not all(torch.equal(grad, expected[n]) for n, grad in gradients(model).items())


@each_plan
def test_weights_that_are_not_finite_are_no_change(plan: Plan):
    """NaN is unlike itself; the loss says what is wrong, not recomputation."""
    model = random_model(tiny())
    model.model.blocks()[2].maps["up"].B.data[0, 0] = torch.nan
    loss = forward(model, plan)
    loss.backward()
    assert bool(loss.isnan())


class _Inside(nn.Module):
    """The model with its backward pass."""

    def __init__(self, model: LanguageModel, weights: dict[str, Tensor]):
        super().__init__()
        self.model, self.weights = model, list(weights.values())

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        loss, _ = self.model(tokens, targets)
        return loss, *torch.autograd.grad(loss, self.weights)


@each_plan
@pytest.mark.parametrize("inside", [True, False])
def test_functional_call(plan: Plan, inside: bool):
    """Gradients of other weights than the model's own: exact where the backward pass is inside,
    refused outside, where the blocks have their own weights back. (``none`` is exact in both;
    ``block``, torch's checkpointing, takes the model's own then, and says nothing.)"""
    model, same = random_model(tiny()), random_model(tiny())
    others = {name: (1.1 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    same.load_state_dict(others)
    expected = step(same, NONE)
    model.recompute(plan)
    batch = random_tokens(2, 9), random_tokens(2, 9, seed=9)
    if inside:
        whole = _Inside(model, others)
        named = {f"model.{name}": tensor for name, tensor in others.items()}
        loss, *grads = torch.func.functional_call(whole, named, batch)
        assert_agree((loss.detach(), dict(zip(others, grads, strict=True))), expected, plan)
        return
    loss, _ = torch.func.functional_call(model, others, batch)
    if plan.policy in ("replay", "invert"):
        with pytest.raises(RuntimeError, match=r"other tensors .*functional_call"):
            loss.backward()
        return
    loss.backward()
    actual = {name: tensor.grad for name, tensor in others.items() if tensor.grad is not None}
    assert not all(torch.equal(grad, expected[1][name]) for name, grad in actual.items())


@each_plan
def test_second_backward(plan: Plan):
    """Of the blocks: ``block`` allows it as torch does; the others say what to do. The next step is
    as ever. (The loss refuses one under every policy.)"""
    model = random_model(tiny(), "fp64")

    def call(tokens: Tensor, targets: Tensor) -> tuple[Tensor]:
        return (model.hidden(tokens).square().sum(),)

    freeze_head(model)
    forward(model, NONE, call=call).backward()
    expected = gradients(model)
    model.zero_grad()
    loss = forward(model, plan, call=call)
    loss.backward(retain_graph=True)
    model.zero_grad()
    if plan.policy == "block":
        loss.backward()
        actual = gradients(model)
        assert actual.keys() == expected.keys()
        assert all(same_bits(grad, expected[name]) for name, grad in actual.items())
    else:
        with pytest.raises(RuntimeError, match="retain_graph=True is not supported"):
            loss.backward()
    assert_agree(step(model, plan), step(model, NONE), plan)


def freeze_head(model: LanguageModel) -> None:
    """It gets no gradient of the hidden stream."""
    model.lm_head.weight.requires_grad_(False)


@each_rebuilding
def test_model_changed_before_the_backward_pass(policy: str):
    """Factors frozen meanwhile: the others' gradients are as ever. A norm above frozen inputs keeps
    nothing once it is frozen, and its block too few tensors: an error."""
    model, plan, results = random_model(tiny()), PLANS[policy], []
    for tried in (NONE, plan):
        model.zero_grad()
        loss = forward(model, tried)
        freeze(model, "factors")
        loss.backward()
        results.append((loss.detach(), gradients(model)))
        model.requires_grad_(True)
    assert_agree(results[1], results[0], plan)
    freeze(model, "embedding")
    loss = forward(model, plan)
    freeze(model, "all-but-factors")
    with pytest.raises(RuntimeError, match="was the model changed"):
        loss.backward()


@each_rebuilding
def test_another_attention_kernel_in_the_backward_pass(policy: str):
    """The kernels keep other tensors: MATH the probabilities, the fused one the log-sum-exp."""
    model = random_model(tiny())
    with sdpa_kernel(SDPBackend.MATH):
        loss = forward(model, PLANS[policy])
    with pytest.raises(RuntimeError, match="attention kernel switched"):
        loss.backward()


# --- 3. hooks -----------------------------------------------------------------------------------


def watching(*_: Any) -> None:
    pass


PLACES: dict[str, tuple[str, Callable[[LanguageModel], nn.Module]]] = {
    "map": ("the map up of block 2", lambda model: model.model.blocks()[1].maps["up"]),
    "dense-map": ("the map q of block 1", lambda model: model.model.blocks()[0].maps["q"]),
    "block": ("block 3", lambda model: model.model.blocks()[2]),
}


@each_rebuilding
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_forward_hooks_are_refused(policy: str, place: str, kind: str):
    """By name; whichever module it hangs on, and before anything is computed."""
    model = random_model(tiny())
    expected = step(model, NONE)
    where, find = PLACES[place]
    handle = getattr(find(model), kind)(watching)
    message = f"{policy} cannot honour the forward hook .*watching.* on {where};"
    with pytest.raises(RuntimeError, match=message):
        forward(model, PLANS[policy])
    assert_same(step(model, NONE), expected)
    assert_same(step(model, PLANS["block"]), expected)
    handle.remove()
    assert_agree(step(model, PLANS[policy]), expected, PLANS[policy])


@each_rebuilding
@pytest.mark.parametrize(
    "kind", ["register_module_forward_hook", "register_module_forward_pre_hook"]
)
def test_forward_hooks_on_every_module_are_refused(policy: str, kind: str):
    model = random_model(tiny())
    handle = getattr(modules, kind)(watching)
    try:
        with pytest.raises(RuntimeError, match=r"forward hook .*watching.* on every module;"):
            forward(model, PLANS[policy])
    finally:
        handle.remove()
    with FlopCounterMode(display=False) as counter:  # torch's, by such hooks
        actual = step(model, PLANS[policy])
    assert counter.get_total_flops() > 0
    assert_agree(actual, step(model, NONE), PLANS[policy])


HOOKED = ("layers.1", "layers.2.self_attn.v_proj", "layers.0.mlp.gate_proj", "layers.3.mlp")


@each_plan
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *((path, "full_backward_hook") for path in (*HOOKED, "layers.1.input_layernorm")),
        ("every module", "full_backward_hook"),
        ("every module", "full_backward_pre_hook"),
    ],
)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of the embedding
def test_backward_hooks_see_what_they_see_without(plan: Plan, path: str, kind: str):
    """On blocks, maps and what lies between: the same calls, with the same gradients."""
    model = random_model(tiny())
    names = {module: name for name, module in model.named_modules()}

    def watched(plan: Plan) -> tuple[Result, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def note(module: nn.Module, *gradients: Any) -> None:
            for idx, part in enumerate(gradients):
                for number, grad in enumerate(part):
                    if grad is not None:
                        key = f"{names[module]} {idx} {number}"
                        assert key not in seen
                        seen[key] = grad.clone()

        if path == "every module":
            handle = getattr(modules, f"register_module_{kind}")(note)
        else:
            handle = getattr(model.model.get_submodule(path), f"register_{kind}")(note)
        try:
            return step(model, plan), seen
        finally:
            handle.remove()

    (expected, wanted), (actual, seen) = watched(NONE), watched(plan)
    assert_agree(actual, expected, plan)
    assert wanted
    assert_agree((actual[0], seen), (expected[0], wanted), plan)


@each_plan
@pytest.mark.parametrize("path", ["layers.2.post_attention_layernorm"])
def test_forward_hooks_on_norms(plan: Plan, path: str):
    """Also one that changes what it sees. It is called in both runs, like torch's checkpointing."""
    model = random_model(tiny())
    norm = model.model.get_submodule(path)
    seen: list[Tensor] = []

    def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().clone())
        return output * 1.25

    plain = step(model, NONE)
    handle = norm.register_forward_hook(change)
    expected, actual = step(model, NONE), step(model, plan)
    handle.remove()
    assert_agree(actual, expected, plan)
    assert not torch.equal(expected[0], plain[0])
    first, *others = seen
    assert len(others) == 2
    assert torch.equal(first, others[0])
    assert torch.allclose(first, others[1], rtol=1e-4, atol=1e-4)  # of invert


@pytest.mark.parametrize("path", ["layers.0.mlp", "layers.2.self_attn"])
@pytest.mark.parametrize(
    "plan", [*PLANS.values(), Plan("replay", (1, 2, 3, 4))], ids=[*PLANS, "replay-every-1"]
)
def test_hooks_between_block_and_map(plan: Plan, path: str):
    """One that changes what a sublayer writes: ``replay`` could not rebuild the stream of a segment
    of several blocks, and says so; one that only watches passes."""
    model = random_model(tiny())
    part = model.model.get_submodule(path)
    plain = step(model, NONE)
    handle = part.register_forward_hook(watching)
    assert_agree(step(model, plan), plain, plan)
    handle.remove()
    handle = part.register_forward_hook(lambda module, args, output: output * 1.25)
    expected = step(model, NONE)
    layer = int(path.split(".")[1]) + 1
    if plan.policy == "replay" and layer not in {*plan.kept_layers, 4}:
        with pytest.raises(RuntimeError, match="is not the output of its map"):
            forward(model, plan)
    else:
        assert_agree(step(model, plan), expected, plan)
    handle.remove()
    assert_agree(step(model, plan), plain, plan)
