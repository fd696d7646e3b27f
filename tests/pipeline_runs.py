"""What the processes of ``test_pipeline.py`` do.

    torchrun ... pipeline_runs.py FOLDER

As ``shared_runs.py`` says. Beside what a process sees of a run, FOLDER/NAME.RANK.json has what its
part of the model holds, what it sent to other stages, and how many micro-batches waited at most; a
run whose name is in ``FAULTS`` is made with that mistake.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.distributed.pipelining import PipelineStage

from crnet.parallel import pipeline
from crnet.parallel.whole import is_split
from crnet.train import run as training
from shared_runs import Seen, train_all


def swapped(crossing: Any) -> list[tuple[str, str]]:
    """The keys of a boundary, two of the same width the wrong way round."""
    keys = right(crossing)
    if crossing and crossing is not swapped.leaving:  # type: ignore[attr-defined]
        one, other = keys.index(("below", "q")), keys.index(("below", "o"))
        keys[one], keys[other] = keys[other], keys[one]
    return keys


right = pipeline._keys


class OutOfOrder(pipeline._Part):
    """Takes the carries of q and o for each other."""

    def _forward(self, tensors: Any, targets: Any) -> Any:
        swapped.leaving = self.leaving  # type: ignore[attr-defined]
        with mock.patch.object(pipeline, "_keys", swapped):
            return super()._forward(tensors, targets)


class Scaled(pipeline.PipelineEngine):
    """Divides gradients by the number of micro-batches, as torch's schedules do by themselves."""

    def _make_schedule(self, *args: Any) -> Any:
        made = super()._make_schedule(*args)
        made.scale_grads = True
        return made


class OwnNorm(pipeline.PipelineEngine):
    """Clips by the norm of each process's own gradients."""

    norm = pipeline.Engine.norm


FAULTS = {
    "fault: order": (pipeline, "_Part", OutOfOrder),
    "fault: scale": (training, "PipelineEngine", Scaled),
    "fault: norm": (training, "PipelineEngine", OwnNorm),
}


@contextlib.contextmanager
def watched(name: str) -> Iterator[Seen]:
    """What a run's model holds and sends."""
    seen: Seen = {"sent": defaultdict(int), "waiting": defaultdict(int), "scattered": 0}
    scattered = torch.distributed.reduce_scatter_single
    made, computed = training.make_engine, PipelineStage.forward_one_chunk
    forward, backward = PipelineStage.get_fwd_send_ops, PipelineStage.get_bwd_send_ops

    def make(*args: Any) -> Any:
        engine = made(*args)
        parameters = list(engine.model.parameters())
        seen["held"] = sum(each.nbytes for each in parameters)
        seen["trained"] = sum(each.nbytes for each in parameters if each.requires_grad)
        local = [each.to_local() if is_split(each) else each for each in parameters]
        seen["part"] = sum(each.nbytes for each in local)
        return engine

    def scatter(*args: Any, **more: Any) -> Any:
        seen["scattered"] += 1
        return scattered(*args, **more)

    def send_forward(self: PipelineStage, chunk: int) -> Any:
        ops = forward(self, chunk)
        seen["sent"][f"up {self.stage_index}"] += sum(op.tensor.nbytes for op in ops)
        return ops

    def compute(self: PipelineStage, *args: Any, **more: Any) -> Any:
        output = computed(self, *args, **more)
        waiting = max(seen["waiting"][str(self.stage_index)], len(self.fwd_cache))
        seen["waiting"][str(self.stage_index)] = waiting
        return output

    def send_backward(self: PipelineStage, chunk: int) -> Any:
        ops = backward(self, chunk)
        seen["sent"][f"down {self.stage_index}"] += sum(op.tensor.nbytes for op in ops)
        return ops

    with (
        mock.patch.object(*FAULTS[name]) if name in FAULTS else contextlib.nullcontext(),
        mock.patch.object(training, "loss_picture"),  # a third of the time
        mock.patch.object(training, "make_engine", make),
        mock.patch.object(torch.distributed, "reduce_scatter_single", scatter),
        mock.patch.object(PipelineStage, "forward_one_chunk", compute),
        mock.patch.object(PipelineStage, "get_fwd_send_ops", send_forward),
        mock.patch.object(PipelineStage, "get_bwd_send_ops", send_backward),
    ):
        yield seen


if __name__ == "__main__":
    train_all(watched)
