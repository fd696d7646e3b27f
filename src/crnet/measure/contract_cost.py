"""What a method keeps, computes and rebuilds, counted and held against what it declares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crnet.config.check import policy_problem
from crnet.cost.flops import block_flops
from crnet.cost.kept import kept_bytes
from crnet.cost.micro_batch import MicroBatch, Precision
from crnet.cost.plan_choice import policies, usual_plan
from crnet.measure.examples import Example, batch, train
from crnet.measure.memory import saved_bytes
from crnet.model.language_model import LanguageModel
from crnet.recompute.plan import POLICIES, RecomputePlan


def plans(micro_batch: MicroBatch) -> Iterator[RecomputePlan]:
    """A plan of every policy that the model allows; with two segments and attention kept."""
    for policy in POLICIES:
        if policy_problem(micro_batch.spec, policy) is None:
            yield usual_plan(micro_batch, policy)
            if policy in ("replay", "invert"):
                yield RecomputePlan(policy, (2,), keep_attention=True)


def packed_plans(micro_batch: MicroBatch) -> Iterator[RecomputePlan]:
    """A plan of every policy under which the model may keep activations as NF4 codes."""
    for policy in policies(micro_batch, "nf4"):
        yield RecomputePlan(policy, (2,) if policy == "replay" else (), keep_as="nf4")


def _cases(
    example: Example, precisions: Sequence[Precision]
) -> Iterator[tuple[MicroBatch, LanguageModel, str]]:
    for precision in precisions if example.is_default else precisions[-1:]:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        yield MicroBatch(example.spec, 4, 8, precision), example.build(dtype=dtype), precision


def _autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


def check_kept_bytes(example: Example) -> Iterator[str]:
    """What a step keeps under every policy and precision is what the declarations add up to."""
    for micro_batch, model, precision in _cases(example, ("fp32", "bf16", "bf16-mixed")):
        for plan in (*plans(micro_batch), *packed_plans(micro_batch)):
            model.recompute(plan)
            with _autocast(precision), model.fixed_weights():
                counted = saved_bytes(model, *batch())
            declared = sum(kept_bytes(micro_batch, plan).values())
            if counted != declared:
                yield f"{_name(plan, precision)} keeps {counted} bytes, declared {declared}"


def check_flops(example: Example) -> Iterator[str]:
    """FLOPs forward, backward and repeated are what torch's counter counts."""
    rows, shape = batch()[0].numel(), example.spec.shape
    head = 6 * rows * shape.hidden_size * shape.vocab_size
    for micro_batch, model, precision in _cases(example, ("fp32",)):
        for plan in plans(micro_batch):
            model.recompute(plan)
            forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
            with sdpa_kernel(SDPBackend.MATH):
                with _autocast(precision), forward:
                    total, _ = model(*batch())
                with backward:
                    total.backward()
            declared = block_flops(micro_batch, plan)
            counted = forward.get_total_flops() - head, backward.get_total_flops()
            wanted = declared["forward"], declared["backward"] + declared["recompute"]
            if counted != wanted:
                yield f"{_name(plan, precision)}: FLOPs (forward, backward) {counted}, not {wanted}"


def check_recomputation(example: Example) -> Iterator[str]:
    """block and replay change no bit of loss and gradients; invert stays near; the rest refuses."""
    spec = example.spec
    for policy in POLICIES:
        reason = policy_problem(spec, policy)
        if reason is not None and policy not in reason:
            yield f"the refusal of {policy} does not name it: {reason}"
    for micro_batch, model, precision in _cases(example, ("bf16-mixed", "fp32")):
        train(example, model, example.build_optimizer(model), 3)  # off symmetric initial values
        expected = _step(model, precision, RecomputePlan())
        for plan in plans(micro_batch):
            actual = _step(model, precision, plan)
            yield from _differences(expected, actual, plan, precision)


def _step(model: LanguageModel, precision: str, plan: RecomputePlan) -> dict[str, Tensor]:
    """Loss and gradients of one micro-batch, by name."""
    model.recompute(plan)
    model.zero_grad()
    with _autocast(precision):
        total, _ = model(*batch())
    total.backward()
    found = {name: tensor.grad for name, (_, tensor) in model.trained().items()}
    gradients = {name: grad.clone() for name, grad in found.items() if grad is not None}
    return {"loss": total.detach(), **gradients}


def _differences(
    expected: dict[str, Tensor], actual: dict[str, Tensor], plan: RecomputePlan, precision: str
) -> Iterator[str]:
    # Rebuilt outputs of invert are off by rounding, times 1/gain a layer: here two are crossed. A
    # gain's gradient is a sum over all rows and may cancel, hence the floor.
    share, floor = (1e-4, 1e-3) if precision == "fp32" else (0.1, 1e-2)
    exact = plan.policy != "invert"
    for name, wanted in expected.items():
        error = float((actual[name] - wanted).abs().max())
        limit = 0.0 if exact else share * (float(wanted.abs().max()) + floor)
        if not error <= limit:
            yield f"{_name(plan, precision)}: {name} differs by {error:.1e}"


def _name(plan: RecomputePlan, precision: str) -> str:
    attention = ", attention kept" if plan.keep_attention else ""
    attention += f", kept as {plan.keep_as}" if plan.is_packed else ""
    return f"recompute {plan.policy}{attention}, {precision}"
