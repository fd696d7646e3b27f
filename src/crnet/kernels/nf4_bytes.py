"""How many bytes a tensor takes as NF4 codes. No torch: the cost model reads it too."""

BLOCK = 16
"""Items that share a maximum (arXiv:2509.18993, E.2.4)."""
GROUP = 256
"""Maxima that share a scale (QLoRA, double quantisation)."""


def num_blocks(num_items: int) -> int:
    """Of a tensor; the last is filled up."""
    return -(-num_items // BLOCK)


def num_groups(num_items: int) -> int:
    """Of the maxima of a tensor's blocks; the last is filled up."""
    return -(-num_blocks(num_items) // GROUP)


def nf4_bytes(num_items: int) -> int:
    """Of the codes, of the maxima of blocks, and of the scales of these with their mean: 4.5 bits
    an item and 32 / 4,096 more, and 4 bytes a tensor."""
    codes, maxima = BLOCK // 2 * num_blocks(num_items), num_blocks(num_items)
    return codes + maxima + 4 * (num_groups(num_items) + 1)
