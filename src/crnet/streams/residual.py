"""The residual stream: every sublayer adds to it."""

from __future__ import annotations

from crnet.specs import Passes, StreamWork, Traffic
from crnet.streams import Stream


class Residual(Stream):
    name = "residual"
    summary = "a sum: every sublayer adds its output"
    policies = ("none", "block", "replay", "invert")

    def work(self, sublayer_idx, num_sublayers, rows, hidden_size, item_bytes, written_bytes):
        if sublayer_idx == num_sublayers:
            return StreamWork()
        size, written = rows * hidden_size * item_bytes, rows * hidden_size * written_bytes
        cast = Traffic(size + written, 1) if item_bytes != written_bytes else Traffic()
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

    def make(self, sublayer_idx, num_sublayers, shape, options):
        from crnet.streams._add import Add

        return Add()


METHODS = [Residual()]
