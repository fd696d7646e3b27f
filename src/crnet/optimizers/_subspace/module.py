"""The step of Adam in a subspace. Shapes: M, N sides of a matrix, R rank.

What is passed over is a matrix's memory: its moments are updated and its direction is computed by
one fused call on the projected gradient, and what goes back is added by one product that also
decays the weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.optimizers import Settings, param_groups
from crnet.optimizers._projection import is_right, leading, project
from crnet.optimizers._subspace import offsets
from crnet.optimizers._torch import OneByOne, adam_
from crnet.specs import TensorSpec


class GaloreAdam(OneByOne):
    """Adam with decoupled decay, for what is not projected; a subclass says how dense matrices are.

    State of a tensor: ``step``, a whole number; ``exp_avg`` and ``exp_avg_sq`` in its dtype, of the
    projected gradient where there is one.

    Adam here is that of the GaLore family: ``u = M / (sqrt(S) + eps)``, the bias corrected by the
    rate, ``lr sqrt(1 - beta2^t) / (1 - beta1^t)``, the decay after the step.
    """

    corrects_inside = False
    """Whether the bias is corrected before eps is added, as torch's Adam does."""

    def __init__(
        self,
        parameters: Mapping[str, tuple[TensorSpec, Tensor]],
        options: Any,
        settings: Settings,
    ):
        dense = {name: each for name, each in parameters.items() if each[0].role == "matrix"}
        others = {name: each for name, each in parameters.items() if name not in dense}
        groups = param_groups(dense, settings, projects=True)
        groups += param_groups(others, settings, projects=False)
        self.options, self.settings = options, settings
        super().__init__(groups, {})

    def _step_one(
        self, name: str, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        if group["projects"]:
            self._step_matrix(name, parameter, state, group)
        else:
            self._step_other(parameter, state, group)

    def _step_matrix(
        self, name: str, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        raise NotImplementedError

    def _step_other(
        self, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        """Adam of a tensor that is not projected: ``(W - rate u) (1 - lr decay)``, in one pass."""
        assert parameter.grad is not None
        lost = group["lr"] * group["weight_decay"]
        rate = self._rate(group["lr"], state["step"]) * (1 - lost)
        self._adam(parameter, parameter, parameter.grad, state, rate, lost)

    def _rate(self, lr: float, step: int) -> float:
        if self.corrects_inside:
            return lr
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        return lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)

    def _direction(self, parameter: Tensor, r: Tensor, state: dict[str, Any]) -> Tensor:
        """Adam's direction of a projected gradient with a minus before it; moves the moments."""
        negative_u = torch.zeros_like(r)
        self._adam(parameter, negative_u, r, state, 1.0, 0.0)
        return negative_u

    def _adam(
        self,
        parameter: Tensor,
        target: Tensor,
        gradient: Tensor,
        state: dict[str, Any],
        rate: float,
        lost: float,
    ) -> None:
        """Move the moments of a parameter's gradient, or of its projection; and ``target`` by
        ``rate``, when it has lost a share."""
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        adam_(
            target,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            rate=rate,
            lost=lost,
            betas=(self.settings.beta1, self.settings.beta2),
            eps=self.settings.eps,
            step=state["step"] if self.corrects_inside else math.inf,
        )


class SubspaceAdam(GaloreAdam):
    """Dense matrices in a subspace. As it stands: GaLore.

    State as of ``GaloreAdam``, and of a dense matrix ``projection`` (R, min(M, N)).
    """

    def __init__(
        self,
        parameters: Mapping[str, tuple[TensorSpec, Tensor]],
        options: Any,
        settings: Settings,
    ):
        super().__init__(parameters, options, settings)
        dense = [name for name, (spec, _) in parameters.items() if spec.role == "matrix"]
        self.offsets = offsets(dense, options.refresh_every) if options.stagger else {}

    # --- what a method may say otherwise ---

    def _refreshed(self, name: str, g_MN: Tensor, state: dict[str, Any]) -> Tensor:
        """The projection from this step on, dtype of G. ``state`` still has the former one."""
        return leading(g_MN, min(self.options.rank, *g_MN.shape))

    def _projected(self, name: str, g_MN: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The projection of this step, and the gradient in it."""
        if self._is_due(name, state["step"]):
            state["projection"] = self._refreshed(name, g_MN, state)
        return state["projection"], project(g_MN, state["projection"])

    def _step_matrix(
        self, name: str, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        g_MN = parameter.grad
        assert g_MN is not None
        p_RN, r = self._projected(name, g_MN, state)
        negative_u = self._direction(parameter, r, state)
        kept = 1 - group["lr"] * group["weight_decay"]
        rate = self._rate(group["lr"], state["step"]) * self.options.scale
        add_back(parameter, negative_u, p_RN, kept, rate * kept)

    # --- shared ---

    def _is_due(self, name: str, step: int) -> bool:
        """Whether a matrix gets a new projection at a step, counted from 1."""
        return step == 1 or (step - 1) % self.options.refresh_every == self.offsets.get(name, 0)


def add_back(w_MN: Tensor, r: Tensor, p_RN: Tensor, kept: float, rate: float) -> None:
    """``W <- kept W + rate back(R)``, one product in place."""
    left, right = (r, p_RN) if is_right(tuple(w_MN.shape)) else (p_RN.T, r)
    w_MN.addmm_(left, right, beta=kept, alpha=rate)
