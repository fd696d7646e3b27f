"""What follows from a model's configuration, worked out once.

Nothing below takes the configuration apart again: cost, the model, optimizers and checkpoints read
a ``ModelSpec``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from crnet import architectures, linears, streams
from crnet.architectures import Architecture
from crnet.config.adapter import Adapter
from crnet.config.sections import ModelConfig, RunConfig, field_name, options_of
from crnet.linears import Parameterization
from crnet.specs import Position, Read, Shape, Slot, Split, TensorSpec, constant, normal
from crnet.streams import Stream


@dataclass(frozen=True)
class ModelSpec:
    """A model: its sizes, its methods with their options, every slot and every tensor."""

    config: ModelConfig
    """With a vocabulary size."""
    shape: Shape
    architecture: Architecture
    linear: Parameterization
    stream: Stream
    positions: tuple[Position, ...]
    slots: tuple[tuple[Slot, ...], ...]
    """Block by block, in the order of ``positions``."""
    width_multiple: int = 1
    """Feed-forward widths are stored padded with zeros to a multiple of it (``padded``)."""
    held: frozenset[str] | None = None
    """Full names of the tensors that this process has; None: all."""
    part_idx: int = 0
    num_parts: int = 1
    """Which part of the maps is stored, of how many (``in_parts``)."""
    adapter: Adapter | None = None
    """What trains beside the model; its own tensors are frozen then."""

    @property
    def architecture_options(self) -> Any:
        return options_of(self.config, self.architecture.name)

    @property
    def linear_options(self) -> Any:
        return options_of(self.config, self.linear.name)

    @property
    def stream_options(self) -> Any:
        return options_of(self.config, self.stream.name)

    @property
    def num_layers(self) -> int:
        return self.shape.num_layers

    @property
    def num_sublayers(self) -> int:
        return self.num_layers * len(self.architecture.writes)

    @cached_property
    def position_of(self) -> Mapping[str, Position]:
        return {position.name: position for position in self.positions}

    @cached_property
    def slot_of(self) -> Mapping[str, Slot]:
        """By the full name of a map."""
        return {self.map_name(slot): slot for block in self.slots for slot in block}

    @cached_property
    def keeps_activation(self) -> bool:
        """Whether the feed-forward keeps the architecture's activation."""
        return self.linear.keeps_activation(self.shape, self.linear_options)

    @cached_property
    def reads(self) -> tuple[Mapping[str, Read], ...]:
        """Of each block: what its positions read of earlier blocks."""
        options = self.linear_options
        found = []
        for block in self.slots:
            each = {slot.position: self.linear.of(slot).reads(slot, options) for slot in block}
            found.append({name: read for name, read in each.items() if read is not None})
        return tuple(found)

    @cached_property
    def hands(self) -> tuple[tuple[str, ...], ...]:
        """Of each block: positions whose hand-on a later block reads."""
        first = {name for block in self.reads for name, it in block.items() if it.source == "first"}
        found = []
        for idx in range(self.num_layers):
            above = self.reads[idx + 1] if idx + 1 < self.num_layers else {}
            wanted = {name for name, read in above.items() if read.source == "below"}
            wanted |= first if idx == 0 else set()
            found.append(tuple(each.name for each in self.positions if each.name in wanted))
        return tuple(found)

    def map_tensors(self, slot: Slot) -> dict[str, TensorSpec]:
        """The parameters of a slot's map, the bias of its position among them."""
        tensors = self.linear.of(slot).tensors(slot, self.linear_options)
        if self.position_of[slot.position].has_bias:
            bias = TensorSpec((slot.out_size,), "bias", constant(0.0), decays=False)
            tensors = tensors | {"bias": bias}
        return tensors

    def shared_tensors(self, slot: Slot) -> dict[str, TensorSpec]:
        """The parameters that a slot's map shares with the other blocks."""
        return self.linear.of(slot).shared(slot, self.linear_options)

    def shared_name(self, position: str) -> str:
        """Full name of the module with what the maps of a position share."""
        return f"model.shared_tensors.{position}"

    @cached_property
    def shared(self) -> Mapping[str, TensorSpec]:
        """Every tensor that several blocks read, by its full name."""
        return self._shared(self.slots)

    def _shared(self, slots: tuple[tuple[Slot, ...], ...]) -> dict[str, TensorSpec]:
        return {
            f"{self.shared_name(slot.position)}.{name}": spec
            for slot in slots[0]
            for name, spec in self.shared_tensors(slot).items()
        }

    @property
    def pads(self) -> bool:
        """Whether zeros that widen the feed-forward change nothing but its rounding."""
        return self.linear.can_pad(self.linear_options) and self.architecture.pads

    def padded(self, multiple: int) -> ModelSpec:
        """This model, its feed-forward width stored padded with zeros to a multiple.

        Everything it declares stays: tensors, ranks, initial values, costs, checkpoints. Only
        ``stored_slots`` and ``stored_shapes`` are wider.

        Raises:
            ValueError: padding would change what the model computes.
        """
        if multiple > 1 and not self.pads:
            raise ValueError(f"{self.linear.name} in {self.architecture.name} cannot be padded")
        return dataclasses.replace(self, width_multiple=multiple)

    def in_parts(self, part_idx: int, num_parts: int) -> ModelSpec:
        """This model, one part of it stored: of each map the columns or rows that its position
        says (``specs.Position.split``).

        Everything it declares stays, as in ``padded``. Only ``stored_slots`` and
        ``stored_shapes`` are narrower than ``wide_shapes``. A feed-forward width that does not
        divide is padded; that heads do, ``config.check_tensor`` has seen.
        """
        multiple = self.width_multiple
        if multiple > 1 or self.shape.intermediate_size % num_parts:
            multiple *= num_parts
        return dataclasses.replace(
            self, part_idx=part_idx, num_parts=num_parts, width_multiple=multiple
        )

    def split_of(self, slot: Slot) -> Split:
        """How processes share a slot's map. ``config.check_tensor`` has seen that they
        can."""
        found = self.linear.of(slot).split(slot, self.linear_options)
        assert isinstance(found, Split), found
        return found

    @cached_property
    def split_dims(self) -> Mapping[str, int]:
        """By full name, the dimension along which a stored tensor is a part of the whole."""
        shapes, wide = self.stored_shapes, self.wide_shapes
        differing = {
            name: [dim for dim, size in enumerate(shape) if size != wide[name][dim]]
            for name, shape in shapes.items()
        }
        return {name: dim for name, dims in differing.items() for dim in dims}

    @cached_property
    def summed(self) -> tuple[str, ...]:
        """Full names of tensors that every process has whole, and a part of their gradients."""
        if self.num_parts == 1:
            return ()
        of_maps = [name for block in self.slots for slot in block for name in self._summed_by(slot)]
        return (*of_maps, *self.architecture.summed(self.shape, self.architecture_options))

    def _summed_by(self, slot: Slot) -> list[str]:
        split, side = self.split_of(slot), self.position_of[slot.position].split
        names = [f"{self.map_name(slot)}.{name}" for name in split.summed]
        are_summands = side == "columns" or split.at == "edge"
        return [name for name in names if are_summands and name not in self.split_dims]

    @cached_property
    def stored_slots(self) -> tuple[tuple[Slot, ...], ...]:
        """The slots as wide as their maps are in memory."""
        if self.num_parts == 1:
            return self._wide_slots

        def divided(slot: Slot) -> Slot:
            side = self.position_of[slot.position].split
            out_size, in_size = slot.out_size, slot.in_size
            if side == "columns":
                out_size //= self.num_parts
            elif side == "rows":
                in_size //= self.num_parts
            return dataclasses.replace(slot, in_size=in_size, out_size=out_size)

        return tuple(tuple(map(divided, block)) for block in self._wide_slots)

    @cached_property
    def _wide_slots(self) -> tuple[tuple[Slot, ...], ...]:
        """The slots with their padding, undivided."""
        if self.width_multiple == 1:
            return self.slots
        size = -(-self.shape.intermediate_size // self.width_multiple) * self.width_multiple
        wide = dataclasses.replace(self.shape, intermediate_size=size)
        positions = self.architecture.positions(wide, self.architecture_options)
        sizes = {each.name: (each.in_size, each.out_size) for each in positions}

        def stored(slot: Slot) -> Slot:
            in_size, out_size = sizes[slot.position]
            return dataclasses.replace(slot, in_size=in_size, out_size=out_size)

        return tuple(tuple(map(stored, block)) for block in self.slots)

    @cached_property
    def stored_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By full name, the shape that a parameter has in memory."""
        return self._shapes(self.stored_slots)

    @cached_property
    def wide_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By full name, the shape of a parameter in memory if all parts of it were together."""
        return self._shapes(self._wide_slots)

    def _shapes(self, slots: tuple[tuple[Slot, ...], ...]) -> Mapping[str, tuple[int, ...]]:
        shapes = {name: spec.shape for name, spec in self.tensors.items()}
        for block in slots:
            for slot in block:
                owner = self.map_name(slot)
                for name, spec in self.map_tensors(slot).items():
                    shapes[f"{owner}.{name}"] = spec.shape
        return shapes | {name: spec.shape for name, spec in self._shared(slots).items()}

    def map_name(self, slot: Slot) -> str:
        """Full name of a slot's map in the model."""
        return f"model.layers.{slot.layer_idx}.{self.position_of[slot.position].module}"

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every parameter of the model by its full name: the one list of tensors. Of a model whose
        blocks are spread over processes: those that this one has (``held``)."""
        shape = self.shape
        found = {**self.architecture.tensors(shape, self.architecture_options), **self.shared}
        for block in self.slots:
            for slot in block:
                for name, spec in self.map_tensors(slot).items():
                    found[f"{self.map_name(slot)}.{name}"] = spec
        for idx in range(self.num_sublayers + 1):
            block, sublayer = divmod(idx, len(self.architecture.writes))
            is_last = idx == self.num_sublayers
            owner = "last_read" if is_last else f"layers.{block}.streams.{sublayer}"
            around = self.stream.tensors(idx, self.num_sublayers, shape, self.stream_options)
            found |= {f"model.{owner}.{name}": spec for name, spec in around.items()}
        if not shape.tie_embeddings:
            size = (shape.vocab_size, shape.hidden_size)
            found["lm_head.weight"] = TensorSpec(size, "head", normal(shape.init_std))
        factor = self.config.embedding_lr_factor
        for name, spec in found.items():
            if spec.role in ("embedding", "head"):
                found[name] = dataclasses.replace(spec, lr_factor=spec.lr_factor * factor)
        if self.adapter is not None:
            return self.adapter.beside(found, self.slot_of)
        held = self.held
        return found if held is None else {name: found[name] for name in found if name in held}

    def at(self, step: int, num_steps: int) -> ModelSpec:
        """The model after so many steps of a run that began with this one (``model_at``)."""
        return dataclasses.replace(self, config=model_at(self.config, step, num_steps))

    @property
    def is_fixed(self) -> bool:
        """Whether the model is the same one at every step."""
        return type(self.linear).options_at is Parameterization.options_at

    def whole(self) -> ModelSpec:
        """The model with the tensors of every process."""
        return self if self.held is None else dataclasses.replace(self, held=None)


def shape_of(config: ModelConfig) -> Shape:
    """The sizes of a configuration; ``config.vocab_size`` is known."""
    assert config.vocab_size, "the vocabulary size is resolved before a model is described"
    tied = architectures.get(config.architecture).ties_embeddings
    return Shape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads or config.num_heads,
        vocab_size=config.vocab_size,
        rope_theta=config.rope_theta,
        norm_eps=config.norm_eps,
        init_std=config.init_std,
        tie_embeddings=tied if config.tie_embeddings is None else config.tie_embeddings,
        head_size=config.head_size or config.hidden_size // config.num_heads,
    )


def model_at(config: ModelConfig, step: int, num_steps: int) -> ModelConfig:
    """The configuration of a model after ``step`` steps of a run of ``num_steps`` that began with
    this one (``Parameterization.options_at``); itself where nothing changes."""
    linear = linears.get(config.linear)
    was = options_of(config, linear.name)
    options = linear.options_at(step, num_steps, was)
    return (
        config
        if options == was
        else dataclasses.replace(config, **{field_name(linear.name): options})
    )


def config_at(config: RunConfig, step: int) -> RunConfig:
    """The configuration of a run, its model as it is after so many steps."""
    model = model_at(config.model, step, config.train.steps)
    return config if model is config.model else dataclasses.replace(config, model=model)


def model_spec(config: ModelConfig) -> ModelSpec:
    """Work out what a configuration means; ``config.vocab_size`` is known.

    Raises:
        ValueError: a method is unknown, or ``config.rank`` cannot be read.
    """
    shape = shape_of(config)
    architecture = architectures.get(config.architecture)
    linear = linears.get(config.linear)
    positions = architecture.positions(shape, options_of(config, architecture.name))
    slots = linears.make_slots(
        linear, options_of(config, linear.name), shape, positions, config.rank
    )
    stream = streams.get(config.stream)
    return ModelSpec(config, shape, architecture, linear, stream, positions, slots)
