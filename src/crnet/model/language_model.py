"""The language model: blocks between an embedding and a head, and their loss.

    tokens -> embed -> [ block ] * L -> last read -> norm -> head -> loss

Between blocks travel the stream's state and, where the parameterization reads earlier blocks, what
their maps hand on. Nobody above this file looks inside a model: what training, sharding and
measuring need of it are methods.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crnet.config.model_spec import ModelSpec
from crnet.kernels.loss import IGNORED, Scores, linear_cross_entropy, target_scores
from crnet.kernels.precision import casts_kept
from crnet.layers.block import Block, State, run_blocks
from crnet.layers.cache import LayerCache, all_or_none
from crnet.layers.compiled_blocks import CompiledForward
from crnet.layers.experts import Uneven
from crnet.linears._maps import SharedTensors
from crnet.model.seeds import generator_of
from crnet.recompute.engine import Recomputation
from crnet.recompute.plan import Added, RecomputePlan
from crnet.specs import Forget, TensorSpec

Runner = Callable[..., State]
"""Runs successive blocks, as ``run_blocks``: the plain loop, or a recomputation."""
Around = Callable[[nn.Module], contextlib.AbstractContextManager[None]]


def plainly(_: nn.Module) -> contextlib.AbstractContextManager[None]:
    """An ``Around`` that does nothing."""
    return contextlib.nullcontext()


class Backbone(nn.Module):
    """Embedding, blocks and the last norm."""

    layers: nn.ModuleList
    last_read: Any
    norm: Any

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        self.runner: Runner = run_blocks
        for name, module in make_parts(spec).items():
            self.add_module(name, module)

    def forward(
        self,
        tokens_BT: Tensor,
        caches: Sequence[LayerCache] | None = None,
        uneven: Uneven | None = None,
    ) -> Tensor:
        """Return the normed stream after the last block, (B, T, D).

        ``uneven``: is told how uneven the experts of each block are.
        """
        architecture, options = self.spec.architecture, self.spec.architecture_options
        start = caches[0].length if caches else 0
        x_BTD = architecture.embed(self, tokens_BT, start)
        length, device = tokens_BT.shape[1], x_BTD.device
        context = architecture.context(self.spec.shape, options, start, length, device, caches)
        if uneven is not None:
            context = dataclasses.replace(context, uneven=uneven)
        plain = caches is not None or not torch.is_grad_enabled()
        runner = run_blocks if plain else self.runner
        state = runner(self.blocks(), (x_BTD,), context)
        del x_BTD
        return self.norm(self.last_read.read(state))

    def blocks(self) -> list[Block]:
        """The blocks, bottom first."""
        return blocks_of(self.layers)


def make_parts(spec: ModelSpec) -> dict[str, nn.Module]:
    """The modules of a backbone by their names under ``model``."""
    architecture, options = spec.architecture, spec.architecture_options
    found = dict(architecture.make_outside(spec.shape, options))
    tensors = {slot.position: spec.shared_tensors(slot) for slot in spec.stored_slots[0]}
    shared = {name: SharedTensors(each) for name, each in tensors.items() if each}
    if shared:
        found["shared_tensors"] = nn.ModuleDict(shared)
    blocks = (_make_block(spec, idx, shared) for idx in range(spec.num_layers))
    found["layers"] = nn.ModuleList(blocks)
    return found | {"last_read": _make_stream(spec, spec.num_sublayers)}


def blocks_of(layers: nn.ModuleList) -> list[Block]:
    """The blocks of a backbone, bottom first."""
    found = [block for block in layers if isinstance(block, Block)]
    assert len(found) == len(layers), "a wrapped block would be passed over"
    return found


def _make_block(spec: ModelSpec, layer_idx: int, shared: Mapping[str, SharedTensors]) -> Block:
    linear, options = spec.linear, spec.linear_options
    block = spec.architecture.make_block(
        spec.shape, spec.architecture_options, layer_idx, spec.keeps_activation
    )
    maps = {}
    for slot in spec.stored_slots[layer_idx]:
        maps[slot.position] = made = linear.of(slot).make(slot, options)
        if slot.position in shared:
            made.share(shared[slot.position])
        if "bias" in (tensors := spec.map_tensors(slot)):
            made.bias = nn.Parameter(torch.empty(tensors["bias"].shape))
    reads = {name: read.source for name, read in spec.reads[layer_idx].items()}
    sublayers = len(spec.architecture.writes)
    block.prepare(
        layer_idx,
        maps,
        {position.name: position.module for position in spec.positions},
        [_make_stream(spec, layer_idx * sublayers + idx) for idx in range(sublayers)],
        spec.architecture.writes,
        reads,
        spec.hands[layer_idx],
    )
    return block


def _make_stream(spec: ModelSpec, sublayer_idx: int) -> nn.Module:
    return spec.stream.make(sublayer_idx, spec.num_sublayers, spec.shape, spec.stream_options)


class LanguageModel(nn.Module):
    """A causal language model. ``model(tokens, targets)`` returns the loss."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        self.model = Backbone(spec)
        shape = spec.shape
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self._plan, self._run = RecomputePlan(), None
        self.tie_head()

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed next-token loss and how many tokens it is over.

        Args:
            tokens_BT: int64 inputs.
            targets_BT: int64, the token that follows each input; -100 where none counts.
        Returns:
            (0-d loss in nats, fp32 or better; 0-d int64 count). Sums, not means: they add up over
            micro-batches and ranks whatever the padding.
        """
        factor = self.spec.architecture.balance_factor(self.spec.architecture_options)
        uneven = Uneven() if factor and torch.is_grad_enabled() else None
        x_BTD = self.model(tokens_BT, uneven=uneven)
        loss_sum = linear_cross_entropy(
            x_BTD.reshape(-1, x_BTD.shape[-1]), self.lm_head.weight, targets_BT.reshape(-1)
        )
        if uneven is not None:
            loss_sum = uneven.in_gradient(loss_sum, factor)
        return loss_sum, (targets_BT != IGNORED).sum()

    def scores(self, tokens_BT: Tensor, targets_BT: Tensor) -> Scores:
        """Score every target, without gradients. Arguments: those of ``forward``.

        Returns: ``kernels.loss.Scores`` of the B T positions, row after row.
        """
        with torch.no_grad():
            x_BTD = self.model(tokens_BT)
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        return target_scores(x_MD, self.lm_head.weight, targets_BT.reshape(-1))

    def logits(
        self,
        tokens_BT: Tensor,
        caches: Sequence[LayerCache] | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Return logits (B, T, V), or (B, 1, V) of the last token where ``last_only``.

        With ``caches``, the tokens continue what is in them; where the pass fails, none is added.
        """
        with all_or_none(caches or ()):
            x_BTD = self.model(tokens_BT, caches)
            return self.lm_head(x_BTD[:, -1:] if last_only else x_BTD)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """The normed stream after the last block, (B, T, D): the model without its head."""
        return self.model(tokens_BT)

    def new_caches(self, capacity: int) -> list[LayerCache]:
        """Empty key/value caches for ``capacity`` tokens, one a block."""
        return [LayerCache(capacity) for _ in self.model.layers]

    def max_length(self) -> int | None:
        """Most tokens of a row; None: any number."""
        return self.spec.architecture.max_length(self.spec.architecture_options)

    def tie_head(self) -> None:
        """Make the head the embedding, where the model has it so."""
        if self.spec.shape.tie_embeddings:
            embedding = self.get_parameter("model.embed_tokens.weight")
            self.lm_head.weight = embedding  # type: ignore[assignment]

    def trained(self) -> dict[str, tuple[TensorSpec, Tensor]]:
        """Declaration and parameter of every trained tensor, by its full name."""
        parameters = dict(self.named_parameters())
        return {
            name: (spec, parameters[name])
            for name, spec in self.spec.tensors.items()
            if spec.trained
        }

    def sharded_parts(self) -> Iterator[nn.Module]:
        """The modules to shard one by one, before the whole: the blocks."""
        yield from self.model.blocks()

    def compile_blocks(self, backend: Any = "inductor") -> None:
        """Compile every kind of block, for passes that are differentiated."""
        self._run = CompiledForward(backend)
        self.recompute(self._plan)

    def recompute(self, plan: RecomputePlan) -> None:
        """Keep for the backward pass what ``plan`` says, from now on."""
        self._plan = plan
        plain = functools.partial(run_blocks, run=self._run)
        self.model.runner = plain if plan.is_plain else Recomputation(plan, self._run)

    def fixed_weights(self) -> contextlib.AbstractContextManager[None]:
        """Around the micro-batches of a step: nobody changes a weight meanwhile.

        Casts of weights are kept where autograd would keep them until the backward pass anyhow;
        under a recomputation they would be most of what is alive.
        """
        runner = self.model.runner
        return runner.fixed_weights() if isinstance(runner, Recomputation) else casts_kept()

    def guard_added(self) -> Added:
        """What the guard of recompute invert kept in the latest forward pass beyond its plan."""
        runner = self.model.runner
        return runner.added if isinstance(runner, Recomputation) else {}

    def has_events(self, step: int) -> bool:
        """Whether the parameterization has something due after ``step`` optimizer steps."""
        return bool(list(self.spec.linear.events(step, self.spec.linear_options)))

    def become(self, spec: ModelSpec) -> bool:
        """Be the model that this one is at another step (``ModelSpec.at``): its maps take the
        options, and drop what these no longer declare (``dropped_by``).

        Returns: whether any tensor is gone.
        """
        if spec.linear_options == self.spec.linear_options:
            return False
        spec = dataclasses.replace(self.spec, config=spec.config)  # stored as this one is
        gone = self.dropped_by(spec)
        for mapped, name in gone:
            mapped.register_parameter(name, None)
        for block in self.model.blocks():
            for slot in spec.slots[block.layer_idx]:
                block.maps[slot.position].take(spec.linear_options)
        self.spec = self.model.spec = spec
        return bool(gone)

    def dropped_by(self, spec: ModelSpec) -> list[tuple[nn.Module, str]]:
        """Maps, and names of tensors there, that the model at another step does not have."""
        if spec.linear_options == self.spec.linear_options:
            return []
        found = []
        for block in self.model.blocks():
            for slot in spec.slots[block.layer_idx]:
                mapped, declared = block.maps[slot.position], spec.map_tensors(slot)
                own = [name for name, _ in mapped.named_parameters(recurse=False)]
                found += [(mapped, name) for name in own if name not in declared]
        return found

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Meanwhile every map looks at what it reads (``LinearMap.look``)."""
        maps = [each for block in self.model.blocks() for each in block.maps.values()]
        handles = [each.register_forward_pre_hook(_look) for each in maps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def run_events(self, step: int, seed: int, around: Around = plainly) -> Mapping[str, Forget]:
        """Carry out what the parameterization has due after ``step`` optimizer steps.

        ``around``: around what is done to one map, whose tensors may have to be brought together.
        Returns: by full name, what the optimizer is to forget of a parameter.
        """
        linear, options = self.spec.linear, self.spec.linear_options
        forgets: dict[str, Forget] = {}
        for event in linear.events(step, options):
            for block in self.model.blocks():
                for slot in self.spec.slots[block.layer_idx]:
                    if slot.is_operator:  # it has nothing that an event could change
                        continue
                    name = self.spec.map_name(slot)
                    generator = generator_of(seed, name, f"{event} {step}")
                    mapped = block.maps[slot.position]
                    with around(mapped):
                        for forget in mapped.run_event(event, generator):
                            forgets[f"{name}.{forget.tensor}"] = forget
        return forgets


def _look(linear: Any, inputs: tuple[Tensor, ...]) -> None:
    linear.look(inputs[0])
