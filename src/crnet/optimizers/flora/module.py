"""Flora's step. Shapes: M, N sides of a matrix, R rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.errors import ConfigError
from crnet.optimizers import Settings, param_groups
from crnet.optimizers._norms import root_mean_square, squares_over
from crnet.optimizers._projection import gaussian, is_right, project, project_back, seed_of
from crnet.optimizers._torch import OneByOne
from crnet.specs import TensorSpec

TINY = 1e-30
"""Added to squares of gradients."""
LEAST_SCALE = 1e-3
"""Of a weight, for a rate that is relative to it."""


class CompressedAdafactor(OneByOne):
    """State of a tensor: ``step``, a whole number; ``exp_avg`` in its dtype, of the projection
    where it is compressed; ``row`` (M) and ``column`` (N) of a matrix, else ``exp_avg_sq``, in
    fp32, for in bf16 a decay near 1 is none; ``projection`` where it is kept.

    Raises:
        ConfigError: beta1 is 0: there is no momentum to compress.
    Cost: two reductions, two passes for q, two products with P, one pass over the weight.
    """

    def __init__(
        self,
        parameters: Mapping[str, tuple[TensorSpec, Tensor]],
        options: Any,
        settings: Settings,
    ):
        if settings.beta1 == 0:
            raise ConfigError(
                "--optimizer.beta1 is 0, and momentum is all that --optimizer.name flora "
                "compresses; take a beta1 above 0"
            )
        narrow = {name: each for name, each in parameters.items() if options.compresses(each[0])}
        others = {name: each for name, each in parameters.items() if name not in narrow}
        groups = param_groups(narrow, settings, compresses=True)
        groups += param_groups(others, settings, compresses=False)
        self.options, self.settings = options, settings
        super().__init__(groups, {})

    def _step_one(
        self, name: str, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        gradient = parameter.grad
        assert gradient is not None
        q = _direction(gradient, state)
        d = self._compressed(name, q, state) if group["compresses"] else self._whole(q, state)
        share = 1 / root_mean_square(d).clamp_(min=1)
        if self.options.scale_parameter:
            share *= root_mean_square(parameter).clamp_(min=LEAST_SCALE)
        if lost := group["lr"] * group["weight_decay"]:
            parameter.mul_(1 - lost)
        parameter.addcmul_(d, share.to(d.dtype), value=-group["lr"])

    def _whole(self, q: Tensor, state: dict[str, Any]) -> Tensor:
        """The direction of a tensor whose momentum has its own shape."""
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(q)
        return state["exp_avg"].lerp_(q, 1 - self.settings.beta1)

    def _compressed(self, name: str, q_MN: Tensor, state: dict[str, Any]) -> Tensor:
        """The direction of a dense matrix; its momentum moves, into another projection if due."""
        beta1, shape = self.settings.beta1, tuple(q_MN.shape)
        idx, every = state["step"] - 1, self.options.refresh_every
        p_RN = state.get("projection")
        if p_RN is None:
            p_RN = self._projection(name, q_MN, idx // every, state)
        r = project(q_MN, p_RN)
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(r)
        former = state["exp_avg"]
        if state["step"] % every == 0:
            new_RN = self._projection(name, q_MN, state["step"] // every, state)
            state["exp_avg"] = project(project_back(former, p_RN, shape), new_RN)
            r = project(q_MN, new_RN)
        left, right = (former, p_RN) if is_right(shape) else (p_RN.T, former)
        d_MN = q_MN.addmm_(left, right, beta=1 - beta1, alpha=beta1)  # q is this step's own
        state["exp_avg"].lerp_(r, 1 - beta1)
        return d_MN

    def _projection(self, name: str, q_MN: Tensor, idx: int, state: dict[str, Any]) -> Tensor:
        seed = seed_of(self.settings.seed, name, idx)
        p_RN = gaussian(tuple(q_MN.shape), self.options.rank, seed, q_MN.device, q_MN.dtype)
        if self.options.projection == "kept":
            state["projection"] = p_RN
        return p_RN


def _direction(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """Adafactor's, whose second moments move. Its dtype is the gradient's."""
    wide, weight = torch.promote_types(gradient.dtype, torch.float32), state["step"] ** -0.8
    if gradient.dim() != 2:
        second = gradient.to(wide).square().add_(TINY)
        state["exp_avg_sq"] = state.get("exp_avg_sq", second).lerp(second, weight)
        return gradient * state["exp_avg_sq"].rsqrt().to(gradient.dtype)
    for side, key in enumerate(("row", "column")):
        squares = squares_over(gradient, 1 - side).view(-1)
        mean = squares.div_(gradient.shape[1 - side]).add_(TINY)
        state[key] = state.get(key, mean).lerp(mean, weight)
    row, column = state["row"], state["column"]
    of_rows = (row / row.mean()).rsqrt_().to(gradient.dtype)
    return (gradient * of_rows[:, None]).mul_(column.rsqrt().to(gradient.dtype))
