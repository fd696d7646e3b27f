"""torch's optimizers without torch's compiler.

torch wraps their methods for programs that it compiles, and the wrapper imports the compiler on its
first call: 2 s of every start, for nothing where no step is compiled. Here are the same methods
without the wrapper.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def body(of: type, name: str) -> Any:
    """A method of one of torch's optimizers as torch wrote it. A ``step`` still wants no_grad."""
    return inspect.unwrap(getattr(of, name))


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What a step returns: the closure's loss, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def passes_over(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer leaves weights and states alone where its ``found_inf`` is 1."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class Optimizer(torch.optim.Optimizer):
    """Base of optimizers."""

    add_param_group = body(torch.optim.Optimizer, "add_param_group")
    zero_grad = body(torch.optim.Optimizer, "zero_grad")
    state_dict = body(torch.optim.Optimizer, "state_dict")
    load_state_dict = body(torch.optim.Optimizer, "load_state_dict")


class OneByOne(Optimizer):
    """Steps tensors one by one. State of each: ``step``, a whole number, counted from 1.

    A subclass gives ``_step_one``. Its groups have ``names``, as ``param_groups`` makes them.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every tensor that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] = state.get("step", 0) + 1
                    self._step_one(name, parameter, state, group)
        return loss

    def _step_one(
        self, name: str, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        """Step a tensor in place, decay included."""
        raise NotImplementedError


class AdamW(Optimizer, torch.optim.AdamW):
    """torch's."""

    step = torch.no_grad()(body(torch.optim.AdamW, "step"))


def adam_(
    target: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    rate: float,
    lost: float = 0.0,
    betas: tuple[float, float],
    eps: float,
    step: float | Tensor,
) -> None:
    """torch's fused kernel on one tensor: ``target <- (1 - lost) target - rate u``, u Adam's
    direction; the moments move.

    Args:
        target, gradient, exp_avg, exp_avg_sq: of one shape and dtype; of split tensors, this
            process's parts.
        step: from 1, for the correction of the bias; infinite: none, ``u = M / (sqrt(S) + eps)``;
            a tensor is one of fp32 on their device, and stays as it is.
    Cost: one pass over the four.
    """
    local = [getattr(each, "_local_tensor", each) for each in (target, gradient)]
    local += [getattr(each, "_local_tensor", each) for each in (exp_avg, exp_avg_sq)]
    if rate == 0 and lost:  # the kernel knows the decay as a multiple of the rate
        local[0].mul_(1 - lost)
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.float32, device=local[0].device)
    torch.ops.aten._fused_adamw_(
        *([each] for each in local),
        [],
        [step],
        lr=rate,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=lost / rate if rate else 0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
