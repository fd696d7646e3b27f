"""What several streams declare alike. No torch."""

from __future__ import annotations

from crnet.specs import Passes, Shape, StreamWork, Traffic


def sum_work(size: int, written: int, is_cast: bool) -> StreamWork:
    """Of adding what a sublayer wrote to a tensor of the stream.

    Args:
        size: bytes of a tensor of the stream.
        written: of what the sublayer wrote.
        is_cast: whether the two have another dtype.
    """
    cast = Traffic(size + written, 1) if is_cast else Traffic()
    compiled = Traffic(size + written)  # in the norm that reads the sum
    return StreamWork(
        # Fused, the product of o or down adds to the stream instead of writing its output.
        passes=Passes(Traffic(2 * size + written, 1), compiled, Traffic(2 * size - written)),
        # The gradient past the sublayer, added to the one through it.
        backward_passes=Passes(
            Traffic(3 * size, 1) + cast,
            *[Traffic(size + (written if cast.kernels else 0))] * 2,
        ),
    )


def ends_block(sublayer_idx: int, num_sublayers: int, shape: Shape) -> bool:
    """Whether a sublayer, counted from the bottom of the model, is the last of its block."""
    return (sublayer_idx + 1) % (num_sublayers // shape.num_layers) == 0
