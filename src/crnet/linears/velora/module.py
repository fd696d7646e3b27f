"""VeLoRA's map: a dense one whose backward pass has one number for each sub-token of its input.

With Z the products of x's sub-tokens with the direction d, and dY given,

    dX = dY W    dW = scale (dY^T Z) spread by d: item (f, g s + j) is that of (f, g) times d_j

The gradient of W is summed over all tokens while it is narrow, and x is never made again.

Shapes: B batch, T tokens, M = B T rows, D input width, F output width, S items of a sub-token,
G = D / S sub-tokens of a token.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable

from crnet.kernels.carried import rows, rows_times
from crnet.kernels.precision import cast
from crnet.linears._maps import DenseMap, LinearMap
from crnet.specs import Forget


class VeLoRAMap(LinearMap):
    """``y = x W^T``; ``weight`` W (F, D), ``direction`` d (S,), frozen."""

    comes_apart = True
    weight: nn.Parameter
    direction: nn.Parameter

    def __init__(self, tensors, scale: float):
        super().__init__(tensors)
        self.scale = scale
        self._looked: Tensor | None = None

    def run(self, x_BTD, carry, known):
        x, weight_FD = cast(x_BTD, self.weight)
        output = _VeLoRA.apply(x, weight_FD, self.direction, self.scale, known and known[1])
        return output, output

    def look(self, x_BTD: Tensor) -> None:
        """Take the mean sub-token of an input for the direction to be; normalised, fp32 or better.
        Where that is zero, it says nothing."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        mean_S = x_BTD.reshape(-1, len(self.direction)).to(dtype).mean(0)
        norm = torch.linalg.vector_norm(mean_S)
        self._looked = mean_S / norm if bool(norm > 0) else None

    @torch.no_grad()
    def run_event(self, event: str, generator: Generator) -> tuple[Forget, ...]:
        """direction: what ``look`` saw last, if anything."""
        assert event == "direction", event
        if self._looked is not None:
            self.direction.copy_(self._looked)
            self._looked = None
        return ()

    def dense_weight(self) -> Tensor:
        return self.weight.detach().float()

    def with_update(self, a_DR, b_RF):
        weight_FD = self.weight.detach().float() + (a_DR @ b_RF).T
        return {"weight": weight_FD, "direction": self.direction.detach()}


class PlainMap(DenseMap):
    """A map that keeps its input: nothing is due."""

    def run_event(self, event: str, generator: Generator) -> tuple[Forget, ...]:
        return ()


class _VeLoRA(torch.autograd.Function):
    """Keeps Z, the weight and the direction."""

    @staticmethod
    def forward(ctx, x_BTD, weight_FD, d_S, scale, y_BTF):
        if y_BTF is None:
            y_BTF = nn.functional.linear(x_BTD, weight_FD)
        z = x_BTD.reshape(-1, len(d_S)) @ d_S.to(x_BTD.dtype)
        z_MG = z.view(-1, x_BTD.shape[-1] // len(d_S))
        ctx.save_for_backward(z_MG, weight_FD, d_S)
        ctx.scale = scale
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        z_MG, weight_FD, d_S = ctx.saved_tensors
        dx_BTD = rows_times(dy_BTF, weight_FD) if ctx.needs_input_grad[0] else None
        dweight_FD = None
        if ctx.needs_input_grad[1]:
            narrow_FG = rows(dy_BTF).T @ z_MG
            spread_S = (ctx.scale * d_S).to(narrow_FG.dtype)
            dweight_FD = (narrow_FG.unsqueeze(-1) * spread_S).flatten(1)
        return dx_BTD, dweight_FD, None, None, None
