"""The package's maps in somebody else's model: those of a transformers LLaMA, replaced in place.

The model's own code stays as it is. A map that reads an earlier block (CR-Net, LaX, ...) gets its
carry without it: what a block hands on travels with the hidden state that leaves the block, as an
attribute of that tensor, and the next block finds it there. So it lives as long as that tensor
does. Nothing is held after a pass, a pass that fails leaves nothing behind, passes do not mix, and
a checkpointed block, which autograd runs once more on the very tensor that it kept, finds its
carries again.

Refused: a store of latest outputs in the model. It has to know when a pass ends, mixes two passes
before one backward, and has lost the first blocks' outputs by the time a checkpoint runs again.

Shapes: B batch, T tokens, D input width, F output width.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from crnet import architectures, linears, streams
from crnet.config import defaults
from crnet.config.check import spec_problems
from crnet.config.model_spec import ModelSpec, shape_of
from crnet.config.sections import ModelConfig, field_name, options_of
from crnet.config.serialize import build as read_options
from crnet.errors import ConfigError
from crnet.layers.projector import with_bias
from crnet.linears._maps import LinearMap, SharedTensors, dtype_of
from crnet.model.build import initial_value, map_values
from crnet.specs import Position, Slot, TensorSpec

Model = TypeVar("Model", bound=nn.Module)

LATENTS = "self_attn.kv_a_proj_with_mqa"
"""A map of latent attention: of another layout."""
_FRAME = "_crnet_frame"
"""Attribute of a hidden state."""


def convert_linears(
    model: Model,
    linear: str = defaults.LINEAR,
    *,
    rank: str | int = "0.25h",
    seed: int = 0,
    keep_weights: bool = False,
    **options: Any,
) -> Model:
    """Replace the seven linear maps of every block by fresh maps of a parameterization, in place.

    Args:
        model: a transformers LLaMA, or another model of its layout (Mistral, Qwen2, Qwen3): blocks
            at ``model.layers`` with ``self_attn.q_proj`` ... ``mlp.down_proj``, each an
            ``nn.Linear``. Convert it before it is wrapped and before the optimizer is made.
        linear: ``--model.linear``.
        rank: ``--model.rank``.
        seed: of the initial values, which are those of the package's own model of this seed.
        keep_weights: a map that has a dense matrix gets the one that was there (``lora``: frozen,
            below its update), instead of a fresh one.
        options: of the parameterization, ``beta_init=0.5``.
    Returns:
        The same model. Parameters have the names of the package's own model. Its code is
        transformers': ``generate``, ``Trainer``, activation checkpointing and ``save_pretrained``
        work. To read what was saved, make the model, convert it with the same arguments, and
        ``load_state_dict``.
    Raises:
        ConfigError: the model has another layout, or the parameterization cannot be had.
    Cost: the new maps beside one old map at a time.
    """
    blocks = _blocks_of(model)
    if _submodule(blocks[0], LATENTS) is not None:
        raise ConfigError(
            f"{type(model).__name__}: its attention makes keys and values of a latent ({LATENTS}), "
            "and convert_linears knows LLaMA's seven maps; train a model of the package's own "
            "instead (crnet list names the architectures)"
        )
    spec = _spec(model, blocks, linear, str(rank), options)
    if problem := _problem(spec, keep_weights):
        raise ConfigError(problem)
    shared = _share(model, blocks, spec, seed)
    for block, slots in zip(blocks, spec.slots, strict=True):
        for slot in slots:
            _replace(block, spec, slot, seed, keep_weights)
            if slot.position in shared:
                _map_of(block, spec, slot).share(shared[slot.position])
    if not spec.keeps_activation:
        for block in blocks:
            block.mlp.act_fn = nn.Identity()
    if any(spec.reads):
        for idx, block in enumerate(blocks):
            _connect(block, idx, spec)
    return model


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Trained parameters as groups for a torch optimizer, at the rates that training has.

    Args:
        model: the package's own, or one that ``convert_linears`` changed.
        lr: base rate; a group's is its share of it (low-rank factors: a quarter).
        weight_decay: of matrices; norms, gains and biases have none.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    declared = _declarations(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spec = declared.get(name)
        factor, decays = (spec.lr_factor, spec.decays) if spec else (1.0, parameter.ndim > 1)
        usual = {"params": [], "lr": lr * factor, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((factor, decays), usual)["params"].append(parameter)
    return list(groups.values())


def _declarations(model: nn.Module) -> Mapping[str, TensorSpec]:
    own = getattr(model, "spec", None)
    if isinstance(own, ModelSpec):
        return own.tensors
    return {
        f"{path}.{name}": spec
        for path, module in model.named_modules()
        if isinstance(module, (_InPlace, SharedTensors))
        for name, spec in module.declared.items()
    }


# What is there


def _blocks_of(model: nn.Module) -> list[Any]:
    """The decoder's blocks. Raises ``ConfigError`` where there are none of LLaMA's layout."""
    holder = getattr(model, "model", model)
    blocks = getattr(holder, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise ConfigError(
            f"{type(model).__name__}: has no blocks at model.layers; give a transformers LLaMA, or "
            "a model of its layout, before it is wrapped (DDP, PEFT, ...)"
        )
    return list(blocks)


def _positions(blocks: Sequence[nn.Module], wanted: Sequence[Position]) -> tuple[Position, ...]:
    """LLaMA's positions at the sizes of these blocks. Raises ``ConfigError`` with every map that is
    missing, no plain ``nn.Linear``, or of another size than in the first block."""
    found, problems = [], []
    for position in wanted:
        sizes = set()
        for idx, block in enumerate(blocks):
            module = _submodule(block, position.module)
            where = f"block {idx + 1}, {position.module}"
            if isinstance(module, LinearMap):
                problems.append(f"{where}: is a {type(module).__name__} already; convert once")
            elif type(module) is not nn.Linear:
                kind = "missing" if module is None else f"a {type(module).__name__}"
                problems.append(f"{where}: is {kind}; wanted is an nn.Linear")
            elif module.weight.device.type == "meta":
                problems.append(f"{where}: is on meta; give the model memory first (to_empty)")
            else:
                sizes.add((module.in_features, module.out_features, module.bias is not None))
        if len(sizes) == 1:
            in_size, out_size, has_bias = sizes.pop()
            sized = {"in_size": in_size, "out_size": out_size, "has_bias": has_bias}
            found.append(dataclasses.replace(position, **sized))
        elif sizes:
            problems.append(f"{position.module}: has other sizes in some blocks than in others")
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def _submodule(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


def _spec(
    model: nn.Module, blocks: Sequence[Any], linear: str, rank: str, options: Mapping[str, Any]
) -> ModelSpec:
    """The package's own description of the model. Raises ``ConfigError`` where it has none."""
    config = _config(model, blocks, linear, rank, options)
    shape, method = shape_of(config), linears.get(config.linear)
    architecture = architectures.get(config.architecture)
    wanted = architecture.positions(shape, options_of(config, architecture.name))
    positions = _positions(blocks, wanted)
    try:
        slots = linears.make_slots(method, options_of(config, linear), shape, positions, rank)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    stream = streams.get(config.stream)
    return ModelSpec(config, shape, architecture, method, stream, positions, slots)


def _config(
    model: Any, blocks: Sequence[Any], linear: str, rank: str, options: Mapping[str, Any]
) -> ModelConfig:
    """The model's own sizes under the package's names."""
    if linear not in linears.names():
        raise ConfigError(f"linear is {linear!r}; known are {', '.join(linears.names())}")
    sizes: Any = getattr(model, "config", None)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if missing := [name for name in names if not hasattr(sizes, name)]:
        raise ConfigError(f"{type(model).__name__}: its config has no {', '.join(missing)}")
    given: dict[str, Any] = {}
    if (kind := linears.get(linear).Options) is not None:
        given[field_name(linear)] = read_options(kind, options, f"{linear}.")
    elif options:
        raise ConfigError(f"{linear} has no options; leave {', '.join(options)} out")
    return ModelConfig(
        linear=linear,
        rank=rank,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_layers=len(blocks),
        num_heads=sizes.num_attention_heads,
        num_kv_heads=getattr(sizes, "num_key_value_heads", None),
        head_size=getattr(sizes, "head_dim", None),
        vocab_size=sizes.vocab_size,
        init_std=getattr(sizes, "initializer_range", ModelConfig.init_std),
        **given,
    )


def _problem(spec: ModelSpec, keep_weights: bool) -> list[str]:
    """Why these maps cannot stand in a model that the package does not train."""
    linear = spec.linear
    problems = spec_problems(spec)
    if linear.has_events(spec.linear_options):
        problems.append(
            f"{linear.name} changes its weights and its optimizer's state between steps, which "
            "only the package's own loop does; take another, or crnet train"
        )
    kept = [slot for block in spec.slots for slot in block if "weight" in spec.map_tensors(slot)]
    if keep_weights and not kept:
        problems.append(
            f"keep_weights has no effect: no map of {linear.name} has a dense matrix of its "
            "own; leave it out"
        )
    return problems


# What takes its place


@dataclass
class _Frame:
    """What travels with the hidden state that enters a block."""

    layer_idx: int
    carries: dict[str, Tensor] = field(default_factory=dict)
    """By position: what the block's maps read."""
    first: dict[str, Tensor] = field(default_factory=dict)
    """By position: what the first block handed on to blocks that are to come."""
    handed: dict[str, Tensor] | None = field(default_factory=dict)
    """By position: what the block's maps hand on; None once the block is through."""


def _nothing() -> None:
    """Stands for a reference to a frame that is gone."""


class _InPlace:
    """Beside a map's own class: called like an ``nn.Linear``."""

    declared: Mapping[str, TensorSpec]
    position: str
    reads_below: bool
    """Whether it has a carry."""
    is_read: bool
    """Whether a later block reads it."""
    frame: Any = staticmethod(_nothing)
    """A weak reference to the frame of the block's latest pass."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Output of the map, (B, T, F), its bias added."""
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "converted maps do not run under DataParallel; take DistributedDataParallel"
            )
        own = cast("LinearMap", self)
        frame: _Frame | None = self.frame()
        carry = frame.carries.get(self.position) if frame is not None else None
        if carry is None and self.reads_below:
            raise RuntimeError(
                f"the map {self.position} reads an earlier block, and nothing has come from there: "
                "blocks have to be called in turn, each with the hidden state that the one below "
                "returned. Activation checkpointing wants use_reentrant=False; fully_shard goes "
                "around a block's self_attn and mlp, and not around the block; hooks that copy "
                "hidden states (device_map, offloading) are not supported"
            )
        output, handed = own.run(x_BTD, carry, None)
        if self.is_read and frame is not None and frame.handed is not None:
            frame.handed[self.position] = handed
        if own.carry_dtype is not None:
            output = output.to(x_BTD.dtype)
        return with_bias(own, output)

    def __reduce__(self) -> Any:
        state = {key: value for key, value in vars(self).items() if key != "frame"}
        return _bare, (type(self).__bases__[1],), state


@functools.cache
def _in_place(kind: type) -> type:
    """The class of maps of that kind that are called like an ``nn.Linear``."""
    return type(kind.__name__, (_InPlace, kind), {"__module__": kind.__module__})


def _bare(kind: type) -> nn.Module:
    """For pickle: an object of ``_in_place(kind)`` without its state."""
    made: Any = _in_place(kind)
    return made.__new__(made)


@torch.no_grad()
def _share(
    model: nn.Module, blocks: Sequence[nn.Module], spec: ModelSpec, seed: int
) -> dict[str, SharedTensors]:
    """Put what blocks share into the model, filled, beside its blocks; by position."""
    found = {}
    for slot in spec.slots[0]:
        declared, owner = spec.shared_tensors(slot), spec.shared_name(slot.position)
        if not declared:
            continue
        found[slot.position] = made = SharedTensors(declared)
        old = cast("nn.Linear", _map_of(blocks[0], spec, slot))
        for name, tensor in declared.items():
            value = initial_value(spec, seed, f"{owner}.{name}")
            value = value.to(old.weight.device, dtype_of(tensor, old.weight.dtype))
            made.register_parameter(name, nn.Parameter(value, requires_grad=tensor.trained))
    if found:
        holder = cast("nn.Module", getattr(model, "model", model))
        holder.add_module("shared_tensors", nn.ModuleDict(found))
    return found


def _map_of(block: nn.Module, spec: ModelSpec, slot: Slot) -> Any:
    return block.get_submodule(spec.position_of[slot.position].module)


@torch.no_grad()
def _replace(block: nn.Module, spec: ModelSpec, slot: Slot, seed: int, keep_weights: bool) -> None:
    """Put a filled map in the place of an ``nn.Linear``, on its device and in its dtype."""
    parent, _, name = spec.position_of[slot.position].module.rpartition(".")
    holder = block.get_submodule(parent)
    old = cast("nn.Linear", getattr(holder, name))
    made, declared = spec.linear.make(slot, spec.linear_options), spec.map_tensors(slot)
    values = map_values(spec, seed, slot)
    if keep_weights and "weight" in values:
        values["weight"] = old.weight.detach()
    for own_name, tensor in declared.items():
        dtype = dtype_of(tensor, old.weight.dtype)
        value = values[own_name].to(old.weight.device, dtype, copy=True)
        made.register_parameter(own_name, nn.Parameter(value, requires_grad=tensor.trained))
    made.__class__ = _in_place(type(made))
    own = cast("_InPlace", made)
    own.declared, own.position = declared, slot.position
    own.reads_below = slot.position in spec.reads[slot.layer_idx]
    own.is_read = slot.position in spec.hands[slot.layer_idx]
    setattr(holder, name, made.train(old.training))


# What travels


def _connect(block: nn.Module, idx: int, spec: ModelSpec) -> None:
    """Hook a block: its frame is found when its first norm is called, also where a checkpoint runs
    it again, and the next block's frame is made when it returns."""
    maps = [block.get_submodule(position.module) for position in spec.positions]
    if idx == 0:
        block.register_forward_pre_hook(_begin, with_kwargs=True)
    norm = cast("nn.Module", block.input_layernorm)
    norm.register_forward_pre_hook(_Enter(idx, maps))
    next_one = spec.reads[idx + 1] if idx + 1 < spec.num_layers else {}
    above = {position: read.source for position, read in next_one.items()}
    later = {
        position
        for reads in spec.reads[idx + 2 :]
        for position, read in reads.items()
        if read.source == "first"
    }
    block.register_forward_hook(_Leave(idx, above, later), with_kwargs=True)


def _hidden_state(args: tuple[Any, ...], keys: Mapping[str, Any]) -> Tensor:
    return args[0] if args else keys["hidden_states"]


def _begin(block: nn.Module, args: tuple[Any, ...], keys: dict[str, Any]) -> None:
    """A new pass reaches the first block."""
    setattr(_hidden_state(args, keys), _FRAME, _Frame(0))


@dataclass
class _Enter:
    """Before the first norm of a block."""

    layer_idx: int
    maps: list[nn.Module]

    def __call__(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        frame = getattr(args[0], _FRAME, None)
        is_own = frame is not None and frame.layer_idx == self.layer_idx
        for each in self.maps:
            cast("_InPlace", each).frame = weakref.ref(frame) if is_own else _nothing


@dataclass
class _Leave:
    """After a block."""

    layer_idx: int
    above: dict[str, str]
    """Of the next block: by position, the source that it reads."""
    later: set[str]
    """Positions of the first block that blocks beyond the next one read."""

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], keys: dict[str, Any], output: Any
    ) -> None:
        frame: _Frame | None = getattr(_hidden_state(args, keys), _FRAME, None)
        if frame is None or frame.layer_idx != self.layer_idx or frame.handed is None:
            return
        handed, frame.handed = frame.handed, None
        known = {"below": handed, "first": handed if self.layer_idx == 0 else frame.first}
        carries = {
            position: known[source][position]
            for position, source in self.above.items()
            if position in known[source]
        }
        first = {name: known["first"][name] for name in self.later if name in known["first"]}
        if not torch.is_grad_enabled():  # nobody runs this block again
            frame.carries, frame.first = {}, {}
        state = output[0] if isinstance(output, tuple) else output
        setattr(state, _FRAME, _Frame(self.layer_idx + 1, carries, first))
