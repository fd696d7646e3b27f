"""LoRA's map: a matrix and a trained pair of factors as one operation; ReLoRA's events.

One operation, so that a caller who knows the result gets the same node of the graph from it. With
Z = X A, s the scale and dY given,

    dZ = s dY B^T    dB = s Z^T dY    dA = X^T dZ    dX = dY W0 + dZ A^T

and, where W0 is trained, dW0 = dY^T X.

Shapes: B batch, T tokens, M = B T rows, D input width, F output width, R rank.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable

from crnet.kernels.carried import rows, unrows
from crnet.kernels.partial import left
from crnet.kernels.precision import cast
from crnet.linears._maps import LinearMap, wider_factors
from crnet.specs import Forget


class LoRAMap(LinearMap):
    """``y = x W0^T + scale (x A) B``; ``weight`` W0 (F, D), frozen, A (D, R), B (R, F).

    The output does not follow from ``x A`` alone, and the graph keeps ``x A`` too: the bottleneck
    is both, side by side. Of a map in parts, split by rows, ``x A`` is one process's summand.
    """

    comes_apart = True
    weight: nn.Parameter
    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, tensors, scale: float):
        super().__init__(tensors)
        self.scale = scale

    def run(self, x_BTD, carry, known):
        x, weight_FD, a_DR, b_RF = self._cast(x_BTD)
        z_MR = rows(known[0][..., self.B.shape[1] :]).contiguous() if known else None
        y_BTF = known and known[1]
        output = _LoRA.apply(x, weight_FD, a_DR, b_RF, self.scale, z_MR, y_BTF)
        if self.sums and not known:
            output = left(output, self.sums.group)
        return output, output

    def down_project(self, x_BTD, carry):
        x, weight_FD, a_DR, b_RF = self._cast(x_BTD)
        z_MR, y_MF = _products(rows(x), weight_FD, a_DR, b_RF, self.scale)
        if self.sums:
            y_MF = self.sums.forward(y_MF)
        return unrows(torch.cat((y_MF, z_MR), -1), x)

    def up_project(self, bottleneck, carry):
        return bottleneck[..., : self.B.shape[1]].contiguous()

    def matrix(self) -> Tensor:
        """W0, (F, D)."""
        return self.weight

    def _cast(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        return cast(x_BTD, self.matrix(), self.A, self.B)

    def merged(self) -> Tensor:
        """``W0 + scale (A B)^T``, (F, D), in fp32 or better."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        weight_FD, a_DR, b_RF = (p.detach().to(dtype) for p in (self.matrix(), self.A, self.B))
        return torch.addmm(weight_FD, b_RF.T, a_DR.T, alpha=self.scale)

    def dense_weight(self) -> Tensor:
        return self.merged().float()


class SharedMap(LoRAMap):
    """``LoRAMap`` whose W0 is trained, and the same tensor in every block."""

    def matrix(self) -> Tensor:
        assert self.shared is not None, "a map that shares its matrix is made with its model"
        return self.shared.weight

    def with_update(self, a_DR, b_RF):
        return wider_factors(self.A, self.B, a_DR, b_RF / self.scale)


class ReLoRAMap(LoRAMap):
    """``LoRAMap`` with the events ``merge`` and ``reset``."""

    def __init__(self, tensors, scale: float, kept_frac: float, keeps_largest: bool):
        super().__init__(tensors, scale)
        self.kept_frac, self.keeps_largest = kept_frac, keeps_largest

    @torch.no_grad()
    def run_event(self, event: str, generator: Generator) -> tuple[Forget, ...]:
        """merge: W0 takes the update in, A is drawn anew, B zero: the function stays as it was.

        reset: nothing here; the optimizer forgets most of A's and B's state.
        Numerics: the sum in fp32 or better, then one rounding to the dtype of W0.
        """
        if event == "reset":
            kept = "largest" if self.keeps_largest else "random"
            return tuple(Forget(name, kept_frac=self.kept_frac, kept=kept) for name in ("A", "B"))
        assert event == "merge", event
        self.weight.copy_(self.merged())
        bound = self.A.shape[0] ** -0.5
        self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
        self.B.zero_()
        return ()


def _products(
    x_MD: Tensor, weight_FD: Tensor, a_DR: Tensor, b_RF: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Z (M, R) and the output (M, F). Cost: 2 M (D F + R (D + F)) FLOPs."""
    z_MR, y_MF = x_MD @ a_DR, x_MD @ weight_FD.T
    return z_MR, torch.addmm(y_MF, z_MR, b_RF, alpha=scale, out=y_MF)


class _LoRA(torch.autograd.Function):
    """Keeps x, Z and the weights."""

    @staticmethod
    def forward(ctx, x_BTD, weight_FD, a_DR, b_RF, scale, z_MR, y_BTF):
        if y_BTF is None:
            z_MR, y_MF = _products(rows(x_BTD), weight_FD, a_DR, b_RF, scale)
            y_BTF = unrows(y_MF, x_BTD)
        ctx.save_for_backward(x_BTD, z_MR, weight_FD, a_DR, b_RF)
        ctx.scale = scale
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        x_BTD, z_MR, weight_FD, a_DR, b_RF = ctx.saved_tensors
        x_MD, dy_MF = rows(x_BTD), rows(dy_BTF)
        wants_x, wants_weight, wants_a, wants_b = ctx.needs_input_grad[:4]
        db_RF = (z_MR.T @ dy_MF).mul_(ctx.scale) if wants_b else None
        dz_MR = (dy_MF @ b_RF.T).mul_(ctx.scale)
        dweight_FD = dy_MF.T @ x_MD if wants_weight else None
        da_DR = x_MD.T @ dz_MR if wants_a else None
        dx_MD = dy_MF @ weight_FD if wants_x else None
        if dx_MD is not None:
            torch.addmm(dx_MD, dz_MR, a_DR.T, out=dx_MD)
        dx_BTD = None if dx_MD is None else unrows(dx_MD, x_BTD)
        return dx_BTD, dweight_FD, da_DR, db_RF, None, None, None
