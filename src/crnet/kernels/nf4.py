"""Tensors in four bits an item: NF4 codes, and maxima of blocks in eight bits ("double").

A block of 16 items is divided by its largest absolute value, and each quotient becomes the nearest
of 16 levels: quantiles of the normal distribution, 0 and both ends among them. The maxima of
blocks, less their mean, become 8-bit floats: those of 256 blocks share a scale.

The nearest level is looked up in a table of 4,097 places between -1 and 1, four times as fast on a
CPU as ``torch.bucketize``: a boundary between two levels is off by 1/4,096 at most. Refused: levels
by the maximum as it is read back, which may be smaller than an item.

Shapes: N items, filled up to a multiple of a block; G groups of maxima.
"""

from __future__ import annotations

import functools
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from crnet.kernels.nf4_bytes import BLOCK, GROUP

PLACES = 4096
"""Of the table, between -1 and 1."""
CPU_ITEMS = 1 << 17
"""Quantised at once on a CPU: what is made on the way stays in the cache."""
_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max


class NF4(NamedTuple):
    """A tensor's items in their order, in four bits each."""

    codes: Tensor
    """uint8, two items a byte, the first in the low bits; (N / 2,)."""
    maxima: Tensor
    """uint8, the bits of an 8-bit float; (N / 16,)."""
    scales: Tensor
    """fp32, of each group of maxima, and behind them their mean; (G + 1,)."""


def levels() -> list[float]:
    """The 16 levels, ascending, from -1 to 1.

    Quantiles of the normal distribution, evenly spaced in probability between 1/2 and 1 - (1/30 +
    1/32)/2: eight above zero, seven below, and zero; divided by the largest.
    Source: QLoRA (arXiv:2305.14314), section 3 and appendix E.
    """
    quantile, end = NormalDist().inv_cdf, 1 - (1 / 30 + 1 / 32) / 2

    def side(count: int) -> list[float]:
        return [quantile(end + (0.5 - end) * idx / count) for idx in range(count)]

    found = sorted([*side(8), 0.0, *(-value for value in side(7))])
    return [value / found[-1] for value in found]


@functools.cache
def _code_at(device: torch.device) -> Tensor:
    """Code of the nearest level, by place; uint8."""
    level_16 = torch.tensor(levels(), dtype=torch.float64)
    places = torch.linspace(-1, 1, PLACES + 1, dtype=torch.float64)
    middles = (level_16[1:] + level_16[:-1]) / 2
    return torch.bucketize(places, middles).to(device, torch.uint8)


@functools.cache
def _levels_of_byte(device: torch.device) -> Tensor:
    """The two levels of every byte, fp32, read as one number of 8 bytes: one look for both."""
    level_16 = torch.tensor(levels())
    byte_256 = torch.arange(256)
    both = torch.stack((level_16[byte_256 % 16], level_16[byte_256 // 16]), dim=1)
    return both.view(torch.float64).view(-1).to(device)


def quantise(flat_N: Tensor) -> NF4:
    """The codes of a tensor's items.

    Args:
        flat_N: any floating dtype, one dimension.
    Cost: on a CPU some 5 ns an item and core; for a moment 12 bytes an item of a part
        (``CPU_ITEMS``; elsewhere of all). Keeps ``nf4_bytes``.
    Numerics: computed in fp32. A block that is not finite reads back as numbers that are none.
    Source: QLoRA, sections 3 and appendix E; blocks of 16: arXiv:2509.18993, E.2.4.
    Deviation: levels are looked up (above). QLoRA's released code holds maxima by a map of its own
        instead of 8-bit floats.
    """
    if over := -len(flat_N) % BLOCK:
        flat_N = torch.nn.functional.pad(flat_N, (0, over))
    at_once = CPU_ITEMS if flat_N.device.type == "cpu" else max(len(flat_N), 1)
    parts = [_codes(part.view(-1, BLOCK).float()) for part in flat_N.split(at_once)]
    codes, largest = (torch.cat(column) for column in zip(*parts, strict=True))
    return NF4(codes, *_double(largest))


def _codes(items_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two a byte, and the largest absolute value of each block."""
    largest_N1 = items_NB.abs().amax(dim=1, keepdim=True)
    half = PLACES // 2
    # Of nothing but zeros, 0 / 0; and of what is not finite.
    places = (items_NB / largest_N1).mul_(half).add_(half + 0.5).nan_to_num_(half, half, half)
    found = _code_at(items_NB.device).index_select(0, places.view(-1).to(torch.int32))
    pairs = found.view(torch.int16)
    return pairs.bitwise_or(pairs >> 4).to(torch.uint8), largest_N1.view(-1)


def _double(largest_N: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima in 8 bits, scales and mean."""
    mean = largest_N.mean()
    over = -len(largest_N) % GROUP
    off = torch.nn.functional.pad(largest_N - mean, (0, over)).view(-1, GROUP)
    scale_G1 = off.abs().amax(dim=1, keepdim=True).div_(_LARGEST)
    maxima = (off / scale_G1).nan_to_num_(0.0).clamp_(-_LARGEST, _LARGEST).to(_FLOAT8)
    maxima = maxima.view(torch.uint8).view(-1)[: len(largest_N)].clone()
    return maxima, torch.cat((scale_G1.view(-1), mean.view(1)))


def read_back(packed: NF4, num_items: int, dtype: torch.dtype) -> Tensor:
    """The items of ``quantise``, (num_items,).

    Cost: on a CPU some 3 ns an item and core.
    """
    largest_N1 = _read_maxima(packed).view(-1, 1)
    both = torch.take(_levels_of_byte(packed.codes.device), packed.codes.long())
    items = both.view(torch.float32).view(-1, BLOCK).mul_(largest_N1)
    return items.view(-1)[:num_items].to(dtype)


def _read_maxima(packed: NF4) -> Tensor:
    groups, count = packed.scales.shape[0] - 1, packed.maxima.shape[0]
    off = packed.maxima.view(_FLOAT8).float()
    off = torch.nn.functional.pad(off, (0, groups * GROUP - count)).view(groups, GROUP)
    return (off * packed.scales[:-1, None] + packed.scales[-1]).clamp_min_(0).view(-1)[:count]
