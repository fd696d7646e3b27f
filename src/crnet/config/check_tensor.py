"""Which models and runs processes can compute in parts (``--parallel.tensor``)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from crnet import optimizers
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import RunConfig, model_of, options_of


def tensor_problems(config: RunConfig) -> Iterator[str]:
    """Why processes cannot compute the blocks of a model in parts."""
    train, parallel = config.train, config.parallel
    if parallel.tensor == 1:
        return
    spec = model_spec(model_of(config))
    pads = optimizers.get(config.optimizer.name).pads
    yield from parts_problems(spec, parallel.tensor, pads)
    if parallel.checkpoint == "parts":
        yield (
            "--parallel.tensor with --parallel.checkpoint parts: parts of a map would be written "
            "as the whole of it; say --parallel.checkpoint whole"
        )
    if train.compile:
        yield (
            "--parallel.tensor with --train.compile: the sums between processes stand inside a "
            "compiled block; leave one of them out"
        )
    if train.precision == "bf16":
        yield (
            "--parallel.tensor with --train.precision bf16: parts would be rounded by the same "
            "random numbers; say --train.precision bf16-mixed"
        )
    method = optimizers.get(config.optimizer.name)
    options = options_of(config.optimizer, method.name)
    if any(method.whole(each, options) for each in spec.tensors.values() if each.trained):
        yield (
            f"--parallel.tensor: {method.name} needs whole matrices; say --parallel.data or "
            "--parallel.shard, or --optimizer.name adamw"
        )
    if parallel.pipeline > 1:
        yield (
            "--parallel.tensor with --parallel.pipeline is not supported: a boundary would carry "
            "parts; leave one of them out"
        )


def parts_problems(spec: ModelSpec, num_parts: int, pads: bool = True) -> Iterator[str]:
    """Why the maps of a model cannot be computed in so many parts, with the mend.

    ``pads``: whether the optimizer leaves zeros that fill a width up as they are.
    """
    sizes = {key: getattr(spec.shape, key) for key in ("num_heads", "num_kv_heads")}
    if not (pads and spec.pads):
        sizes["intermediate_size"] = spec.shape.intermediate_size
    for key, size in sizes.items():
        if size % num_parts:
            yield (
                f"--model.{key.replace('_', '-')} {size} is not divided by --parallel.tensor "
                f"{num_parts}; take a divisor of {math.gcd(*sizes.values())}"
            )
    if any(position.split is None for position in spec.positions):
        yield (
            f"--parallel.tensor: {spec.architecture.name} does not say by which side its maps are "
            "split; say --parallel.data"
        )
        return
    slots = [slot for block in spec.slots for slot in block]
    reasons = {spec.linear.of(slot).split(slot, spec.linear_options) for slot in slots}
    for reason in sorted(each for each in reasons if isinstance(each, str)):
        yield f"--parallel.tensor with {spec.linear.name}: {reason}; say --parallel.data"
