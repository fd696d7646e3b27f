"""What a model and its optimizer ask of each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from crnet import optimizers, schedules
from crnet.config.model_spec import ModelSpec
from crnet.config.sections import OptimizerConfig, options_of
from crnet.optimizers._composed import pairs_of
from crnet.optimizers._sharing import pairs
from crnet.specs import TensorSpec


def optimizer_problems(
    spec: ModelSpec, optimizer: OptimizerConfig, adapter: str | None
) -> Iterator[str]:
    """What an event asks of the optimizer's state, and the optimizer of the tensors."""
    method = optimizers.get(optimizer.name)
    compares = spec.linear.compares_moments(spec.linear_options)
    if compares and method.has_codes:
        yield (
            f"--optimizer.name {optimizer.name} keeps codes of moments, and {spec.linear.name} "
            "looks for the largest; take another optimizer, or another reset"
        )
    yield from _restart_problems(optimizer)
    trained = {name: each for name, each in spec.tensors.items() if each.trained}
    yield from _decay_problems(optimizer, trained)
    if not method.steps_pairs:
        return
    if adapter is not None:
        yield (
            f"--optimizer.name {optimizer.name} steps two trained factors of a map together, and "
            f"the matrices of --train.adapter {adapter} are no such pair; take another optimizer"
        )
    elif not pairs(trained):
        yield (
            f"--optimizer.name {optimizer.name} steps two trained factors of a map together, and "
            f"--model.linear {spec.linear.name} has none; take a parameterization that has, or "
            "another optimizer"
        )


def _restart_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    """Moments that restart at the full rate: their first step is one of Adam's largest."""
    method, schedule = optimizers.get(optimizer.name), schedules.get(optimizer.schedule)
    moments = method.restarts_every(options_of(optimizer, method.name))
    rate = schedule.restarts_every(options_of(optimizer, schedule.name))
    if moments is not None and rate is not None and moments % rate:
        yield (
            f"--optimizer.name {method.name} restarts its moments every {moments} steps and "
            f"--optimizer.schedule {schedule.name} the rate every {rate}: each restart of the "
            "moments wants the small rates after one of the rate; take the same number for both, "
            "or a multiple for the moments"
        )


def _decay_problems(optimizer: OptimizerConfig, trained: Mapping[str, TensorSpec]) -> Iterator[str]:
    """A step that takes all of a weight, or more, before it adds anything."""
    composed = pairs_of(trained) if optimizer.decay == "composed" else {}
    others = trained.keys() - {*composed, *composed.values()}
    factors = [trained[name].lr_factor for name in others if trained[name].decays]
    rate = optimizer.lr * max(factors, default=0.0)
    if rate * optimizer.weight_decay >= 1:
        yield (
            f"--optimizer.weight-decay {optimizer.weight_decay:g} at the rate {rate:g} takes "
            f"{rate * optimizer.weight_decay:g} of a weight in one step, which leaves nothing of "
            f"it; take less than {1 / rate:g}, or a smaller --optimizer.lr"
        )
