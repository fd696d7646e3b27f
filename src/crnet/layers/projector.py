"""How a block carries out its linear maps and the mixing of its tokens.

A block asks a projector for the output of a position by its name. ``Projector`` calls the maps; a
recomputation passes another one, keyed by the same names, so that the order in which a block asks
for its maps does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from torch import Tensor

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values -> mixed values, (B, N, T, H)."""


class Projector:
    """Every map by its own forward; notes what later blocks read."""

    def __init__(
        self, maps: Mapping[str, Any], carries: Mapping[str, Tensor], hands: Sequence[str]
    ):
        self.maps, self.carries, self.hands = maps, carries, hands
        self.asked: set[str] = set()
        self.handed: dict[str, Tensor] = {}
        """By position: what the maps hand on."""

    def __call__(self, position: str, x_BTD: Tensor) -> Tensor:
        """Output of the map of that position, its bias added."""
        linear = self.maps[position]
        refuse_second(position, self.asked)
        self.asked.add(position)
        output, handed = linear(x_BTD, self.carries.get(position))
        if position in self.hands:
            self.handed[position] = handed
        return with_bias(linear, output)

    def attend(self, mix: Mix, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
        """``mix(q, k, v)``."""
        return mix(q_BNTH, k_BKSH, v_BKSH)

    def wrote(self, position: str, y_BTD: Tensor) -> None:
        """Told what the sublayer that asked for that position writes to the stream."""


def refuse_second(position: str, answered: Container[str]) -> None:
    """Raise ``RuntimeError`` where a block asks for a map that it has asked for before."""
    if position in answered:
        raise RuntimeError(f"a block asks for the map {position} twice in one pass")


def with_bias(linear: Any, output: Tensor) -> Tensor:
    """The output plus the bias of the map's position, where it has one."""
    bias = linear.bias_to_add()
    return output if bias is None else output + bias.to(output.dtype)
