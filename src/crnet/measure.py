"""What a step really keeps: bytes counted, not estimated."""

from __future__ import annotations

import torch
from torch import Tensor

from crnet.model import LanguageModel


def saved_bytes(model: LanguageModel, tokens_BT: Tensor, targets_BT: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, parameters not counted.

    Each storage counts once, whole, however many tensors look at it. What an operation hides
    from autograd's hooks (torch's ``linear_cross_entropy``: the head's gradient) is not seen.

    Args:
        tokens_BT, targets_BT: one micro-batch.
    Cost: one forward pass.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # The tensor is held, or its address could be given to another one meanwhile.
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_sum, _ = model(tokens_BT, targets_BT)
    total = sum(size for size, _ in seen.values())
    del loss_sum
    return total
