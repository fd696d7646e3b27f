"""The module of the residual stream. One class for all blocks: compiled blocks share a graph by
the types of their parts."""

from __future__ import annotations

from torch import Tensor, nn


class Add(nn.Module):
    """Reads the stream, adds to it."""

    def read(self, state: tuple[Tensor, ...]) -> Tensor:
        """The stream."""
        return state[0]

    def write(self, state: tuple[Tensor, ...], y_BTD: Tensor) -> tuple[Tensor, ...]:
        """The sum in the stream's dtype, whatever that of the output; it widens a narrower one."""
        (x_BTD,) = state
        wider = y_BTD.dtype.itemsize > x_BTD.dtype.itemsize
        return (x_BTD + (y_BTD.to(x_BTD.dtype) if wider else y_BTD),)
