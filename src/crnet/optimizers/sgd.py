"""SGD with momentum: the floor under every other optimizer, torch's own, fused where it can be.

``M <- momentum M + G``, then ``W <- (1 - lr decay) W - lr M``; with ``nesterov`` the step is
``G + momentum M``. One state an item, in the parameter's dtype. A step is as large as the gradient,
whatever its tensor: rates are 10 to 1000 times Adam's, and factors, norms and embeddings share one.

Source: Polyak 1964; Sutskever et al. 2013 (nesterov); decay: Loshchilov and Hutter 2019
(arXiv:1711.05101), algorithm 1, ``SGDW``. Deviation: of torch's SGD, whose decay is added to the
gradient and so to the momentum; ours is decoupled, as every optimizer's here. Cost: one pass over
the parameter, its gradient and its momentum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crnet.optimizers import OptimizerMethod


@dataclass(frozen=True, kw_only=True)
class SGDOptions:
    """SGD with momentum."""

    momentum: float = 0.9
    """Share of the last step's momentum; 0: none, and no state."""
    nesterov: bool = False
    """Step by the gradient plus the momentum that it leads to (Nesterov's)."""


class SGD(OptimizerMethod):
    name = "sgd"
    summary = "SGD with momentum"
    Options = SGDOptions
    examples = (SGDOptions(momentum=0.0), SGDOptions(momentum=0.8, nesterov=True))
    tried_lr = 1 / 9
    pads = True

    def problems(self, options: SGDOptions) -> list[str]:
        found = []
        if not 0 <= options.momentum < 1:
            found.append(f"--optimizer.sgd.momentum is {options.momentum}; it must lie in [0, 1)")
        if options.nesterov and options.momentum == 0:
            found.append(
                "--optimizer.sgd.nesterov looks ahead along the momentum, and there is none; say "
                "--optimizer.sgd.momentum 0.9, or leave nesterov out"
            )
        return found

    def state_bytes(self, spec, options: SGDOptions, item_bytes: int) -> int:
        return spec.num_items * item_bytes if options.momentum else 0

    def whole(self, spec, options: SGDOptions) -> bool:
        return False

    def build(self, parameters, options: SGDOptions, settings) -> Any:
        import torch
        from torch.optim.sgd import sgd

        from crnet.optimizers import _torch, param_groups

        class SGDW(_torch.Optimizer):
            """State of a tensor: ``momentum_buffer``, in its dtype; none without momentum."""

            @torch.no_grad()
            def step(self, closure: Any = None) -> Any:
                loss = _torch.loss_of(closure)
                for group in self.param_groups:
                    self.descend(group, [p for p in group["params"] if p.grad is not None])
                return loss

            def descend(self, group: Any, parameters: list[Any]) -> None:
                if group["weight_decay"]:
                    for parameter in parameters:
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                for fused in (True, False):
                    chosen = [each for each in parameters if can_fuse(each) is fused]
                    sgd(
                        [local(each) for each in chosen],
                        [local(each.grad) for each in chosen],
                        [local(self.momentum_of(each)) for each in chosen],
                        weight_decay=0.0,  # torch's goes through the momentum
                        momentum=options.momentum,
                        lr=group["lr"],
                        dampening=0.0,
                        nesterov=options.nesterov,
                        maximize=False,
                        fused=fused,
                        foreach=not fused,
                    )

            def momentum_of(self, parameter: Any) -> Any:
                if not options.momentum:
                    return None
                state = self.state[parameter]
                if not state:  # zeros: the first step's momentum is its gradient, as torch has it
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                return state["momentum_buffer"]

        return SGDW(param_groups(parameters, settings), {})


def can_fuse(parameter: Any) -> bool:
    """Whether torch's fused step of a tensor is right. On a CPU, in 16 bits, it leaves numbers of
    nowhere among the last items of the momentum (torch 2.13)."""
    return parameter.device.type != "cpu" or parameter.dtype.itemsize > 2


def local(tensor: Any) -> Any:
    """This process's part of a split tensor; another one itself."""
    return getattr(tensor, "_local_tensor", tensor)


METHODS = [SGD()]
