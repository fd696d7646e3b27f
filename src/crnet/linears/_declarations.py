"""What several parameterizations declare alike: dense matrices and pairs of factors. No torch."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Literal

from crnet.specs import (
    OWN,
    Init,
    Passes,
    Product,
    Slot,
    TensorSpec,
    Traffic,
    Work,
    constant,
    in_each_way,
    normal,
)

FactorInit = Literal["balanced", "zero-b", "spectral"]

TABLE_RANKS = {
    "aligned-parameters": {
        (512, 8): "128",
        (768, 12): "256",
        (1024, 24): "256",
        (2048, 24): "512",
        (4096, 32): "1024",
    }
}
"""``published_ranks`` of plain low rank and what is compared with it: every table of the GaLore
family has these."""


def dense(slot: Slot) -> dict[str, TensorSpec]:
    """``weight`` (out, in), Gaussian, as ``nn.Linear`` and Hugging Face store it."""
    shape = (slot.out_size, slot.in_size)
    return {"weight": TensorSpec(shape, "matrix", normal(slot.init_std))}


def dense_work(slot: Slot, rows: int) -> Work:
    """Of ``x W^T``."""
    items = slot.in_size * slot.out_size
    return Work(
        forward_flops=2 * rows * items,
        backward_flops=4 * rows * items,
        weight_items=items,
        unrepeated_flops=2 * rows * items,
        products=(Product(rows, slot.in_size, slot.out_size),),
        backward_products=dense_backward(slot, rows),
    )


def dense_backward(slot: Slot, rows: int) -> tuple[Product, ...]:
    """The gradients of ``x`` and of ``W``."""
    return (
        Product(rows, slot.out_size, slot.in_size),
        Product(slot.out_size, rows, slot.in_size),
    )


def factors(slot: Slot, init: FactorInit, lr_factor: float) -> dict[str, TensorSpec]:
    """``A`` (in, rank) and ``B`` (rank, out), the paper's orientation.

    ``balanced``: both Gaussian with equal standard deviation ``(init_std / sqrt(R))^(1/2)``, so
    that an item of A B, a sum of R products, has standard deviation ``init_std``.
    ``zero-b``: A Gaussian of standard deviation ``D^(-1/2)``, B zero: the map starts at zero.
    ``spectral``: the best rank-R approximation of a dense Gaussian matrix
    (``_maps.spectral_factor``).
    """
    balanced = normal((slot.init_std / slot.rank**0.5) ** 0.5)
    initial: dict[str, tuple[Init, Init]] = {
        "balanced": (balanced, balanced),
        "zero-b": (normal(slot.in_size**-0.5), constant(0.0)),
        "spectral": (OWN, OWN),
    }
    return pair(slot, *initial[init], lr_factor)


def pair(slot: Slot, init_a: Init, init_b: Init, lr_factor: float = 1.0) -> dict[str, TensorSpec]:
    """``A`` (in, rank) and ``B`` (rank, out), each with an initial value of its own."""
    size_a, size_b = (slot.in_size, slot.rank), (slot.rank, slot.out_size)
    return {
        "A": TensorSpec(size_a, "factor_in", init_a, partner="B", lr_factor=lr_factor),
        "B": TensorSpec(size_b, "factor_out", init_b, partner="A", lr_factor=lr_factor),
    }


def by_both_widths(slot: Slot, lr_factor: float) -> dict[str, TensorSpec]:
    """A pair of standard deviation R^(-1/4) (D + F)^(-1/4) each: an item of A B has (D + F)^(-1/2).

    Source: CoLA, official code; DLR's has the same.
    """
    init = normal((slot.rank * (slot.in_size + slot.out_size)) ** -0.25)
    return pair(slot, init, init, lr_factor)


def factor_products(slot: Slot, rows: int) -> tuple[Product, ...]:
    """``x A`` and the bottleneck by ``B``."""
    return (
        Product(rows, slot.in_size, slot.rank),
        Product(rows, slot.rank, slot.out_size),
    )


def factor_backward(slot: Slot, rows: int) -> tuple[Product, ...]:
    """The gradients of the bottleneck, ``B``, ``A`` and ``x``."""
    return (
        Product(rows, slot.out_size, slot.rank),
        Product(slot.rank, rows, slot.out_size),
        Product(slot.in_size, rows, slot.rank),
        Product(rows, slot.rank, slot.in_size),
    )


def factors_work(slot: Slot, rows: int, item_bytes: int, gain_bytes: int = 0) -> Work:
    """Of ``(x A) B`` whose bottleneck ``x A`` is kept; with a carry also its gain."""
    items = slot.rank * (slot.in_size + slot.out_size)
    return Work(
        forward_flops=2 * rows * items,
        backward_flops=4 * rows * items,
        weight_items=items,
        kept_bytes=rows * slot.rank * item_bytes + gain_bytes,
        kept_items=(rows * slot.rank,),
        bottleneck_bytes=rows * slot.rank * item_bytes,
        rebuild_flops=2 * rows * slot.rank * slot.out_size,
        products=factor_products(slot, rows),
        backward_products=factor_backward(slot, rows),
    )


def updated_work(slot: Slot, rows: int, item_bytes: int) -> Work:
    """Of a frozen matrix and a pair of factors whose results are added up (``_updated``)."""
    frozen = slot.in_size * slot.out_size
    trained = slot.rank * (slot.in_size + slot.out_size)
    shrink, grow = factor_products(slot, rows)
    *of_factors, of_x = factor_backward(slot, rows)
    frozen_x, _ = dense_backward(slot, rows)
    scaled = slot.rank * (rows + slot.out_size)
    return Work(
        forward_flops=2 * rows * (frozen + trained),
        backward_flops=2 * rows * (frozen + 2 * trained),
        weight_items=frozen + trained,
        kept_bytes=rows * slot.rank * item_bytes,
        bottleneck_bytes=rows * (slot.out_size + slot.rank) * item_bytes,
        products=(Product(rows, slot.in_size, slot.out_size), shrink, _accumulated(grow)),
        backward_products=(*of_factors, _accumulated(of_x), frozen_x),
        # The scale, of dB and of dZ.
        backward_passes=in_each_way(2 * scaled * item_bytes, 2),
    )


def _accumulated(product: Product) -> Product:
    return dataclasses.replace(product, accumulates=True)


def activated_work(slot: Slot, rows: int, item_bytes: int) -> Work:
    """Of ``silu(x A) B`` whose bottleneck ``x A`` is kept."""
    activated = rows * slot.rank * item_bytes
    silu = Traffic(5 * activated, 2)
    return dataclasses.replace(
        factors_work(slot, rows, item_bytes),
        transient_bytes=activated,
        passes=Passes(Traffic(2 * activated, 1), Traffic(2 * activated, 1)),
        # SiLU once more, and its slope.
        backward_passes=Passes(silu, silu, Traffic(3 * activated, 1)),
    )


def inner_passes(items: int, item_bytes: int) -> Traffic:
    """Of ``kernels.carried.inner``: a dot in fp32, else a product, a sum and its rounding."""
    return (
        Traffic(2 * items * item_bytes, 1)
        if item_bytes == 4
        else Traffic(4 * items * item_bytes, 3)
    )


def share(frac: float, items: int) -> int:
    """``floor(frac items)`` of the decimal that was written: 0.29 of 100 items are 29."""
    return math.floor(Fraction(str(frac)) * items)


def above_zero(method: str, **values: float) -> list[str]:
    """A problem for each option of a method that is not above zero."""
    return [
        f"--model.{method}.{key.replace('_', '-')} is {value}; it must be above zero"
        for key, value in values.items()
        if not value > 0
    ]
