"""Moments of a byte an item: codes of a dynamic map, with a maximum for every block of 256 items.

Source: Dettmers et al. 2022 (arXiv:2110.02861). No torch here: ``module`` computes.
"""

from __future__ import annotations

import math

BLOCK = 256
"""Items that share a maximum, in the order of memory."""
MIN_ITEMS = 4096
"""Below it moments keep their own dtype, as bitsandbytes has it."""


def blocks_bytes(num_items: int) -> int:
    """Of both moments of so many items: a code each, and the maxima of the blocks."""
    return 2 * num_items + 2 * 4 * math.ceil(num_items / BLOCK)
