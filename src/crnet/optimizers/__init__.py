"""The seam of the optimizers. One file is one family; ``METHODS`` in it lists what it offers.

The declarations import no torch until they are asked to build, so that listing and costing them
costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crnet.registry import discover, find
from crnet.specs import Forget, TensorSpec

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch.optim import Optimizer


MASTER = "master"
"""Entry of a state: the fp32 values that a bf16 parameter is rounded from (``_low_precision``)."""


@dataclass(frozen=True)
class Settings:
    """What every optimizer is told."""

    lr: float
    """Peak learning rate."""
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    seed: int
    """Of the run: with a parameter's name and the step, it seeds every random number."""
    num_steps: int | None = None
    """Of the run, for what is due after a share of them; None: not known."""


class OptimizerMethod:
    """What an optimizer answers; a method states only what differs."""

    name: str
    summary: str
    Options: type | None = None
    """A frozen dataclass; its fields become ``--optimizer.NAME.OPTION``."""
    examples: tuple[Any, ...] = ()
    """More ``Options`` that the contract is checked with (``measure.contract``)."""
    tried_lr: float = 2e-2
    """Peak rate at which the contract trains a small model."""
    pads: bool = False
    """Whether zeros that a matrix is filled up with stay, and change no other item's update."""
    steps_pairs: bool = False
    """Whether both factors of a pair (``TensorSpec.partner``) are stepped at once, so that a call
    of ``step`` has the gradients of both, or of neither."""
    has_codes: bool = False
    """Whether moments are codes of numbers, which no event can compare."""

    def problems(self, options: Any) -> list[str]:
        """What is wrong with the options, one sentence each, with the mend."""
        return []

    def state_bytes(self, spec: TensorSpec, options: Any, item_bytes: int) -> int:
        """Bytes of state of one trained tensor after the first step.

        ``item_bytes``: of an item of the tensor itself.
        """
        raise NotImplementedError

    def whole(self, spec: TensorSpec, options: Any) -> bool:
        """Whether a step needs all of a tensor at once, where processes split it.

        True is right for every method, and costs what ``parallel.owners`` says. False: items and
        their states do not hang on one another, so that each process can step its part.
        """
        return True

    def restarts_every(self, options: Any) -> int | None:
        """Steps from one restart of all moments to the next, each of which wants a restart of the
        rate (``Schedule.restarts_every``). None: there are none."""
        return None

    def build(
        self,
        parameters: Mapping[str, tuple[TensorSpec, Tensor]],
        options: Any,
        settings: Settings,
    ) -> Optimizer:
        """The optimizer of the trained parameters, by full name. Each of its ``param_groups`` keeps
        its ``lr_factor``; its state is tensors and numbers (``torch.load(weights_only=True)``).

        In a bf16 run the parameters may be fp32 stand-ins, where processes split them whole ones,
        and ``step`` is called several times a step, each time with the gradients of some of them
        (``_low_precision``, ``parallel.owners``, ``_fused_backward``): it passes over those that
        have none, and what it counts, it counts for each tensor. Its ``param_groups`` may have
        fewer members in a call; it looks at no others. Between two steps it holds no value of a
        parameter.
        """
        raise NotImplementedError


def names() -> list[str]:
    """Every optimizer, sorted."""
    return sorted(discover(__name__, OptimizerMethod))


def get(name: str) -> OptimizerMethod:
    """The optimizer of that name. Raises ``ValueError`` if there is none."""
    return find(__name__, name, OptimizerMethod)


def param_groups(
    parameters: Mapping[str, tuple[TensorSpec, Tensor]], settings: Settings, **more: Any
) -> list[dict[str, Any]]:
    """torch's ``param_groups``: one for each pair of learning-rate factor and decay, in the order
    of the parameters."""
    members: dict[tuple[float, bool], dict[str, Tensor]] = {}
    for name, (spec, tensor) in parameters.items():
        members.setdefault((spec.lr_factor, spec.decays), {})[name] = tensor
    return [
        {
            "params": list(named.values()),
            "names": list(named),
            "lr": settings.lr * lr_factor,
            "lr_factor": lr_factor,
            "weight_decay": settings.weight_decay if decays else 0.0,
            **more,
        }
        for (lr_factor, decays), named in members.items()
    ]


def forget(optimizer: Optimizer, parameter: Tensor, forget: Forget, generator: Generator) -> None:
    """Set a part of an optimizer's state of one parameter to 0, as ``forget`` says.

    Every state tensor of the parameter's shape loses the same items: a first moment without the
    second would be a step of any size. Counters stay, unless it is said that they restart, and what
    else has another shape.

    Args:
        parameter: one that has no state is passed over.
        generator: on the CPU; as many numbers are drawn as the parameter has items, or none.
    Raises:
        ValueError: the largest are to stay, and the state is codes (``OptimizerMethod.has_codes``).
    """
    import torch

    state = optimizer.state.get(parameter, {})
    if forget.restarts and "step" in state:
        state["step"] = state["step"] * 0  # a number, or a tensor that others may hold
    states = [
        value
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.dim() and value.shape == parameter.shape
        if key != MASTER
    ]
    if not states:
        return
    lost: Tensor
    if forget.kept_frac == 0:
        lost = torch.ones(parameter.shape, dtype=torch.bool)
    elif forget.kept == "largest":
        lost = _smallest(states[0], forget.kept_frac)
    else:
        lost = torch.rand(parameter.shape, generator=generator) >= forget.kept_frac
    if forget.indices is not None:
        chosen = torch.zeros(parameter.shape, dtype=torch.bool)
        lost &= chosen.index_fill_(forget.dim, torch.tensor(forget.indices, dtype=torch.long), True)
    lost = lost.to(parameter.device)
    for value in states:
        value.masked_fill_(_split_as(value, lost), 0)


def _smallest(state: Any, kept_frac: float) -> Tensor:
    """Where a state is not among its largest items, so that ``kept_frac`` of them are left; of one
    that is split, the whole of it counts."""
    import torch

    whole = state.full_tensor() if hasattr(state, "device_mesh") else state
    if not whole.is_floating_point():
        raise ValueError("codes of moments cannot be compared across their blocks")
    kept = whole.abs().flatten().topk(round(kept_frac * whole.numel())).indices
    return torch.ones_like(whole, dtype=torch.bool).view(-1).index_fill_(0, kept, 0).view_as(whole)


def _split_as(state: Any, lost: Tensor) -> Tensor:
    """Each rank forgets its own part of a state; all of one that is whole."""
    if not hasattr(state, "device_mesh"):
        return lost
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(lost, state.device_mesh, state.placements, src_data_rank=None)


def take_over(optimizer: Optimizer, former: Optimizer) -> None:
    """Give an optimizer the state that a former one has of the same parameters, and what it counts.

    The former one may have had more parameters: the state of those is left behind, as in a resumed
    run that never had them.
    """
    group_of = {each: group for group in former.param_groups for each in group["params"]}
    for group in optimizer.param_groups:
        was = group_of[group["params"][0]]
        group.update({key: was[key] for key in was if key not in ("params", "names")})
        for parameter in group["params"]:
            if parameter in former.state:
                optimizer.state[parameter] = former.state[parameter]


def load_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Restore what ``optimizer.state_dict()`` gave, every tensor in the dtype that it has there.

    torch's ``load_state_dict`` alone casts a state to the dtype of its parameter: moments in fp32
    of bf16 weights would be rounded, and whole numbers turned into fractions.
    """
    optimizer.load_state_dict(dict(state))
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    indices = [each for group in state["param_groups"] for each in group["params"]]
    for parameter, index in zip(parameters, indices, strict=True):
        if index in state["state"]:
            loaded = optimizer.state[parameter]
            optimizer.state[parameter] = _in_own_dtype(loaded, state["state"][index])


def _in_own_dtype(loaded: Any, saved: Any) -> Any:
    """``loaded``, where torch has left the dtype alone; else ``saved``, on the device of it."""
    import torch

    if isinstance(saved, torch.Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(saved, dict):
        return {key: _in_own_dtype(loaded[key], value) for key, value in saved.items()}
    if isinstance(saved, (list, tuple)):
        return type(saved)(map(_in_own_dtype, loaded, saved))
    return loaded
