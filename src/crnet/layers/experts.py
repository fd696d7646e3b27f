"""A feed-forward of several experts, of which every token goes through some.

Shapes: B batch, T tokens, M = B T rows, D model width, F an expert's width, K experts of a token,
S = M K rows that are dealt out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crnet.kernels.elementwise import swiglu
from crnet.kernels.experts import combine, deal, route, take


class Uneven:
    """How uneven the experts of each block are in one forward pass (``kernels.experts.route``).

    An object of its own: fully_shard copies a dict that it finds among a block's arguments.
    """

    def __init__(self) -> None:
        self._values: dict[int, Tensor] = {}

    def note(self, layer_idx: int, value: Tensor) -> None:
        """Take a block's in; a recomputation, which runs the block once more, is passed over."""
        self._values.setdefault(layer_idx, value)

    def in_gradient(self, loss: Tensor, factor: Any) -> Tensor:
        """A loss with the gradient of ``factor`` times the blocks' mean; its value stays the
        loss's, so that figures of models compare."""
        beside = torch.stack(list(self._values.values())).mean() * factor
        return loss + (beside - beside.detach())


class Router(nn.Module):
    """One row of weights for each expert."""

    def __init__(self, num_experts: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))


class Experts(nn.Module):
    """sum_k w_k down_k(silu(gate_k x) * up_k x) over the experts that a router chooses.

    An expert's maps are positions of the block, asked for in turn with the rows that they got; what
    all of them give together is the position ``experts`` (``specs.Position.is_operator``).
    """

    def __init__(
        self,
        layer_idx: int,
        hidden_size: int,
        num_experts: int,
        num_active: int,
        *,
        normalises: bool,
        keeps_activation: bool,
    ):
        super().__init__()
        self.layer_idx, self.num_active = layer_idx, num_active
        self.normalises, self.keeps_activation = normalises, keeps_activation
        self.gate = Router(num_experts, hidden_size)
        self.experts = nn.ModuleList(nn.Module() for _ in range(num_experts))

    def forward(self, x_BTD: Tensor, project: Any, context: Any) -> Tensor:
        """Return the output of the position ``experts``, (B, T, D)."""
        weights_MK, chosen_MK, uneven = route(
            x_BTD, self.gate.weight, self.num_active, self.normalises
        )
        if context.uneven is not None:
            context.uneven.note(self.layer_idx, uneven)
        dealt = deal(chosen_MK, len(self.experts))
        x_SD = take(x_BTD.flatten(0, 1), dealt, self.num_active)
        rows = x_SD.unsqueeze(0).split(dealt.counts, dim=1)
        y_SD = torch.cat([self._expert(i, x, project) for i, x in enumerate(rows)], dim=1)[0]
        return project("experts", combine(y_SD, weights_MK, dealt).view(x_BTD.shape))

    def _expert(self, idx: int, x_1SD: Tensor, project: Any) -> Tensor:
        gate_1SF = project(f"gate.{idx}", x_1SD).to(x_1SD.dtype)
        up_1SF = project(f"up.{idx}", x_1SD).to(x_1SD.dtype)
        joined_1SF = swiglu(gate_1SF, up_1SF) if self.keeps_activation else gate_1SF * up_1SF
        return project(f"down.{idx}", joined_1SF).to(x_1SD.dtype)
