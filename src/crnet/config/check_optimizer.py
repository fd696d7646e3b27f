"""What a model and its optimizer ask of each other."""

from __future__ import annotations

from collections.abc import Iterator

from crnet import optimizers
from crnet.config.model_spec import ModelSpec
from crnet.config.sections import OptimizerConfig
from crnet.optimizers._sharing import pairs


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
    if not method.steps_pairs:
        return
    trained = {name: each for name, each in spec.tensors.items() if each.trained}
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
