"""The seam between the trainer and the optimizers.

One file is one optimizer family; ``METHODS`` in it lists what it offers. The declarations import no
torch until they are asked to build, so that listing and costing them costs nothing.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from crnet.config import OptimizerConfig


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


@functools.cache
def _registry() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for info in pkgutil.iter_modules(__path__):
        for method in importlib.import_module(f"{__name__}.{info.name}").METHODS:
            if method.name in found:
                raise RuntimeError(f"two optimizers are named {method.name!r}")
            found[method.name] = method
    return found


def names() -> list[str]:
    """Every optimizer, sorted."""
    return sorted(_registry())


def get(name: str) -> Method:
    """The optimizer of that name. Raises ``ValueError`` if there is none."""
    try:
        return _registry()[name]
    except KeyError:
        raise ValueError(f"no optimizer is named {name!r}; known: {names()}") from None
