"""Which runs can update inside the backward pass (``--optimizer.fused-backward``)."""

from __future__ import annotations

from collections.abc import Iterator

from crnet.config.sections import SIZES, RunConfig

FLAG = "--optimizer.fused-backward"


def fused_problems(config: RunConfig) -> Iterator[str]:
    """Why the update cannot be fused with the backward pass, whatever the processes."""
    if config.optimizer.fused_backward and config.optimizer.clip_norm:
        yield (
            f"{FLAG} with --optimizer.clip-norm {config.optimizer.clip_norm:g}: the norm of the "
            "whole gradient is known only when every gradient has come, and most are used and gone "
            "by then; say --optimizer.clip-norm 0, or leave it out"
        )


def shared_problems(config: RunConfig) -> Iterator[str]:
    """Why these processes cannot share such a run."""
    if not config.optimizer.fused_backward:
        return
    reasons = {
        "pipeline": "gradients of a stage are whole only after the last micro-batch, which saves "
        "nothing",
        "data": "gradients are added up over the copies in buckets, and would be used before",
        "shard": "gradients are scattered over the processes, and would be used before",
        "tensor": "gradients of what is whole everywhere are added up after the backward pass",
    }
    for key in SIZES:
        if (size := getattr(config.parallel, key)) > 1:
            yield (
                f"{FLAG} with --parallel.{key} {size}: {reasons[key]}; leave one of them out"
                + (", --parallel.shard saves more" if key == "data" else "")
            )
