"""torch's optimizers without torch's compiler.

torch wraps their methods for programs that it compiles, and the wrapper imports the compiler on its
first call: 2 s of every start, for nothing where no step is compiled. Here are the same methods
without the wrapper.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


def body(of: type, name: str) -> Any:
    """A method of one of torch's optimizers as torch wrote it. A ``step`` still wants no_grad."""
    return inspect.unwrap(getattr(of, name))


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What a step returns: the closure's loss, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Optimizer(torch.optim.Optimizer):
    """Base of optimizers."""

    add_param_group = body(torch.optim.Optimizer, "add_param_group")
    zero_grad = body(torch.optim.Optimizer, "zero_grad")
    state_dict = body(torch.optim.Optimizer, "state_dict")
    load_state_dict = body(torch.optim.Optimizer, "load_state_dict")


class AdamW(Optimizer, torch.optim.AdamW):
    """torch's."""

    step = torch.no_grad()(body(torch.optim.AdamW, "step"))
