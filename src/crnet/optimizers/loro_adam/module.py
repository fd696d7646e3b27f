"""LORO's steps. Shapes: D inputs, F outputs, R rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.optimizers import Settings, param_groups
from crnet.optimizers._paired.module import check_gradients
from crnet.optimizers._sharing import pairs
from crnet.optimizers._torch import Optimizer, adam_, loss_of
from crnet.specs import TensorSpec


class AdamWithExactSteps(Optimizer):
    """State of a tensor: ``exp_avg`` and ``exp_avg_sq`` in its dtype; ``step``, which the bias is
    corrected for, and ``total``, whole numbers."""

    def __init__(
        self,
        parameters: Mapping[str, tuple[TensorSpec, Tensor]],
        options: Any,
        settings: Settings,
    ):
        self.options, self.settings = options, settings
        found = pairs({name: spec for name, (spec, _) in parameters.items()})
        self.pair_of = {
            parameters[name][1]: (pair, tuple(parameters[each][1] for each in pair))
            for pair in found.items()
            for name in pair
        }
        super().__init__(param_groups(parameters, settings), {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every tensor that has a gradient."""
        loss = loss_of(closure)
        group_of = {each: group for group in self.param_groups for each in group["params"]}
        given = [parameter for parameter in group_of if parameter.grad is not None]
        due = {parameter for parameter in given if self._begin(parameter)}
        taken = set()
        pairs_given = (self.pair_of[each] for each in given if each in self.pair_of)
        for pair, (a_DR, b_RF) in dict.fromkeys(pairs_given):
            check_gradients(pair, [each.grad is not None for each in (a_DR, b_RF)])
            if a_DR in due:
                self._step_pair(a_DR, b_RF, group_of)
                taken |= {a_DR, b_RF}
        for parameter in given:
            if parameter not in taken:
                self._step_one(parameter, group_of[parameter])
        for parameter in due:
            state = self.state[parameter]
            state["step"] = 0
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        return loss

    def _begin(self, parameter: Tensor) -> bool:
        """Count one more step of a tensor; whether it is one of those with an exact step."""
        state = self.state[parameter]
        if not state:
            state["step"] = state["total"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["total"] += 1
        return state["total"] % self.options.exact_every == 0

    def _step_one(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        """Adam, ``(W - rate u) (1 - lr decay)``, in one pass."""
        lost = group["lr"] * group["weight_decay"]
        self._adam(parameter, parameter, self._rate(parameter, group["lr"]) * (1 - lost), lost)

    def _step_pair(
        self, a_DR: Tensor, b_RF: Tensor, group_of: Mapping[Tensor, Mapping[str, Any]]
    ) -> None:
        directions = []
        for parameter in (a_DR, b_RF):
            negative_u = torch.zeros_like(parameter)
            self._adam(parameter, negative_u, 1.0, 0.0)
            directions.append(-negative_u)
        group = group_of[a_DR]
        rate = self._rate(a_DR, group["lr"] / group["lr_factor"])
        made = exact_step(a_DR, b_RF, directions[0], directions[1], rate)
        for parameter, new in zip((a_DR, b_RF), made, strict=True):
            group = group_of[parameter]
            parameter.copy_(new.mul_(1 - group["lr"] * group["weight_decay"]))

    def _rate(self, parameter: Tensor, lr: float) -> float:
        step = self.state[parameter]["step"]
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        return lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)

    def _adam(self, parameter: Tensor, target: Tensor, rate: float, lost: float) -> None:
        state = self.state[parameter]
        assert parameter.grad is not None
        adam_(
            target,
            parameter.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            rate=rate,
            lost=lost,
            betas=(self.settings.beta1, self.settings.beta2),
            eps=self.settings.eps,
            step=math.inf,
        )


def exact_step(
    a_DR: Tensor, b_RF: Tensor, grad_DR: Tensor, grad_RF: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    """Both factors after one Riemannian step of their product, balanced.

    With the factors' gradients the new product hangs on the old product and its gradient alone,
    not on the factors.

    Args:
        a_DR, b_RF: the factors, R at most D and F. Not modified.
        grad_DR, grad_RF: their gradients, ``G B'`` and ``A' G``, or what stands in their place.
        rate: that ``P(G)`` is multiplied with.
    Returns: ``A`` and ``B``, fp32 (fp64 for fp64).
    """
    wide = torch.promote_types(a_DR.dtype, torch.float32)
    a, b, grad_a, grad_b = (each.to(wide) for each in (a_DR, b_RF.T, grad_DR, grad_RF.T))
    rank = a.shape[1]
    u_DR, ra_RR = torch.linalg.qr(a)
    v_FR, rb_RR = torch.linalg.qr(b)
    gv_DR = grad_a @ _inverse(rb_RR)
    gu_FR = grad_b @ _inverse(ra_RR)
    core_RR = gu_FR.T @ v_FR
    q_DR, k_RR = torch.linalg.qr(gv_DR - u_DR @ (u_DR.T @ gv_DR))
    p_FR, l_RR = torch.linalg.qr(gu_FR - v_FR @ core_RR.T)
    small = torch.zeros(2 * rank, 2 * rank, dtype=wide, device=a.device)
    small[:rank, :rank] = ra_RR @ rb_RR.T - rate * core_RR
    small[:rank, rank:] = -rate * l_RR.T
    small[rank:, :rank] = -rate * k_RR
    left, values, right = torch.linalg.svd(small)
    roots = values[:rank].sqrt()
    new_a = torch.cat([u_DR, q_DR], 1) @ (left[:, :rank] * roots)
    new_b = torch.cat([v_FR, p_FR], 1) @ (right[:rank].T * roots)
    return new_a, new_b.T


def _inverse(upper_RR: Tensor) -> Tensor:
    """Inverse of a triangular matrix's transpose, without directions that are 0 but for rounding:
    ``G V = (G B') R^-T'``, B' = V R."""
    eps = torch.finfo(upper_RR.dtype).eps * len(upper_RR)
    return torch.linalg.pinv(upper_RR, rtol=eps)
