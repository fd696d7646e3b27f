"""Keys and values of earlier tokens, for decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class LayerCache:
    """What attention of one block reads of earlier tokens, for up to ``capacity`` of them: keys and
    values, or what it makes those of (``layers.latent_attention``).

    A carry needs no cache: it reaches from block to block of the same token.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self._held: list[Tensor] = []

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Add new tokens; return what is held of all of them.

        Args:
            new: keys and values, or others, each (B, K, T, H); K and H may be any, and stay.
        Returns: as many tensors, each (B, K, S, H).
        Raises:
            RuntimeError: there is no room left, or they do not go with those that are there.
        """
        num_new = new[0].shape[2]
        if self.length + num_new > self.capacity:
            raise RuntimeError(
                f"the key/value cache holds {self.capacity} tokens; "
                f"{self.length} are in it and {num_new} more came"
            )
        shapes = [(*each.shape[:2], self.capacity, each.shape[3]) for each in new]
        if not self._held or self.length == 0:
            self._held = [each.new_empty(shape) for each, shape in zip(new, shapes, strict=True)]
        held = [tuple(each.shape) for each in self._held]
        if held != shapes:  # a smaller batch would be spread over the larger one
            raise RuntimeError(
                f"the key/value cache has (batch, heads, capacity, head size) "
                f"{_told(held)} and {_told(shapes)} came; take new caches"
            )
        end = self.length + num_new
        for kept, each in zip(self._held, new, strict=True):
            kept[:, :, self.length : end] = each
        self.length = end
        return tuple(kept[:, :, :end] for kept in self._held)

    @property
    def num_bytes(self) -> int:
        """That it takes, room for tokens to come among them."""
        return sum(kept.numel() * kept.element_size() for kept in self._held)


def _told(shapes: Sequence[tuple[int, ...]]) -> str:
    """Each of them once."""
    return " and ".join(map(str, dict.fromkeys(shapes)))


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
