"""What every method owes, whoever wrote it: the checks behind ``crnet check-plugin`` and the tests.

A method is put into a small model and held against what it declares: its tensors, what it keeps and
computes, its state; it trains, resumes and decodes. Exact where exact is possible.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from crnet import optimizers, schedules
from crnet.config.check import check as check_config
from crnet.config.sections import (
    DataConfig,
    RunConfig,
    options_of,
)
from crnet.errors import ConfigError
from crnet.linears._maps import dtype_of
from crnet.measure.contract_cost import check_flops, check_kept_bytes, check_recomputation
from crnet.measure.examples import Example, batch, examples, train
from crnet.optimizers import OptimizerMethod
from crnet.optimizers import _low_precision as low_precision
from crnet.optimizers._low_precision import Bf16Update
from crnet.schedules import Schedule, Steps
from crnet.specs import TensorSpec

STEPS = 20
MARGIN = 1.0
"""The least fall of the loss in nats over ``STEPS`` steps on one batch, from about ln 31 = 3.43."""


UPDATES: tuple[Bf16Update | None, ...] = (None, *get_args(Bf16Update))
"""None: an fp32 run; the others: how bf16 weights take their updates."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    ok: bool
    detail: str
    """Every problem; empty where there is none."""


Check = Callable[[Example], Iterator[str]]


def check(method: Any, *, only_default: bool = False) -> list[Finding]:
    """Hold a registered method against its contract, with its default options and its ``examples``
    (``only_default``: without these).

    Raises:
        TypeError: it derives from no seam's base class.
    Cost: some seconds.
    """
    found = []
    for example in examples(method)[: 1 if only_default else None]:
        label = _label(example)
        for each in checks(method):
            if not example.is_default and each in (check_decoding, check_flops):
                continue
            try:
                problems = list(each(example))
            except Exception as error:  # noqa: BLE001  whatever another's code raises
                problems = [f"{type(error).__name__}: {error}"]
            name = each.__name__.removeprefix("check_").replace("_", " ")
            found.append(Finding(f"{name}{label}", not problems, "; ".join(problems)))
    return found


def _is_optimizing(method: Any) -> bool:
    return isinstance(method, (OptimizerMethod, Schedule))


def _label(example: Example) -> str:
    section = example.optimizer if _is_optimizing(example.method) else example.model
    options = options_of(section, example.method.name)
    if options is None or options == type(options)():
        return ""
    changed = [
        f"{field.name}={getattr(options, field.name)!r}"
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default
    ]
    return f" ({', '.join(changed)})"


def checks(method: Any) -> tuple[Check, ...]:
    """The checks of the seam that a method belongs to."""
    if isinstance(method, Schedule):
        return (check_configuration, check_declaration, check_rates)
    if isinstance(method, OptimizerMethod):
        return (
            check_configuration,
            check_declaration,
            check_trains,
            check_groups,
            check_state_bytes,
            check_resumes,
            check_fused_backward,
        )
    return (
        check_configuration,
        check_declaration,
        check_tensors,
        check_gradients,
        check_trains,
        check_resumes,
        check_decoding,
        check_kept_bytes,
        check_flops,
        check_recomputation,
    )


# --- declarations ---------------------------------------------------------------------------------


def check_configuration(example: Example) -> Iterator[str]:
    """The method's options are sections of the configuration, and it has nothing to complain of."""
    run = RunConfig(
        model=example.model, optimizer=example.optimizer, data=DataConfig(sequence_length=8)
    )
    try:
        check_config(run)
    except ConfigError as error:
        yield from error.problems


def check_declaration(example: Example) -> Iterator[str]:
    """Name, summary and options are fit for a command line."""
    method = example.method
    if not getattr(method, "summary", "") or "\n" in method.summary:
        yield "the summary is not one line"
    if method.Options is None:
        return
    parameters = getattr(method.Options, "__dataclass_params__", None)
    if parameters is None:
        yield "Options is not a dataclass"
        return
    if not parameters.frozen:
        yield "Options is not frozen"
    if not all(isinstance(options, method.Options) for options in method.examples):
        yield "examples are not instances of Options"


# --- tensors and training -------------------------------------------------------------------------


def check_tensors(example: Example) -> Iterator[str]:
    """The declared tensors are those of the model, each filled from (seed, name)."""
    model, same = example.build(), example.build()
    other = dict(example.build(seed=1).named_parameters())
    parameters = dict(model.named_parameters())
    declared = example.spec.tensors
    for name in sorted(parameters.keys() ^ declared.keys()):
        yield f"{name} is declared or made, not both"
    for name in parameters.keys() & declared.keys():
        spec, parameter = declared[name], parameters[name]
        dtype = dtype_of(spec, torch.float32)
        made = (tuple(parameter.shape), parameter.requires_grad, parameter.dtype)
        if made != (spec.shape, spec.trained, dtype):
            yield f"{name} is made as {made}, declared as {spec}"
        if not bool(parameter.isfinite().all()):
            yield f"{name} is not filled with numbers"
        if not torch.equal(parameter, same.get_parameter(name)):
            yield f"{name} differs for one seed"
        if spec.init.kind not in ("constant", "own") and torch.equal(parameter, other[name]):
            yield f"{name} does not hang on the seed"
    yield from _unseeded(declared, parameters, other)
    yield from _bf16_problems(example)


def _unseeded(
    declared: Mapping[str, TensorSpec], one: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> Iterator[str]:
    """Own values that two seeds have alike. Of a few choices each, as an index of one channel in
    sixteen is, some are alike by chance: all maps' tensors of a name count together."""
    alike: dict[str, list[bool]] = {}
    for name, spec in declared.items():
        if spec.init.kind == "own":
            same = torch.equal(one[name], other[name])
            alike.setdefault(name.rpartition(".")[2], []).append(same)
    yield from (f"no {name} hangs on the seed" for name, found in alike.items() if all(found))


def _bf16_problems(example: Example) -> Iterator[str]:
    for name, parameter in example.build(dtype=torch.bfloat16).named_parameters():
        wanted = dtype_of(example.spec.tensors[name], torch.bfloat16)
        if parameter.dtype != wanted:
            yield f"{name} is {parameter.dtype} in a bf16 run, declared {wanted}"


def check_gradients(example: Example) -> Iterator[str]:
    """Every trained tensor has a finite gradient once it has moved, every other none."""
    model = example.build()
    optimizer = example.build_optimizer(model)
    train(example, model, optimizer, 2)
    total, _ = model(*batch())
    total.backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            if parameter.grad is not None:
                yield f"{name} is not trained and has a gradient"
        elif parameter.grad is None:
            yield f"{name} has no gradient"
        elif not bool(parameter.grad.isfinite().all()):
            yield f"the gradient of {name} is not finite"


def check_trains(example: Example) -> Iterator[str]:
    """The loss on one batch falls, every trained tensor moves, no other does, and twice alike."""
    model, other = example.build(), example.build()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = train(example, model, example.build_optimizer(model), STEPS)
    if not losses[0] - losses[-1] > MARGIN:
        yield f"the loss goes from {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps"
    for name, (_, parameter) in model.trained().items():
        if torch.equal(parameter, before[name]):
            yield f"{name} never moved"
    if train(example, other, example.build_optimizer(other), STEPS) != losses:
        yield "the same run gives other losses"


def check_groups(example: Example) -> Iterator[str]:
    """Every trained tensor is in one group, whose rate is the base rate times its factor."""
    model = example.build()
    optimizer = example.build_optimizer(model)
    given = {id(tensor): (name, spec) for name, (spec, tensor) in model.trained().items()}
    seen = []
    for group in optimizer.param_groups:
        if group["lr"] != example.optimizer.lr * group["lr_factor"]:
            yield f"a group's rate {group['lr']} is not the base rate times its lr_factor"
        seen += [id(parameter) for parameter in group["params"]]
        for parameter in group["params"]:
            name, spec = given[id(parameter)]
            if not spec.decays and group["weight_decay"]:
                yield f"{name} decays"
    if sorted(seen) != sorted(given):
        yield "a trained tensor is in no group, or in two"


def check_state_bytes(example: Example) -> Iterator[str]:
    """The closed form is the bytes of every tensor of the state after a step."""
    method = optimizers.get(example.optimizer.name)
    options = options_of(example.optimizer, method.name)
    for update in UPDATES:
        model = example.build(dtype=_dtype(update))
        optimizer = example.build_optimizer(model, update)
        train(example, model, optimizer, 2)
        for name, (spec, tensor) in model.trained().items():
            held = sum(_bytes(each) for each in _tensors(optimizer.state[tensor]))
            size = tensor.element_size()
            declared = low_precision.state_bytes(method, spec, options, size, update)
            if held != declared:
                yield f"{name} ({_words(update)}) holds {held} bytes of state, declared {declared}"


def check_resumes(example: Example) -> Iterator[str]:
    """Saved, loaded into a model of another seed, continued: as one that was never stopped."""
    for update in UPDATES if isinstance(example.method, OptimizerMethod) else (None,):
        for problem in _resume_problems(example, update):
            yield f"{_words(update)}: {problem}"


def _resume_problems(example: Example, update: Bf16Update | None) -> Iterator[str]:
    model = example.build(dtype=_dtype(update))
    optimizer = example.build_optimizer(model, update)
    train(example, model, optimizer, 5)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(example, model, optimizer, 7, start=5)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = example.build(seed=1, dtype=_dtype(update))
    other.load_state_dict(saved["model"])
    other_optimizer = example.build_optimizer(other, update)
    optimizers.load_state(other_optimizer, saved["optimizer"])
    if train(example, other, other_optimizer, 7, start=5) != expected:
        yield "the losses after a resume differ"
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, other.get_parameter(name)):
            yield f"{name} differs after a resume"


def check_fused_backward(example: Example) -> Iterator[str]:
    """A step for each gradient as it comes is the step of all of them, to the bit."""
    for update in UPDATES:
        runs = []
        for is_fused in (False, True):
            model = example.build(dtype=_dtype(update))
            optimizer = example.build_optimizer(model, update)
            losses = train(example, model, optimizer, 5, is_fused=is_fused)
            runs.append((model, optimizer.state_dict(), losses))
        (model, state, losses), (other, other_state, other_losses) = runs
        if losses != other_losses:
            yield f"{_words(update)}: the losses differ"
        for name, parameter in model.named_parameters():
            if not torch.equal(parameter, other.get_parameter(name)):
                yield f"{_words(update)}: {name} differs"
        if not _is_same(state, other_state):
            yield f"{_words(update)}: the states differ"


@torch.no_grad()
def check_decoding(example: Example) -> Iterator[str]:
    """Token by token with a cache gives the logits of the whole row (fp64, within 1e-9)."""
    model = example.build().double()
    tokens, _ = batch()
    whole = model.logits(tokens)
    caches = model.new_caches(tokens.shape[1])
    parts = [model.logits(tokens[:, :3], caches)]
    parts += [model.logits(tokens[:, [idx]], caches) for idx in range(3, tokens.shape[1])]
    error = float((torch.cat(parts, dim=1) - whole).abs().max())
    if not error < 1e-9:
        yield f"logits with a cache differ by {error:.1e}"


# --- schedules ------------------------------------------------------------------------------------


def check_rates(example: Example) -> Iterator[str]:
    """Factors between 0 and 1, one of them 1, whatever the run's length; pure in the step."""
    schedule = schedules.get(example.optimizer.schedule)
    options = options_of(example.optimizer, schedule.name)
    for total in (100, 1000):
        steps = Steps(total, 0.1, 0.1)
        if problems := schedule.problems(options, steps):
            yield f"{total} steps: {'; '.join(problems)}"
            continue
        forward = [schedule.factor(step, options, steps) for step in range(1, total + 1)]
        backward = [schedule.factor(step, options, steps) for step in range(total, 0, -1)]
        if forward != backward[::-1]:
            yield "a factor hangs on what was asked before"
        if not all(0 <= factor <= 1 + 1e-12 for factor in forward):
            yield f"{total} steps: factors lie between {min(forward)} and {max(forward)}"
        if max(forward) < 0.99:
            yield f"{total} steps: the peak rate is never reached ({max(forward):.3f} of it)"


def _dtype(update: Bf16Update | None) -> torch.dtype:
    return torch.bfloat16 if update else torch.float32


def _words(update: Bf16Update | None) -> str:
    return f"bf16, {update}" if update else "fp32"


def _is_same(one: Any, other: Any) -> bool:
    """Whether all inside nested dicts, lists and tuples is the same, in whatever order of keys."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
