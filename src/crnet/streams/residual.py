"""The residual stream: every sublayer adds to it."""

from __future__ import annotations

from crnet.streams import Stream


class Residual(Stream):
    name = "residual"
    summary = "a sum: every sublayer adds its output"
    policies = ("none", "block", "replay", "invert")

    def make(self, sublayer_idx, num_sublayers, shape, options):
        from crnet.streams._add import Add

        return Add()


METHODS = [Residual()]
