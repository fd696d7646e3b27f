"""The average of Attention Residuals, with a backward written by hand.

Autograd on the plain formula (``naive_average``) keeps the tensors stacked, normed and cast: four
copies of all that the stream holds, at every sublayer. Here a read keeps the tensors themselves,
which all reads share, and two numbers a row of each.

Shapes: B batch, T tokens, D model width, S tensors of the state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_D, eps, *state):
        wide = _statistics_dtype(state[0])
        w_D = weight_D.to(wide)
        inverses, scores = [], []
        for v_BTD in state:
            v = v_BTD.to(wide)
            inverses.append(v.square().mean(-1).add_(eps).rsqrt_())
            scores.append((v @ w_D).mul_(inverses[-1]))
        inverse_SBT = torch.stack(inverses)
        share_SBT = torch.stack(scores).softmax(0)
        ctx.save_for_backward(weight_D, inverse_SBT, share_SBT, *state)
        x = torch.zeros(state[0].shape, dtype=wide, device=state[0].device)
        for v_BTD, share_BT in zip(state, share_SBT, strict=True):
            x.addcmul_(v_BTD.to(wide), share_BT.unsqueeze(-1))
        return x.to(state[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_BTD):
        with without_autocast(dx_BTD.device):
            return _Average.gradients(ctx, dx_BTD)

    @staticmethod
    def gradients(ctx, dx_BTD):
        weight_D, inverse_SBT, share_SBT, *state = ctx.saved_tensors
        wide = _statistics_dtype(state[0])
        w_D, dx = weight_D.to(wide), dx_BTD.to(wide)
        dshare_SBT = torch.stack([torch.linalg.vecdot(dx, v.to(wide)) for v in state])
        mean_BT = (share_SBT * dshare_SBT).sum(0)
        # From here on by r, the inverse norm: that of the score is r (w . v).
        slope_SBT = (dshare_SBT - mean_BT).mul_(share_SBT).mul_(inverse_SBT)
        dw_D, gradients = torch.zeros_like(w_D), []
        for idx, v_BTD in enumerate(state):
            v, slope_BT, inverse_BT = v_BTD.to(wide), slope_SBT[idx], inverse_SBT[idx]
            dw_D += v.flatten(0, -2).T @ slope_BT.flatten()
            if not ctx.needs_input_grad[2 + idx]:
                gradients.append(None)
                continue
            along_BT = (v @ w_D).mul_(inverse_BT.square()).mul_(slope_BT).div_(v.shape[-1])
            dv = dx * share_SBT[idx].unsqueeze(-1)
            dv.addcmul_(slope_BT.unsqueeze(-1), w_D).addcmul_(along_BT.unsqueeze(-1), v, value=-1)
            gradients.append(dv.to(v_BTD.dtype))
        return dw_D.to(weight_D.dtype), None, *gradients


def without_autocast(device: torch.device) -> torch.autocast:
    """Products here are statistics: autocast would compute scores in bf16."""
    return torch.autocast(device.type, enabled=False)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def average(state: Sequence[Tensor], weight_D: Tensor, eps: float) -> Tensor:
    """Return ``sum_j softmax_j(w . RMSNorm(v_j)) v_j``.

    Args:
        state: tensors v_j (B, T, D), any floating dtypes; the first says that of the result.
        weight_D: w.
        eps: of the norm, which has no gain.
    Returns:
        (B, T, D).
    Cost: keeps the v_j and, for each, 2 fp32 numbers a row; no stack of them is made.
    Numerics: norms, softmax and sum in fp32 (fp64 for fp64).
    Source: arXiv:2603.15031.
    """
    with without_autocast(weight_D.device):
        return _Average.apply(weight_D, eps, *state)


def naive_average(state: Sequence[Tensor], weight_D: Tensor, eps: float) -> Tensor:
    """``average`` as the formula reads, for tests."""
    v_SBTD = torch.stack([v_BTD.to(state[0].dtype) for v_BTD in state])
    normed = v_SBTD * (v_SBTD.square().mean(-1, keepdim=True) + eps).rsqrt()
    share_SBT1 = (normed @ weight_D.to(normed.dtype)).softmax(0).unsqueeze(-1)
    return (share_SBT1 * v_SBTD).sum(0)


class First(nn.Module):
    """Around the first sublayer, which gets the embedding; what it writes begins a group."""

    def __init__(self, adds: bool = False, copies: bool = False):
        """
        Args:
            adds: whether a write adds to the group that has begun.
            copies: whether a group is a tensor of its own, in the embedding's dtype; otherwise it
                is what the sublayer wrote.
        """
        super().__init__()
        self.adds, self.copies = adds, copies

    def read(self, state: tuple[Tensor, ...]) -> Tensor:
        (x_BTD,) = state
        return x_BTD

    def write(self, state: tuple[Tensor, ...], y_BTD: Tensor) -> tuple[Tensor, ...]:
        if not self.copies:
            return (*state, y_BTD)
        y_BTD = y_BTD.to(state[0].dtype, copy=not self.adds)
        return (*state[:-1], state[-1] + y_BTD) if self.adds else (*state, y_BTD)


class Average(First):
    """Reads the average of all that was written."""

    def __init__(self, size: int, eps: float, adds: bool = False, copies: bool = False):
        super().__init__(adds, copies)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def read(self, state: tuple[Tensor, ...]) -> Tensor:
        return average(state, self.weight, self.eps)
