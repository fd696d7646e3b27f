"""Elementwise work that architectures share, kernel by kernel: norms, rotation, activations.

Each function returns the forward and the backward pass, as ``kernels/elementwise.py`` and torch
carry them out (``tests/test_clock.py`` counts them). Bytes of an item: ``e`` of what products read,
``s`` of the stream; statistics are fp32. No torch.
"""

from __future__ import annotations

from crnet.specs import Passes, Traffic, in_each_way

Both = tuple[Passes, Passes]
"""Forward and backward."""


def rms_norm(rows: int, width: int, s: int, e: int) -> Both:
    """``kernels.elementwise.rms_norm`` of the stream."""
    items, row = rows * width, 4 * rows
    is_cast, is_narrow = e < 4, s < 4
    # Norm, x * inverse, * weight; four operations on one number a row; casts.
    forward = 4 + 8 + 2 * e + (4 + e) * is_cast + (4 + s) * is_narrow
    forward_kernels = 7 + is_cast * (1 + (s != e)) + is_narrow
    # x * inverse; dy normed, summed; dy weight; the inner product; two updates in place.
    backward = (s + 4) + 16 + 8 + 16 + 12 + 8 + (4 + e) * is_cast + (4 + s) * is_narrow
    backward_kernels = 9 + is_cast + 2 * is_narrow
    inside = Traffic((s + e) * items + row, 1)
    back = Traffic((2 * s + e + s + e) * items + 2 * row, 2)
    return (
        Passes(Traffic(forward * items + 12 * row, forward_kernels), inside, inside),
        Passes(Traffic(backward * items + 6 * row, backward_kernels), back, back),
    )


def layer_norm(rows: int, width: int, s: int, e: int) -> Both:
    """torch's, a kernel each way and one for gains and biases; casts around it."""
    items, cast = rows * width, s != e
    forward = Traffic((2 * s + (s + e) * cast) * items, 1 + cast)
    backward = Traffic((3 * s + (s + e) * cast) * items, 1 + cast) + Traffic(2 * s * items, 1)
    inside, back = Traffic((s + e) * items, 1), Traffic((3 * s + 2 * e) * items, 2)
    return Passes(forward, inside, inside), Passes(backward, back, back)


def rotation(rows: int, width: int, e: int) -> Both:
    """``kernels.elementwise.rotate`` of queries or keys: three strided kernels a half.

    Fused forward it is in the product that makes them.
    """
    eager = Traffic(7 * e * rows * width, 6)
    compiled = Traffic(2 * e * rows * width, 1)
    return Passes(eager, compiled, Traffic()), Passes(eager, compiled, compiled)


def swiglu(rows: int, width: int, e: int) -> Both:
    """``kernels.elementwise.swiglu``. Fused forward it writes its result beside gate and up."""
    size = rows * width * e
    back = Traffic(5 * size, 1)
    return (
        Passes(Traffic(5 * size, 2), Traffic(3 * size, 1), Traffic(size)),
        Passes(Traffic(11 * size, 4), back, back),
    )


def product_of_two(rows: int, width: int, e: int) -> Both:
    """gate * up."""
    size = rows * width * e
    ahead, back = Traffic(3 * size, 1), Traffic(5 * size, 1)
    return Passes(ahead, ahead, Traffic(size)), Passes(Traffic(6 * size, 2), back, back)


def gelu(rows: int, width: int, e: int) -> Both:
    """torch's, a kernel each way."""
    size = rows * width * e
    ahead = Traffic(2 * size, 1)
    return Passes(ahead, ahead, Traffic(size)), in_each_way(3 * size, 1)


def bias(rows: int, width: int, e: int) -> Both:
    """Added to an output; its gradient is a sum over rows."""
    size = rows * width * e
    return Passes(Traffic(2 * size, 1)), in_each_way(size, 1)


def total(parts: list[Both]) -> Both:
    """Of all, forward and backward."""
    forward, backward = Passes(), Passes()
    for ahead, back in parts:
        forward, backward = forward + ahead, backward + back
    return forward, backward
