"""The hooks that update a parameter once its gradient is there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from crnet.optimizers import OptimizerMethod
from crnet.optimizers._composed import decay, pairs_of
from crnet.optimizers._fused_backward import updated_at_once
from crnet.optimizers._torch import passes_over
from crnet.specs import TensorSpec

Parameters = Mapping[str, tuple[TensorSpec, Tensor]]
"""Trained ones, by full name."""


@dataclass
class _Unit:
    """What is updated at once."""

    tensors: tuple[Tensor, ...]
    members: list[dict[str, list[Any]]]
    """Of each of the optimizer's groups: its share of the unit."""
    decays: bool
    """Whether the product of its two factors does."""


class FusedBackward:
    """An optimizer whose steps are taken inside the last backward pass of every step.

        fused.updating(loss_sum)   around that backward pass
        fused.norm(parameters)     afterwards
        fused.finish()             the update of what is left

    Args:
        method: of ``optimizer``.
        optimizer: whole parameters, none split over processes. Its groups have their rates before
            the backward pass begins. Groups and state stay those of ordinary steps.
        parameters: all that it trains.
        composed_decay: weight decay of products of factors; 0: none.
        on_host: whether the host reads every norm before its update; False: the device decides, and
            nothing waits, with an optimizer that can pass over a step. None: on a CPU, or with
            another optimizer, or where products decay.
    Cost: a norm and a call of ``optimizer.step`` a parameter, which looks at its own group members
        alone.
    """

    def __init__(
        self,
        method: OptimizerMethod,
        optimizer: Optimizer,
        parameters: Parameters,
        *,
        composed_decay: float = 0.0,
        on_host: bool | None = None,
    ):
        specs = {name: spec for name, (spec, _) in parameters.items()}
        tensors = {name: tensor for name, (_, tensor) in parameters.items()}
        decaying = pairs_of(specs) if composed_decay else {}
        self.optimizer, self.composed_decay = optimizer, composed_decay
        device = next(iter(tensors.values())).device
        if on_host is None:
            on_host = device.type == "cpu" or not passes_over(optimizer) or composed_decay > 0
        self._device, self._on_host = device, on_host
        self._pairs = [(tensors[one], tensors[other]) for one, other in decaying.items()]
        self._name_of = {tensor: name for name, tensor in tensors.items()}
        self._unit_of: dict[Tensor, _Unit] = {}
        members = _Members(optimizer)
        for names in updated_at_once(method, specs, bool(composed_decay)):
            of_unit = tuple(tensors[name] for name in names)
            made = _Unit(of_unit, members.of(of_unit), names[0] in decaying)
            self._unit_of |= dict.fromkeys(of_unit, made)
        self._hooks = [
            tensor.register_post_accumulate_grad_hook(self._arrived) for tensor in self._unit_of
        ]
        self._is_on = False
        self._begin(torch.zeros((), device=device))

    def remove(self) -> None:
        """Let go of the parameters: gradients stay again until somebody uses them."""
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def updating(self, loss_sum: Tensor) -> Iterator[None]:
        """Around the backward pass whose gradients are the step's. Nothing is updated where the
        loss is not finite, nor from the first gradient on that is not.

        ``loss_sum``: of the whole batch, 0-d.
        """
        self._begin(loss_sum)
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Norm of the whole gradient, 0-d: that of ``Engine.norm``, to the bit, for the root of a
        number's square is the number."""
        found = (self._norms.get(each, each.grad) for each in parameters)
        return get_total_norm([each for each in found if each is not None])

    def has_begun(self) -> bool:
        """Whether the latest backward pass has changed a weight. On a GPU this waits."""
        return self._first is not None and (self._on_host or not bool(self._first))

    def finish(self) -> None:
        """Update what waits, and what the last backward pass did not reach; the optimizer counts
        the step. Not to be called where ``norm`` is not finite, if the host has decided."""
        left = [pair for pair in self._pairs if not all(map(self._is_updated, pair))]
        decay(left, self.optimizer, self.composed_decay)
        self._step()

    # --- in the backward pass ---

    def _begin(self, loss_sum: Tensor) -> None:
        self._norms: dict[Tensor, Tensor] = {}
        """Of the gradients that came."""
        self._updated: set[Tensor] = set()
        self._first: Any = None
        """Whether the first update was passed over; None: there was none."""
        self._is_finite = True
        self._found_inf = torch.zeros((), device=self._device)
        self._look(loss_sum)

    def _look(self, number: Tensor) -> None:
        if self._on_host:
            self._is_finite = self._is_finite and math.isfinite(number.item())
        else:
            self._found_inf = torch.maximum(self._found_inf, (~torch.isfinite(number)).float())

    def _is_updated(self, parameter: Tensor) -> bool:
        return parameter in self._updated

    def _arrived(self, parameter: Tensor) -> None:
        """A gradient is whole."""
        if not self._is_on:
            return
        if parameter in self._norms:
            raise RuntimeError(
                f"the gradient of {self._name_of[parameter]} came twice in one backward pass: its "
                "first part would be a step of its own; --optimizer.fused-backward wants one "
                "backward pass without another inside it"
            )
        assert parameter.grad is not None
        self._norms[parameter] = norm = _norm(parameter.grad)
        self._look(norm)
        unit = self._unit_of[parameter]
        if not all(each in self._norms for each in unit.tensors):
            return
        if self._is_finite:
            self._update(unit)
        for each in unit.tensors:
            each.grad = None

    def _update(self, unit: _Unit) -> None:
        """The optimizer's step of one unit: its groups have no other members meanwhile."""
        whole = self.optimizer.param_groups
        self.optimizer.param_groups = [
            {**group, **members} for group, members in zip(whole, unit.members, strict=True)
        ]
        try:
            if unit.decays:
                decay([(unit.tensors[0], unit.tensors[1])], self.optimizer, self.composed_decay)
            self._step()
        finally:
            self.optimizer.param_groups = whole
        self._first = self._found_inf if self._first is None else self._first
        self._updated.update(unit.tensors)

    def _step(self) -> None:
        if self._on_host:
            self.optimizer.step()
            return
        optimizer: Any = self.optimizer
        optimizer.found_inf, optimizer.grad_scale = self._found_inf, None
        try:
            optimizer.step()
        finally:
            optimizer.found_inf = None


def _norm(gradient: Tensor) -> Tensor:
    """As ``get_total_norm`` takes it of each tensor, in a fifth of the time."""
    if gradient.is_cuda:
        of_each = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
        return of_each([gradient])[0]
    return torch.linalg.vector_norm(gradient)


class _Members:
    """Where each parameter is in an optimizer's groups."""

    def __init__(self, optimizer: Optimizer):
        self._groups = optimizer.param_groups
        self._places = {
            each: (at, idx)
            for at, group in enumerate(self._groups)
            for idx, each in enumerate(group["params"])
        }

    def of(self, tensors: Sequence[Tensor]) -> list[dict[str, list[Any]]]:
        """Of each group: those of the tensors that are in it, and their names."""
        keys = ("params", "names")
        found = [{key: [] for key in keys if key in group} for group in self._groups]
        for at, idx in sorted(self._places[each] for each in tensors):
            for key, values in found[at].items():
                values.append(self._groups[at][key][idx])
        return found
