"""Lion: the sign of an interpolation between momentum and gradient.

``W <- (1 - lr decay) W - lr sign(beta1 M + (1 - beta1) G)``, then
``M <- beta2 M + (1 - beta2) G``. A step is as large in every item as the rate says, so that rates
are 3 to 10 times smaller than Adam's, and decays as many times larger. One state an item, in the
parameter's dtype.

Source: Chen et al. 2023 (arXiv:2302.06675), algorithm 2. Cost: five passes over a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crnet.optimizers import OptimizerMethod


@dataclass(frozen=True, kw_only=True)
class LionOptions:
    """Lion."""

    beta1: float = 0.9
    """Share of the momentum in the step."""
    beta2: float = 0.99
    """Decay of the momentum."""


class Lion(OptimizerMethod):
    name = "lion"
    summary = "the sign of an interpolation between momentum and gradient"
    Options = LionOptions
    examples = (LionOptions(beta1=0.95, beta2=0.98),)
    pads = True

    def problems(self, options: LionOptions) -> list[str]:
        return [
            f"--optimizer.lion.{name} is {getattr(options, name)}; it must lie in [0, 1)"
            for name in ("beta1", "beta2")
            if not 0 <= getattr(options, name) < 1
        ]

    def state_bytes(self, spec, options: LionOptions, item_bytes: int) -> int:
        return spec.num_items * item_bytes

    def whole(self, spec, options: LionOptions) -> bool:
        return False

    def build(self, parameters, options: LionOptions, settings) -> Any:
        import torch

        from crnet.optimizers import _torch, param_groups

        class SignOfMomentum(_torch.Optimizer):
            """State of a tensor: ``exp_avg``, in its dtype."""

            @torch.no_grad()
            def step(self, closure: Any = None) -> Any:
                loss = _torch.loss_of(closure)
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            self.update(parameter, group)
                return loss

            def update(self, parameter: Any, group: Any) -> None:
                gradient, state = parameter.grad, self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                step = torch.lerp(state["exp_avg"], gradient, 1 - options.beta1).sign_()
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(step, alpha=-group["lr"])
                state["exp_avg"].lerp_(gradient, 1 - options.beta2)

        return SignOfMomentum(param_groups(parameters, settings), {})


METHODS = [Lion()]
