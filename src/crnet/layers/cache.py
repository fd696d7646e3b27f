"""Keys and values of earlier tokens, for decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one block, as attention uses them, for up to ``capacity`` tokens.

    A carry needs no cache: it reaches from block to block of the same token.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys_BKTH: Tensor, values_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens; return the keys and values of all, (B, K, S, H).

        Raises:
            RuntimeError: there is no room left, or they do not go with those that are there.
        """
        batch, heads, num_new, head_size = keys_BKTH.shape
        if self.length + num_new > self.capacity:
            raise RuntimeError(
                f"the key/value cache holds {self.capacity} tokens; "
                f"{self.length} are in it and {num_new} more came"
            )
        shape = (batch, heads, self.capacity, head_size)
        if self._keys is None or self._values is None or self.length == 0:
            self._keys = keys_BKTH.new_empty(shape)
            self._values = values_BKTH.new_empty(shape)
        if self._keys.shape != shape:  # a smaller batch would be spread over the larger one
            raise RuntimeError(
                f"the key/value cache has (batch, heads, capacity, head size) "
                f"{tuple(self._keys.shape)} and {shape} came; take new caches"
            )
        end = self.length + num_new
        self._keys[:, :, self.length : end] = keys_BKTH
        self._values[:, :, self.length : end] = values_BKTH
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


@contextlib.contextmanager
def all_or_none(caches: Sequence[LayerCache]) -> Iterator[None]:
    """What is run inside adds its tokens to every cache, or where it fails to none.

    A pass that is cut short (out of memory, Ctrl-C) leaves the blocks below with tokens that those
    above have not seen; the next pass would mix the two.
    """
    lengths = [cache.length for cache in caches]
    try:
        yield
    except BaseException:
        for cache, length in zip(caches, lengths, strict=True):
            cache.length = length
        raise


def causal_mask(
    num_new: int, num_seen: int, device: torch.device, window: int | None = None
) -> Tensor | None:
    """True where new token i may look at token j, shape (T, S); None where it may look at all.

    ``window``: so many tokens it may look at, itself among them; None: all before it.
    """
    if num_new == 1 and window is None:
        return None
    mask = torch.ones(num_new, num_seen, dtype=torch.bool, device=device)
    mask = mask.tril(num_seen - num_new)
    return mask if window is None else mask.triu(num_seen - num_new - window + 1)
