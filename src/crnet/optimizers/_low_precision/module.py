"""An optimizer that works in fp32 on bf16 parameters.

Every parameter has a stand-in, and the method's own optimizer knows the stand-ins alone. For a step
they are lent values, gradients and state in the dtype that the work is done in; afterwards
parameters and state take back what has become of them, rounded. Nobody outside sees them: groups
and state are those of the model's parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from crnet.errors import ConfigError
from crnet.optimizers import MASTER, _torch
from crnet.optimizers._torch import loss_of
from crnet.specs import TensorSpec

ITEMS_AT_ONCE = 1 << 24
"""Parameters that are lent in fp32 at a time, unless one alone has more: what a step allocates
beside the state is 8 (masters) to 20 (stochastic) bytes for each."""

Treatment = Literal["own", "master", "stochastic"]
"""``own``: the work is done on the parameter itself, in its dtype. ``master``: on an fp32 copy that
stays. ``stochastic``: on fp32 copies of parameter and state that are rounded after the step."""

State = dict[str, Any]


@dataclass
class _Lent:
    """A parameter and its stand-in."""

    name: str
    parameter: Tensor
    stand_in: nn.Parameter
    treatment: Treatment
    master: Tensor | None
    """The stand-in's values, where they stay between steps."""

    @property
    def num_items(self) -> int:
        """That a step allocates fp32 copies of."""
        return 0 if self.treatment == "own" else self.parameter.numel()


class LowPrecision(_torch.Optimizer):
    """A method's optimizer behind stand-ins.

    Groups and state are the method's, with the model's parameters in them; the state has one more
    entry, ``MASTER``, where there is one. Under ``stochastic`` a state tensor has, between two
    steps, the dtype that the method would give it for a bf16 parameter.

    Args:
        build: makes the method's optimizer of its parameters by full name.
        parameters: the trained ones, by full name.
        treatments: of each of them.
        at_once: full names of those that one call of the method's step is to have together.
        seed: of the run. Random bits come from (seed, full name, step) and are those of the
            parameter's device, whatever the number of ranks that each hold all of it.
    Raises:
        ConfigError: ``stochastic`` with parameters that are split over ranks.
    """

    def __init__(
        self,
        build: Callable[[Mapping[str, tuple[TensorSpec, Tensor]]], Optimizer],
        parameters: Mapping[str, tuple[TensorSpec, Tensor]],
        treatments: Mapping[str, Treatment],
        at_once: Sequence[tuple[str, ...]],
        seed: int,
    ):
        self._seed = seed
        lent = {
            name: _lent(name, parameter, treatments[name])
            for name, (_, parameter) in parameters.items()
        }
        self._inner = build(
            {name: (spec, lent[name].stand_in) for name, (spec, _) in parameters.items()}
        )
        of_stand_in = {each.stand_in: each for each in lent.values()}
        self._stand_ins = {each.parameter: each.stand_in for each in lent.values()}
        groups = [
            {**group, "params": [of_stand_in[each].parameter for each in group["params"]]}
            for group in self._inner.param_groups
        ]
        super().__init__([{**group, "num_updates": 0} for group in groups], {})
        self._units = [[lent[name] for name in unit] for unit in at_once]
        self._unit_idx = {
            each.parameter: idx for idx, unit in enumerate(self._units) for each in unit
        }
        for each in lent.values():
            state = dict(self._inner.state.pop(each.stand_in, {}))
            if each.master is not None:
                state[MASTER] = each.master
            if state:
                self.state[each.parameter] = state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient; the method's own once a bucket."""
        loss = loss_of(closure)
        for group in self.param_groups:
            group["num_updates"] += 1
        self._hand_groups()
        for bucket in self._buckets():
            dtypes = self._dtypes(bucket)
            for each in bucket:
                self._lend(each)
            self._inner.step()
            for each in bucket:
                self._take_back(each, dtypes)
        for own, group in zip(self.param_groups, self._inner.param_groups, strict=True):
            own.update({key: value for key, value in group.items() if key != "params"})
        return loss

    def _hand_groups(self) -> None:
        for own, group in zip(self.param_groups, self._inner.param_groups, strict=True):
            stand_ins = [self._stand_ins[each] for each in own["params"]]
            group.update({**own, "params": stand_ins})

    def _buckets(self) -> Iterator[list[_Lent]]:
        """The parameters of the groups that have a gradient, about ``ITEMS_AT_ONCE`` lent items
        together."""
        bucket, num_items = [], 0
        given = (each for group in self.param_groups for each in group["params"])
        for idx in sorted({self._unit_idx[each] for each in given}):
            unit = self._units[idx]
            lent = [each for each in unit if each.parameter.grad is not None]
            more = sum(each.num_items for each in lent)
            if bucket and num_items + more > ITEMS_AT_ONCE:
                yield bucket
                bucket, num_items = [], 0
            bucket += lent
            num_items += more
        if bucket:
            yield bucket

    def _lend(self, each: _Lent) -> None:
        """Value, gradient and state, in the dtype of the work."""
        parameter, stand_in, state = each.parameter, each.stand_in, dict(self.state[each.parameter])
        if each.master is not None:
            _follow(each.master, parameter, state.pop(MASTER, None))
        elif each.treatment == "stochastic":
            stand_in.data = parameter.detach().float()
            state = _map(state, lambda value: value.float() if _is_bf16(value) else value)
        elif not hasattr(parameter, "device_mesh"):
            stand_in.data = parameter.detach()  # which may have been given other memory
        assert parameter.grad is not None
        stand_in.grad = parameter.grad.to(stand_in.dtype)
        self._inner.state[stand_in] = state

    def _take_back(self, each: _Lent, dtypes: Mapping[Tensor, State]) -> None:
        """The inverse of ``_lend``, rounded."""
        parameter, stand_in = each.parameter, each.stand_in
        state, stand_in.grad = dict(self._inner.state.pop(stand_in, {})), None
        if each.master is not None:
            parameter.copy_(each.master)
            state[MASTER] = each.master
        elif each.treatment == "stochastic":
            generator = self._generator(each)
            parameter.copy_(round_stochastically(stand_in.data, generator))
            wanted = dtypes.get(parameter) or _dtypes(self.state[parameter])
            state = {
                key: _rounded(value, wanted.get(key), generator) for key, value in state.items()
            }
            stand_in.data = _without_memory(parameter)
        self.state[parameter] = state

    def _dtypes(self, bucket: Sequence[_Lent]) -> dict[Tensor, State]:
        """What the method makes of the state of bf16 parameters that have none yet.

        Told by a step on copies, whose result is thrown away.
        """
        new = [
            each
            for each in bucket
            if each.treatment == "stochastic" and not self.state.get(each.parameter)
        ]
        if not new:
            return {}
        for each in new:
            assert each.parameter.grad is not None
            each.stand_in.data = each.parameter.detach().clone()
            each.stand_in.grad = each.parameter.grad.to(each.parameter.dtype)
        self._inner.step()
        found = {}
        for each in new:
            found[each.parameter] = _dtypes(self._inner.state.pop(each.stand_in, {}))
            each.stand_in.grad = None
        self._hand_groups()
        return found

    def _generator(self, each: _Lent) -> torch.Generator:
        """Of one parameter and step, on its device."""
        step = self.param_groups[0]["num_updates"]
        text = "\0".join((str(self._seed), each.name, "rounding", str(step)))
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        return torch.Generator(each.parameter.device).manual_seed(seed)


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """One of the two bf16 numbers around each item of ``x``, so that its expectation is the item.

    Args:
        x: fp32, finite.
        generator: on the device of ``x``; as many numbers are drawn as ``x`` has items.
    Returns: bf16, shape of ``x``; items that are bf16 numbers stay.
    Cost: 4 bytes an item for a moment.
    """
    noise = torch.randint(
        0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator
    )
    # Added below the bits that stay; a carry is a step to the neighbour away from 0.
    bits = noise.add_(x.view(torch.int32)).bitwise_and_(-1 << 16)
    return bits.view(torch.float32).to(torch.bfloat16)


def _lent(name: str, parameter: Tensor, how: Treatment) -> _Lent:
    if how == "stochastic" and hasattr(parameter, "device_mesh"):
        raise ConfigError(
            "--train.bf16-update stochastic does not run on parameters that are split over ranks; "
            "take masters or vectors"
        )
    values = {
        "own": parameter.detach,
        "master": lambda: parameter.detach().float(),
        "stochastic": lambda: _without_memory(parameter),
    }
    stand_in = nn.Parameter(values[how]())
    return _Lent(name, parameter, stand_in, how, stand_in.detach() if how == "master" else None)


def _without_memory(parameter: Tensor) -> Tensor:
    """fp32, of the parameter's shape and device; not to be read."""
    return parameter.new_zeros((), dtype=torch.float32).expand(parameter.shape)


def _follow(master: Tensor, parameter: Tensor, saved: Tensor | None) -> None:
    """Make a master what was loaded, and where the parameter was changed since, the parameter."""
    if saved is not None and saved is not master:
        master.copy_(saved)
    same = parameter == master.to(parameter.dtype)
    master.copy_(torch.where(same, master, parameter.float()))


def _is_bf16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """``change`` of everything inside nested dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change) for item in value)
    return change(value)


def _dtypes(state: State) -> State:
    """The dtype of every tensor, where it stands."""
    return _map(state, lambda value: value.dtype if isinstance(value, Tensor) else None)


def _rounded(value: Any, dtype: Any, generator: torch.Generator) -> Any:
    """State in the dtypes that ``_dtypes`` told."""
    if isinstance(value, dict):
        wanted = dtype or {}
        return {key: _rounded(item, wanted.get(key), generator) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        pairs = zip(value, dtype or [None] * len(value), strict=True)
        return type(value)(_rounded(item, each, generator) for item, each in pairs)
    if dtype == torch.bfloat16 and isinstance(value, Tensor) and value.dtype == torch.float32:
        return round_stochastically(value, generator)
    return value
