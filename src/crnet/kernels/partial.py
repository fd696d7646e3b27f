"""Sums between processes that compute a map in parts, each of them the columns or the rows it has.

Of a map split by columns of its output, every process reads the whole input: what it finds of the
input's gradient (or the bottleneck's) is a summand. Of a map split by rows of its input, what it
finds of the output (or the bottleneck) is one. Where the sum stands in a map is the map's affair;
that there is one, it learns from outside (``PartialSum``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from crnet.specs import Side


@dataclass(frozen=True)
class PartialSum:
    """Adds up what the processes of a group have of one tensor of a map, and of its gradient."""

    group: Any
    """torch's ``ProcessGroup``."""
    side: Side
    """By which side of it the map is split."""

    def forward(self, tensor: Tensor) -> Tensor:
        """The whole tensor, in place: a sum where the map is split by rows."""
        return added_up(tensor, self.group) if self.side == "rows" else tensor

    def backward(self, gradient: Tensor) -> Tensor:
        """Its whole gradient, in place: a sum where the map is split by columns."""
        return added_up(gradient, self.group) if self.side == "columns" else gradient


def added_up(tensor: Tensor, group: Any) -> Tensor:
    """The sum over a group, the same bits on each process; in place where memory lies in a row."""
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, group=group)
    return tensor


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, group):
        ctx.group = group
        return x_BTD.view_as(x_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_BTD):
        # A copy: the gradient may be somebody else's too.
        return added_up(dx_BTD.clone(), ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_BTF, group):
        ctx.mark_dirty(y_BTF)
        return added_up(y_BTF, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        return dy_BTF, None


def left(y_BTF: Tensor, group: Any) -> Tensor:
    """The output of a map that is split by rows, from this process's summand, in place.

    A node of its own, behind what the product keeps: a block that is run again stops before it.
    """
    return _Leave.apply(y_BTF, group)


def entered(x_BTD: Tensor, group: Any) -> Tensor:
    """``x`` as maps that are split by columns read it: its gradient is summed over the group.

    One sum for all the maps of one input. Keeps nothing.
    """
    return _Enter.apply(x_BTD, group)
