"""The residual stream: every sublayer adds to it."""

from __future__ import annotations

from crnet.streams import Stream


class Residual(Stream):
    name = "residual"
    summary = "a sum: every sublayer adds its output"
    policies = ("none", "block", "replay", "invert")

    def make(self, sublayer_idx, num_sublayers, shape, options):
        from torch import nn

        class Add(nn.Module):
            def read(self, state):
                return state[0]

            def write(self, state, y_BTD):
                # The stream keeps its dtype, whatever that of the outputs; the sum widens narrower
                # ones.
                (x_BTD,) = state
                wider = y_BTD.dtype.itemsize > x_BTD.dtype.itemsize
                return (x_BTD + (y_BTD.to(x_BTD.dtype) if wider else y_BTD),)

        return Add()


METHODS = [Residual()]
