"""Which runs can train an adapter (``--train.adapter``)."""

from __future__ import annotations

from collections.abc import Iterator

from crnet.config.model_spec import ModelSpec
from crnet.config.sections import ParallelConfig, TrainConfig

FLAG = "--train.adapter"


def unused_problems(train: TrainConfig) -> Iterator[str]:
    """Options of an adapter where there is none, and an adapter on nothing."""
    for key in ("adapter_rank", "adapter_alpha"):
        if train.adapter is None and getattr(train, key) != getattr(TrainConfig, key):
            yield (
                f"--train.{key.replace('_', '-')} has no effect without {FLAG}; say {FLAG} lora, "
                "or leave it out"
            )
    if train.adapter is not None and train.init_from is None:
        yield (
            f"{FLAG} {train.adapter} trains beside given weights; name them with "
            "--train.init-from, or take crnet finetune"
        )


def adapter_problems(
    spec: ModelSpec, train: TrainConfig, parallel: ParallelConfig
) -> Iterator[str]:
    """Why a run cannot train an adapter on a model."""
    if train.adapter is None:
        return
    for size in ("shard", "pipeline", "tensor"):
        if getattr(parallel, size) > 1:
            yield (
                f"{FLAG} with --parallel.{size}: the adapter stands in the place of a map, which "
                "is split or spread before it is there; say --parallel.data"
            )
    yield from _map_problems(spec)
    yield from _recompute_problems(spec, train)
    if train.compile:
        yield f"{FLAG} with --train.compile is not supported; leave one of them out"


def _map_problems(spec: ModelSpec) -> Iterator[str]:
    """The rule of ``adapters.maps.adaptable``: a matrix and nothing else, or no matrix."""
    wrong = []
    for slot in (slot for block in spec.slots for slot in block):
        names = spec.map_tensors(slot).keys() - {"bias"}
        if "weight" in names and names != {"weight"} and slot.position not in wrong:
            wrong.append(slot.position)
    if wrong:
        yield (
            f"{FLAG} on {spec.linear.name}: its maps {', '.join(wrong)} have a matrix and more, "
            "which PEFT takes for no linear layer; leave it out, and every weight trains"
        )


def _recompute_problems(spec: ModelSpec, train: TrainConfig) -> Iterator[str]:
    if train.recompute == "invert":
        yield (
            f"{FLAG} with --train.recompute invert: the output below does not follow from this one "
            "while an update is in it; take replay or block"
        )
    if train.recompute == "auto":
        yield (
            f"{FLAG} with --train.recompute auto: the cost model does not know what an adapter "
            "keeps; name a policy"
        )
    hands_bottleneck = any(read.of == "bottleneck" for each in spec.reads for read in each.values())
    if train.recompute == "replay" and hands_bottleneck:
        yield (
            f"{FLAG} with --train.recompute replay: a map of {spec.linear.name} hands on its "
            "bottleneck, which cannot be rebuilt beside an adapter; take block"
        )
