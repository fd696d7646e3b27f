"""The model as the processes of a run share it: what a step and an evaluation ask of it.

    data     a copy of the model on every process, gradients added up (DistributedDataParallel)
    shard    weights, gradients and state split over the processes, block by block (fully_shard)
    both     copies that are split: a mesh of two dimensions
    pipeline some of the blocks on every process (``parallel.pipeline``)

Gradients are added up and never averaged: the loss of every row is divided by the target tokens of
the whole batch, wherever it is computed. So the step is the same however the batch is shared.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from crnet.config.model_spec import ModelSpec
from crnet.model.build import lay_out
from crnet.model.language_model import Around, LanguageModel, plainly
from crnet.parallel.whole import whole, whole_parameters
from crnet.parallel.world import ALONE, World

TokensAndTargets = tuple[Tensor, Tensor]
"""Tokens and targets, (B, T)."""


class Engine:
    """A model, and how its processes compute with it together."""

    def __init__(self, model: LanguageModel, world: World = ALONE):
        self.model, self.world = model, world
        self.is_split = any(hasattr(each, "device_mesh") for each in model.parameters())
        self._call: Any = model
        if world.parallel.data > 1 and not self.is_split:
            self._call = copies(model, world)

    def accumulate(
        self,
        micro_batches: Sequence[TokensAndTargets],
        num_tokens: int,
        computing: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> Tensor:
        """Gradients of the mean loss over the whole batch, of this process's part of the model.

        Args:
            micro_batches: this process's share, on its device; as many on every process.
            num_tokens: target tokens of the whole batch.
            computing: around every forward pass.
        Returns: the summed loss of this process's share, fp64.
        """
        device = micro_batches[0][0].device
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        fixed = contextlib.nullcontext() if self.is_split else self.model.fixed_weights()
        with fixed:
            for idx, (tokens, targets) in enumerate(micro_batches):
                with self._reducing(idx == len(micro_batches) - 1):
                    with computing():
                        loss, _ = self._call(tokens, targets)
                    # By the whole step's tokens: micro-batches add up to the batch.
                    (loss / num_tokens).backward()
                loss_sum += loss.detach()
        return loss_sum

    def loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss and number of targets of some rows, without gradients."""
        return self.model(tokens, targets)

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Norm of the whole gradient, whichever process has the parameters; 0-d."""
        gradients = [each.grad for each in parameters if each.grad is not None]
        return whole(torch.nn.utils.get_total_norm(gradients))

    def around_events(self) -> Around:
        """Around what a parameterization does to one of its maps: the map has whole tensors."""
        return whole_parameters if self.is_split else plainly

    @contextlib.contextmanager
    def _reducing(self, last: bool) -> Iterator[None]:
        """Gradients cross to other processes with the last micro-batch alone."""
        if self.is_split:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif self._call is not self.model and not last:
            with self._call.no_sync():
                yield
            return
        yield


def copies(model: nn.Module, world: World) -> nn.Module:
    """DistributedDataParallel that adds gradients up."""
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(
        model,
        process_group=world.rows,
        init_sync=False,  # every process fills its copy from the same seed, or checkpoint
        gradient_as_bucket_view=True,
    )

    def add_up(group, bucket):  # torch reads its annotations, and wants none or its own
        work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
        assert work is not None
        return work.get_future().then(lambda done: done.value()[0])

    wrapped.register_comm_hook(world.rows, add_up)  # type: ignore[arg-type]
    return wrapped


def split(model: LanguageModel, world: World) -> None:
    """Split a laid out model over processes: each block is gathered for itself, when it runs."""
    from torch.distributed.fsdp import fully_shard

    # What a block returns may be a view, and nobody changes it in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = world.mesh["data", "shard"] if world.parallel.data > 1 else world.mesh["shard"]
    for part in (*model.sharded_parts(), model):
        sharded: Any = fully_shard(part, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def lay_out_shared(spec: ModelSpec, world: World) -> LanguageModel:
    """This process's part of a model, without memory."""
    model = lay_out(spec)
    if world.parallel.shard > 1:
        split(model, world)
    return model
