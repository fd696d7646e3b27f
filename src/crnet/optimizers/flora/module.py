"""Flora's step. Shapes: M, N sides of a matrix, R rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.errors import ConfigError
from crnet.optimizers import Settings, param_groups
from crnet.optimizers._projection import gaussian, is_right, project, project_back, seed_of
from crnet.optimizers._torch import Optimizer, loss_of
from crnet.specs import TensorSpec

TINY = 1e-30
"""Added to squares of gradients."""
LEAST_SCALE = 1e-3
"""Of a weight, for a rate that is relative to it."""


class CompressedAdafactor(Optimizer):
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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every tensor that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    self._step_one(name, parameter, group)
        return loss

    def _step_one(self, name: str, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        state["step"] = state.get("step", 0) + 1
        q = _direction(gradient, state)
        d = self._compressed(name, q, state) if group["compresses"] else self._whole(q, state)
        share = 1 / _root_mean_square(d).clamp_(min=1)
        if self.options.scale_parameter:
            share *= _root_mean_square(parameter).clamp_(min=LEAST_SCALE)
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
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(project(q_MN, p_RN))
        left, right = state["exp_avg"], p_RN
        if not is_right(shape):
            left, right = p_RN.T, state["exp_avg"]
        d_MN = torch.addmm(q_MN, left, right, beta=1 - beta1, alpha=beta1)
        if state["step"] % every == 0:
            former, p_RN = p_RN, self._projection(name, q_MN, state["step"] // every, state)
            back = project_back(state["exp_avg"], former, shape)
            state["exp_avg"] = project(back, p_RN)
        state["exp_avg"].lerp_(project(q_MN, p_RN), 1 - beta1)
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
        norms = torch.linalg.vector_norm(gradient, dim=1 - side, dtype=wide)
        mean = norms.square_().div_(gradient.shape[1 - side]).add_(TINY)
        state[key] = state.get(key, mean).lerp(mean, weight)
    row, column = state["row"], state["column"]
    of_rows = (row / row.mean()).rsqrt_().to(gradient.dtype)
    return (gradient * of_rows[:, None]).mul_(column.rsqrt().to(gradient.dtype))


def _root_mean_square(x: Tensor) -> Tensor:
    """0-d; fp32, fp64 for fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dtype=wide) / x.numel() ** 0.5
