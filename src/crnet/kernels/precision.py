"""The dtype that products are computed in, for operations with a hand-written backward.

Autocast does not look inside a ``torch.autograd.Function``: each of ours casts its inputs first
(a differentiable cast, so gradients come back in the inputs' own dtypes).
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype autocast would compute a product with ``x`` in; ``x.dtype`` without autocast."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def cast(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """``x`` and the others in ``compute_dtype(x)``. Cost: none where they are in it already."""
    dtype = compute_dtype(x)
    return tuple(tensor.to(dtype) for tensor in (x, *others))
