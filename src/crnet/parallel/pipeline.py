"""A model in stages, one or two a process, on torch's own ``torch.distributed.pipelining``.

    tokens -> [embed, blocks] => [blocks] => ... => [blocks, last read, norm, head, loss]

A stage is a run of blocks (``cost.stages.cut``). What crosses is the stream's state and, where
blocks above read them, what blocks below handed on (``cost.stages.boundary``); gradients cross
back. The model knows nothing of it: the stages call its blocks by its own runner, and what a
process does not have is taken out of the model that it laid out, before there is memory.

Schedules: 1F1B, and interleaved 1F1B with two stages a process. Refused are those without a bubble:
torch 2.13 computes wrong gradients under them where blocks are sharded (fully_shard inside a
stage), without an error. Shapes are declared, never inferred: torch's inference would run every
stage once more, and would not notice another shape later; ``_Part`` checks them in each pass.

Shapes: B sequences of a micro-batch, T tokens, D model width.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from crnet.config.model_spec import ModelSpec
from crnet.config.sections import num_stages
from crnet.cost.micro_batch import MicroBatch
from crnet.cost.stages import AT_THE_END, Crossing, Stage, boundary, cut, held
from crnet.kernels.loss import linear_cross_entropy, target_scores
from crnet.layers.block import Carries, State, run_blocks
from crnet.model.language_model import LanguageModel
from crnet.optimizers._fused_backward.module import FusedBackward
from crnet.parallel.engine import (
    Engine,
    TokensAndTargets,
    copies,
    lay_out_shared,
    split,
    sums_of,
)
from crnet.parallel.world import World
from crnet.recompute.engine import Recomputation
from crnet.recompute.plan import within

DTYPES = {2: torch.bfloat16, 4: torch.float32}
"""By bytes of an item."""
Computing = Callable[[], contextlib.AbstractContextManager[Any]]


def stages_of(spec: ModelSpec, world: World, length: int) -> list[Stage]:
    """The stages of this process: every so many-th, from its place in the pipeline on."""
    found = cut(spec, num_stages(world.parallel), length)
    return list(found[dist.get_rank(world.pipe) :: world.parallel.pipeline])


def lay_out_part(spec: ModelSpec, world: World, length: int) -> LanguageModel:
    """This process's part of a model, without memory. ``length``: tokens of a row."""
    model = lay_out_shared(spec, world)
    if world.parallel.pipeline == 1:
        return model
    stages = stages_of(spec, world, length)
    for name in list(model.model.layers._modules):
        if not any(stage.bottom <= int(name) < stage.top for stage in stages):
            del model.model.layers._modules[name]
    has_first, has_last = stages[0].is_first, stages[-1].is_last
    for name in [name for name in model.model._modules if name != "layers"]:
        if not (has_last if name in AT_THE_END else has_first):
            del model.model._modules[name]
    if not has_last:
        del model._modules["lm_head"]
    if world.parallel.shard > 1:  # what is around the blocks: with its stage (``PipelineEngine``)
        split(model.sharded_parts(), world)
    model.spec = dataclasses.replace(spec, held=held(spec, stages))
    return model


class _Contiguous(torch.autograd.Function):
    """The tensor; its gradient as gloo sends it."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.contiguous()


class _Part(nn.Module):
    """A stage as torch's engine wants it: tensors in, tensors out, the last one's its loss."""

    def __init__(self, model: LanguageModel, stage: Stage, micro_batch: MicroBatch):
        super().__init__()
        backbone = model.model
        self.stage, self.spec = stage, model.spec
        self.blocks = nn.ModuleList(
            block for block in backbone.blocks() if stage.bottom <= block.layer_idx < stage.top
        )
        around = [name for name in backbone._modules if name != "layers"]
        mine = [
            name for name in around if (stage.is_last if name in AT_THE_END else stage.is_first)
        ]
        self.around = nn.ModuleDict({name: backbone.get_submodule(name) for name in mine})
        self.head = model.lm_head if stage.is_last else None
        self._model = (model,)  # in a tuple: no child of this module
        self._local: tuple[Any, Any] = (None, None)
        self.entering = [] if stage.is_first else boundary(micro_batch, stage.bottom)
        self.leaving = [] if stage.is_last else boundary(micro_batch, stage.top)
        self.computing: Computing = contextlib.nullcontext

    def forward(self, *tensors: Tensor, targets: Tensor | None = None) -> Any:
        """Return what the next stage gets; of the last one the summed loss, or, without gradients,
        what ``Engine.sums`` returns.

        Args:
            tensors: tokens (B, T), int64; else what the stage below returned.
            targets: (B, T), int64; read by the last stage alone.
        """
        with self.computing():
            return self._forward(tensors, targets)

    def _forward(self, tensors: Sequence[Tensor], targets: Tensor | None) -> Any:
        backbone, spec = self._model[0].model, self.spec
        architecture, options = spec.architecture, spec.architecture_options
        state: State
        if self.stage.is_first:
            state, carries = (architecture.embed(backbone, tensors[0], 0),), Carries()
        else:
            tensors = [_Contiguous.apply(tensor) for tensor in tensors]  # type: ignore[misc]
            keys = _keys(self.entering)
            count = len(tensors) - len(keys)
            state = tuple(tensors[:count])
            carries = Carries(dict(zip(keys, tensors[count:], strict=True)))
        length, device = tensors[0].shape[1], tensors[0].device
        context = architecture.context(spec.shape, options, 0, length, device, None)
        state = self._runner()(list(self.blocks), state, context, carries)
        if self.stage.is_last:
            assert targets is not None
            x_BTD = backbone.norm(backbone.last_read.read(state))  # type: ignore[operator]
            x_MD, target_M = x_BTD.reshape(-1, x_BTD.shape[-1]), targets.reshape(-1)
            weight = self._model[0].lm_head.weight
            if torch.is_grad_enabled():
                return linear_cross_entropy(x_MD, weight, target_M)
            return sums_of(target_scores(x_MD, weight, target_M))
        leaving = (*state, *carries.at(_keys(self.leaving)))
        if torch.is_grad_enabled():
            self._check(leaving)
        return tuple(tensor.contiguous() for tensor in leaving)

    def _check(self, leaving: Sequence[Tensor]) -> None:
        """Raise ``RuntimeError`` where the next stage expects something else: gloo would fill a
        part of its memory and say nothing."""
        found = [(each.shape[-1], each.dtype) for each in leaving]
        wanted = [(each.width, DTYPES[each.item_bytes]) for each in self.leaving]
        if found != wanted:
            raise RuntimeError(
                f"stage {self.stage.idx + 1} hands on tensors of width and dtype {found}; the cost "
                f"model declares {wanted}"
            )

    def _runner(self) -> Any:
        """The model's, its plan cut to this stage's blocks: a segment ends where a stage does."""
        runner: Any = self._model[0].model.runner
        if not torch.is_grad_enabled():
            return run_blocks
        if not isinstance(runner, Recomputation):
            return runner
        if self._local[0] is not runner:
            plan = within(runner.plan, self.stage.bottom, self.stage.top)
            self._local = runner, Recomputation(plan, runner.run)
        return self._local[1]


def _keys(crossing: Sequence[Crossing]) -> list[tuple[str, str]]:
    return [(each.source, each.position) for each in crossing if each.source != "state"]


class PipelineEngine(Engine):
    """This process's stages, and how all of them compute together."""

    def __init__(self, model: LanguageModel, world: World, micro_batch: MicroBatch):
        """``micro_batch``: of this run."""
        self.model, self.world, self.is_split = model, world, world.parallel.shard > 1
        self.micro_batch = micro_batch
        spec = model.spec.whole()
        self.stages = stages_of(spec, world, micro_batch.length)
        self.parts = [_Part(model, stage, micro_batch) for stage in self.stages]
        if self.is_split:  # torch's schedules add gradients up over processes after the last one
            split(self.parts, world)
        self._called: list[Any] = [
            copies(each, world) if self.keeps_gradients else each for each in self.parts
        ]
        self._schedule: tuple[Any, Any] = (None, None)
        self._num_tokens, self._sums = 1, []

    def accumulate(
        self,
        micro_batches: Sequence[TokensAndTargets],
        num_tokens: int,
        computing: Computing,
        fused: FusedBackward | None = None,
    ) -> Tensor:
        """As ``Engine``'s; the loss is the same on every stage.

        Raises:
            RuntimeError: micro-batches of different shapes.
        """
        assert fused is None, "refused by config.check"
        tokens, targets = (torch.cat(column) for column in zip(*micro_batches, strict=True))
        shapes = {tuple(each.shape) for each, _ in micro_batches}
        if len(shapes) > 1:
            raise RuntimeError(f"micro-batches of a pipeline are equal; these are {shapes}")
        for part in self.parts:
            part.computing = computing
        self._num_tokens, self._sums = num_tokens, []
        sequences, length = micro_batches[0][0].shape
        schedule = self._scheduled(len(micro_batches), sequences, length, tokens.device)
        args = (tokens,) if self.stages[0].is_first else ()
        last = {"target": targets, "targets": targets} if self.stages[-1].is_last else {}
        fixed = contextlib.nullcontext() if self.is_split else self.model.fixed_weights()
        with fixed:
            schedule.step(*args, **last, return_outputs=False)
        total = torch.zeros((), dtype=torch.float64, device=tokens.device)
        for each in self._sums:
            total += each
        return self._from_last(total)

    @torch.no_grad()
    def sums(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """As ``Engine``'s, stage after stage; the same on every process."""
        total = torch.zeros(2, dtype=torch.float64, device=tokens.device)
        rank, size = dist.get_rank(self.world.pipe), self.world.parallel.pipeline
        for part in self.parts:
            part.computing = contextlib.nullcontext
            tensors = (tokens,) if part.stage.is_first else self._receive((rank - 1) % size)
            found = part(*tensors, targets=targets)
            if part.stage.is_last:
                total = found
            else:
                self._send(found, (rank + 1) % size)
        return self._from_last(total)

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """As ``Engine``'s: over the parameters of all stages."""
        squared = super().norm(parameters).double().square()
        dist.all_reduce(squared, group=self.world.pipe)
        return squared.sqrt().float()

    def _scheduled(self, number: int, sequences: int, length: int, device: torch.device) -> Any:
        key = (number, sequences, length)
        if self._schedule[0] != key:
            self._schedule = key, self._make_schedule(number, sequences, length, device)
        return self._schedule[1]

    def _make_schedule(self, number: int, sequences: int, length: int, device: torch.device) -> Any:
        from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B

        made = [
            _as_stage(part, called, sequences, length, device, self.world.pipe)
            for part, called in zip(self.parts, self._called, strict=True)
        ]
        more: dict[str, Any] = {"loss_fn": self._mean_loss, "scale_grads": False}
        if self.world.parallel.schedule == "1f1b":
            return Schedule1F1B(made[0], number, **more)
        return ScheduleInterleaved1F1B(made, number, **more)

    def _mean_loss(self, loss_sum: Tensor, _: Tensor) -> Tensor:
        """By the whole step's tokens: micro-batches add up to the batch."""
        self._sums.append(loss_sum.detach())
        return loss_sum / self._num_tokens

    def _from_last(self, value: Tensor) -> Tensor:
        """What the last stage has."""
        dist.broadcast(value, group=self.world.pipe, group_src=self.world.parallel.pipeline - 1)
        return value

    def _send(self, tensors: Sequence[Tensor], to: int) -> None:
        """Shapes first: those of an evaluation are its own."""
        pipe = self.world.pipe
        told = [(tuple(each.shape), each.dtype) for each in tensors]
        dist.send_object_list([told], group=pipe, group_dst=to, device=tensors[0].device)
        for each in tensors:
            dist.send(each, group=pipe, group_dst=to)

    def _receive(self, sender: int) -> list[Tensor]:
        pipe, device = self.world.pipe, next(self.model.parameters()).device
        told: list[Any] = [None]
        dist.recv_object_list(told, group=pipe, group_src=sender, device=device)
        found = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in told[0]]
        for each in found:
            dist.recv(each, group=pipe, group_src=sender)
        return found


def _as_stage(
    part: _Part, called: nn.Module, sequences: int, length: int, device: torch.device, pipe: Any
) -> Any:
    """torch's stage around a part, its shapes declared."""
    from torch.distributed.pipelining import PipelineStage

    stage = part.stage
    tokens = torch.empty((sequences, length), dtype=torch.int64, device="meta")
    entering = _declared(part.entering, sequences, length)
    leaving = _declared(part.leaving, sequences, length)
    return PipelineStage(
        called,
        stage.idx,
        stage.num_stages,
        device,
        input_args=(tokens,) if stage.is_first else entering,
        output_args=(torch.empty((), device="meta"),) if stage.is_last else leaving,
        group=pipe,
    )


def _declared(crossing: Sequence[Crossing], sequences: int, length: int) -> tuple[Tensor, ...]:
    """Of what crosses: shape and dtype, without memory."""
    return tuple(
        torch.empty(
            (sequences, length, each.width),
            dtype=DTYPES[each.item_bytes],
            device="meta",
            requires_grad=True,
        )
        for each in crossing
    )
