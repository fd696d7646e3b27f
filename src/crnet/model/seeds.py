"""A random generator for every name: no number hangs on the order in which others are drawn."""

from __future__ import annotations

import hashlib

import torch


def generator_of(seed: int, *words: str) -> torch.Generator:
    """A CPU generator seeded by a run's seed and words: the same on any device and world size.

    Never a seed alone: torch's CPU generator takes the lowest 32 bits of ``manual_seed``'s
    argument, so that 0 and 2**32 would draw alike.
    """
    text = "\0".join((str(seed), *words))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
