"""The seam between the trainer and the optimizers.

One file is one optimizer family; ``METHODS`` in it lists what it offers. The declarations import no
torch until they are asked to build, so that listing and costing them costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from crnet.registry import discover, find

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from crnet.config.sections import OptimizerConfig


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate and a weight decay."""

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    lr_factor: float
    decays: bool


class Method(Protocol):
    """What an optimizer answers."""

    name: str
    summary: str
    shards: bool
    """Can it run on parameters that are split over ranks?"""

    def build(self, groups: Iterable[Group], config: OptimizerConfig) -> Optimizer:
        """The optimizer; each of its ``param_groups`` keeps its ``lr_factor``."""
        ...

    def state_bytes(self, shape: tuple[int, ...], item_bytes: int) -> int:
        """Bytes of optimizer state that a parameter of this shape costs after the first step."""
        ...


def names() -> list[str]:
    """Every optimizer, sorted."""
    return sorted(discover(__name__))


def get(name: str) -> Method:
    """The optimizer of that name. Raises ``ValueError`` if there is none."""
    return find(__name__, name)
