"""The model as the processes of a run share it: what a step and an evaluation ask of it.

    data     a copy of the model on every process, gradients added up (DistributedDataParallel)
    shard    weights, gradients and state split over the processes, block by block (fully_shard)
    both     copies that are split: a mesh of two dimensions
    pipeline some of the blocks on every process (``parallel.pipeline``); copied, or split
    tensor   every block in parts (``model.tensor_parallel``); copied, or split

Gradients are added up and never averaged: the loss of every row is divided by the target tokens of
the whole batch, wherever it is computed. So the step is the same however the batch is shared.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from crnet.config.model_spec import ModelSpec
from crnet.kernels.loss import Scores
from crnet.kernels.partial import added_up
from crnet.model.build import lay_out
from crnet.model.language_model import Around, LanguageModel, plainly
from crnet.model.tensor_parallel import join
from crnet.optimizers._fused_backward.module import FusedBackward
from crnet.parallel.whole import is_split, whole, whole_parameters
from crnet.parallel.world import ALONE, World

TokensAndTargets = tuple[Tensor, Tensor]
"""Tokens and targets, (B, T)."""


class Engine:
    """A model, and how its processes compute with it together."""

    _parted: Set[Tensor] = frozenset()
    """Parameters that are one process's part of a map."""
    _summed: Sequence[Tensor] = ()
    """Whole ones that act on a part."""

    def __init__(self, model: LanguageModel, world: World = ALONE):
        self.model, self.world = model, world
        self.is_split = any(map(is_split, model.parameters()))
        self._call: Any = model
        self.wrap()
        named = dict(model.named_parameters())
        self._parted = {named[name] for name in model.spec.split_dims}
        self._summed = [named[name] for name in model.spec.summed if named[name].requires_grad]

    def wrap(self) -> None:
        """Wrap the model for its copies; once more where it has fewer parameters than before, for
        the wrapper waits for the gradient of each."""
        self._call = self.model  # the former wrapper lets go of its hooks first
        if self.keeps_gradients:
            self._call = copies(self.model, self.world)

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients stay from step to step, to be filled with zeros: those of copies lie in
        the memory that crosses between them. Forgotten, they would be made beside it, for torch
        moves them there with the last micro-batch alone, and a process would have them twice."""
        return self.world.parallel.data > 1 and not self.is_split

    def accumulate(
        self,
        micro_batches: Sequence[TokensAndTargets],
        num_tokens: int,
        computing: Callable[[], contextlib.AbstractContextManager[Any]],
        fused: FusedBackward | None = None,
    ) -> Tensor:
        """Gradients of the mean loss over the whole batch, of this process's part of the model.

        Args:
            micro_batches: this process's share, on its device; as many on every process.
            num_tokens: target tokens of the whole batch.
            computing: around every forward pass.
            fused: updates within the last backward pass; one process.
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
                    loss_sum += loss.detach()
                    is_last = idx == len(micro_batches) - 1
                    with (
                        fused.updating(loss_sum) if fused and is_last else contextlib.nullcontext()
                    ):
                        # By the whole step's tokens: micro-batches add up to the batch.
                        (loss / num_tokens).backward()
        self._sum_parts()
        return loss_sum

    def _sum_parts(self) -> None:
        """Add up the gradients of what acts on a part of the columns alone, and is no part itself:
        one sum for all of them."""
        if not self._summed:
            return
        gradients = [_local(each.grad) for each in self._summed if each.grad is not None]
        flat = added_up(torch.cat([each.flatten() for each in gradients]), self.world.parts)
        found = flat.split([each.numel() for each in gradients])
        for gradient, value in zip(gradients, found, strict=True):
            gradient.copy_(value.view_as(gradient))

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Norm of the gradient of these parameters, of all of the model; 0-d, the same everywhere.

        What every process has whole counts once.
        """
        if not self._parted:
            return whole(_norm(parameters))
        parts = whole(_norm([each for each in parameters if each in self._parted]))
        rest = whole(_norm([each for each in parameters if each not in self._parted]))
        return (added_up(parts.square(), self.world.parts) + rest.square()).sqrt()

    def sums(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Of some rows, without gradients: summed loss, and how many targets are the likeliest
        token; fp64, (2,)."""
        return sums_of(self.model.scores(tokens, targets))

    def around_events(self) -> Around:
        """Around what a parameterization does to one of its maps: the map has whole tensors."""
        return whole_parameters if self.is_split else plainly

    @contextlib.contextmanager
    def _reducing(self, last: bool) -> Iterator[None]:
        """Gradients cross between copies with the last micro-batch alone. Those of a split model
        are scattered with every one: till the last, each process would have all of them whole."""
        if self.is_split:
            self.model.set_requires_all_reduce(last)  # type: ignore[operator]
        elif self._call is not self.model and not last:
            with self._call.no_sync():
                yield
            return
        yield


def sums_of(scores: Scores) -> Tensor:
    """Summed loss, and how many targets are the likeliest token; fp64, (2,)."""
    return torch.stack([scores.loss_sum.double(), scores.is_likeliest_M.sum().double()])


def _norm(parameters: Sequence[Tensor]) -> Tensor:
    gradients = [each.grad for each in parameters if each.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _local(gradient: Any) -> Tensor:
    """What this process has of a gradient."""
    return gradient.to_local() if is_split(gradient) else gradient


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


def split(modules: Iterable[nn.Module], world: World) -> None:
    """Split modules over processes, inner ones first: each is gathered for itself, when it runs."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # What a block returns may be a view, and nobody changes it in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = world.mesh["data", "shard"] if world.parallel.data > 1 else world.mesh["shard"]
    for module in modules:
        sharded: Any = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        if isinstance(module, LanguageModel):  # what else gathers its weights
            register_fsdp_forward_method(sharded, "scores")


def lay_out_shared(spec: ModelSpec, world: World) -> LanguageModel:
    """This process's part of a model, without memory."""
    if world.part[1] > 1:
        spec = spec.in_parts(*world.part)
    model = lay_out(spec)
    if spec.num_parts > 1:
        join(model, world.parts)
    if world.parallel.shard > 1 and world.parallel.pipeline == 1:
        split([*model.sharded_parts(), model], world)
    return model
