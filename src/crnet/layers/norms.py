"""Norms with learned gains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crnet.kernels.elementwise import rms_norm
from crnet.kernels.precision import compute_dtype


class RMSNorm(nn.Module):
    """Root-mean-square norm; its result has the dtype that the next product computes in."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """torch's layer norm with gain and bias, statistics in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            normed = nn.functional.layer_norm(
                x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
            )
        return normed.to(dtype)
