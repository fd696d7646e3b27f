"""CR-Net's map in Triton: ``Y = Z B + gain * carry`` as one kernel, and what its backward reads.

Imported only where Triton is there. Tiles and warps are a function of the shapes: nothing is
measured, so that a recomputation and a resumed run rebuild the same bits. Sums over programs are
made of one number a program, by one more sum: no atomics.

Shapes: M rows, R rank, F output width.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on a CPU. It cannot multiply bf16."""

ITEMS_A_PROGRAM = 8192
TILE_ITEMS = 2048
"""Of dY and carry, in ``carry_gradients``: a program's, and how many of them at once."""


@triton.jit
def carried_up_kernel(
    z,
    b,
    carry,
    gain,
    y,
    num_rows,
    width,
    z_stride,
    b_stride,
    rank: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_width: tl.constexpr,
    tile_rank: tl.constexpr,
    upcast: tl.constexpr,
):
    """One tile of Y, rows of a tile of Z by columns of B; carry and Y are contiguous."""
    num_across = tl.cdiv(width, tile_width)
    program = tl.program_id(0)
    rows = (program // num_across) * tile_rows + tl.arange(0, tile_rows)
    columns = (program % num_across) * tile_width + tl.arange(0, tile_width)
    row_ok, column_ok = rows < num_rows, columns < width
    rows = rows.to(tl.int64)
    total = tl.zeros((tile_rows, tile_width), dtype=tl.float32)
    for start in range(0, rank, tile_rank):  # not unrolled: loads of the next tiles overlap
        ranks = start + tl.arange(0, tile_rank)
        z_ok, b_ok = row_ok[:, None], column_ok[None, :]
        if rank % tile_rank:
            z_ok, b_ok = z_ok & (ranks < rank)[None, :], b_ok & (ranks < rank)[:, None]
        z_places, b_places = rows[:, None] * z_stride, ranks[:, None] * b_stride
        z_tile = tl.load(z + z_places + ranks[None, :], mask=z_ok, other=0.0)
        b_tile = tl.load(b + b_places + columns[None, :], mask=b_ok, other=0.0)
        if upcast:
            z_tile, b_tile = z_tile.to(tl.float32), b_tile.to(tl.float32)
        total = tl.dot(z_tile, b_tile, total, input_precision="ieee")
    places = rows[:, None] * width + columns[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    carried = tl.load(carry + places, mask=ok, other=0.0).to(tl.float32)
    total += tl.load(gain).to(tl.float32) * carried
    tl.store(y + places, total.to(y.dtype.element_ty), mask=ok)


@triton.jit
def carry_gradients_kernel(
    dy, carry, gain, dcarry, sums, num_items, items: tl.constexpr, tile: tl.constexpr
):
    """``dcarry = gain * dY`` of ``items`` successive items, and their sum of dY * carry."""
    program = tl.program_id(0)
    factor = tl.load(gain).to(tl.float32)
    total = tl.zeros((tile,), dtype=tl.float32)
    for start in range(0, items, tile):
        places = program.to(tl.int64) * items + start + tl.arange(0, tile)
        ok = places < num_items
        slope = tl.load(dy + places, mask=ok, other=0.0).to(tl.float32)
        total += slope * tl.load(carry + places, mask=ok, other=0.0).to(tl.float32)
        tl.store(dcarry + places, (factor * slope).to(dcarry.dtype.element_ty), mask=ok)
    tl.store(sums + program, tl.sum(total, axis=0))


NUM_WARPS = 8
"""With four, a tile of 128 x 128 spills registers (compiled for sm_90)."""
NUM_STAGES = 3
"""Tiles of Z and B under way at once."""


def tiles(num_rows: int, rank: int, width: int) -> dict[str, int]:
    """Rows, columns and ranks of a tile.

    Few rows, as in generation, take a low one. A rank or a width that is no multiple of 16 items
    leaves rows unaligned: single loads, whose addresses need the registers of half a tile.
    """
    aligned = rank % 16 == 0 and width % 16 == 0
    whole = [size for size in (64, 32, 16) if rank % size == 0]
    return {
        "tile_rows": min(128, max(16, triton.next_power_of_2(num_rows))),
        "tile_width": 128 if aligned else 64,
        "tile_rank": whole[0] if aligned else 32,
    }


def carried_up(z_MR: Tensor, b_RF: Tensor, carry_MF: Tensor, gain_1: Tensor) -> Tensor:
    """Return ``Z B + gain * carry``.

    Args:
        z_MR, b_RF: of one dtype, any strides.
        carry_MF: decides the dtype of the result.
        gain_1: one item, any dtype; read in fp32.
    Returns: (M, F), contiguous.
    Cost: 2 M R F FLOPs; reads Z, B and carry once, writes Y once.
    Numerics: sum and gain * carry in fp32, one rounding.
    """
    (num_rows, rank), width = z_MR.shape, b_RF.shape[1]
    z_MR, b_RF, carry_MF = (_rows(each) for each in (z_MR, b_RF, carry_MF))
    y_MF = torch.empty_like(carry_MF, memory_format=torch.contiguous_format)
    if not y_MF.numel():
        return y_MF
    tile = tiles(num_rows, rank, width)
    grid = (triton.cdiv(num_rows, tile["tile_rows"]) * triton.cdiv(width, tile["tile_width"]),)
    carried_up_kernel[grid](  # pyright: ignore[reportIndexIssue]
        *(z_MR, b_RF, carry_MF.contiguous(), gain_1, y_MF, num_rows, width),
        *(z_MR.stride(0), b_RF.stride(0)),
        rank=rank,
        **tile,
        upcast=INTERPRETED,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return y_MF


def _rows(tensor: Tensor) -> Tensor:
    """Items of a row side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def carry_gradients(dy_MF: Tensor, carry_MF: Tensor, gain_1: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``gain * dY`` and ``<dY, carry>``.

    Args:
        dy_MF, carry_MF: of one shape; made contiguous.
        gain_1: one item, any dtype; read in fp32.
    Returns: (M, F) in the dtype of ``dy_MF``; 0-d fp32.
    Cost: reads both once, writes one.
    Numerics: products and sums in fp32.
    """
    dy_MF, carry_MF = dy_MF.contiguous(), carry_MF.contiguous()
    dcarry_MF = torch.empty_like(dy_MF)
    num_programs = triton.cdiv(dy_MF.numel(), ITEMS_A_PROGRAM)
    sums = torch.zeros(num_programs, dtype=torch.float32, device=dy_MF.device)
    if num_programs:
        carry_gradients_kernel[(num_programs,)](  # pyright: ignore[reportIndexIssue]
            *(dy_MF, carry_MF, gain_1, dcarry_MF, sums, dy_MF.numel()),
            items=ITEMS_A_PROGRAM,
            tile=TILE_ITEMS,
            num_warps=NUM_WARPS,
        )
    return dcarry_MF, sums.sum()
