"""Maps of the package as PEFT wraps them, and as a block calls what PEFT made of them.

PEFT wraps what it takes for a linear layer: ``base(x) + update(x)``. A map of ours is called with a
carry too and hands something on, so ``adaptable`` makes the maps of a model linear layers to PEFT,
and tells every block to call a wrapped map (``AdaptedMap``) so that

    the output, and the carry where a map hands on its output, have the update in them

as if the map's own rank were larger. A map that hands on its bottleneck hands on that of the base.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from crnet.errors import ConfigError
from crnet.layers.block import Block
from crnet.layers.projector import with_bias
from crnet.linears._maps import Known, LinearMap

Model = TypeVar("Model", bound=nn.Module)


class _NoMatrix(Tensor):
    """In the place of a map's matrix: tells shape, dtype and device, and refuses to be computed
    with."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") not in ("__get__", "is_floating_point", "is_complex"):
            raise ConfigError(
                "this adapter computes with the matrix of a map, and a map of this model is none; "
                "take one that adds to the output (LoRA, RandLoRA, VeRA) or scales it (IA3), and "
                "keep it apart instead of merging it"
            )
        return super().__torch_function__(func, types, args, kwargs or {})


class _DenseToPeft(nn.Linear):
    """Beside a map's own class. Called as PEFT calls a layer it returns the output alone."""

    run: Any

    def forward(
        self,
        input: Any,
        carry: Any = None,
        known: Any = None,
        handed: Any = None,
        adds_bias: bool = False,
    ) -> Any:
        output, hands_on = self.run(input, carry, known)
        if handed is None:
            return output, hands_on
        handed.append(hands_on)
        return with_bias(self, output) if adds_bias else output


class _FactorsToPeft(_DenseToPeft):
    """The same of a map that has no matrix."""

    @property
    def weight(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        like = next(each for each in self.parameters(recurse=False) if each.is_floating_point())
        shape = (self.out_features, self.in_features)
        return like.detach().new_empty(1).expand(shape).as_subclass(_NoMatrix)


def adaptable(model: Model) -> Model:
    """Let PEFT take the maps of a model for linear layers, from now on; returns the model.

    Left out are maps with a matrix and more (an update of their own, a carry that mixes in before):
    what computes with that matrix alone would be wrong, and PEFT says that it does not know them.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.as_map = as_map
        if isinstance(module, LinearMap) and not isinstance(module, nn.Linear):
            names = {name for name, _ in module.named_parameters(recurse=False)} - {"bias"}
            if names == {"weight"}:
                module.__class__ = _beside(_DenseToPeft, type(module))
            elif "weight" not in names:
                module.__class__ = _beside(_FactorsToPeft, type(module))
    return model


@functools.cache
def _beside(linear: type[nn.Linear], kind: type[LinearMap]) -> type:
    return type(kind.__name__, (linear, kind), {})


class AdaptedMap:
    """A map that PEFT has wrapped, called as a block and a recomputation call a map.

    It does not come apart: under ``replay`` its output is kept, and it runs once more.
    """

    comes_apart = False
    carry_dtype = None
    sums = None

    def __init__(self, wrapped: Any, is_read: bool):
        """``is_read``: whether a later block reads it; the output is handed on without the bias
        then, and else the bias is there before the adapter does its part, as PEFT has it."""
        self.wrapped, self.is_read = wrapped, is_read
        self.base: LinearMap = wrapped.get_base_layer()
        self.hands: Literal["output", "bottleneck"] = self.base.hands
        self.shared = self.base.shared

    def __call__(
        self, x_BTD: Tensor, carry: Tensor | None, known: Known | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``LinearMap.forward``."""
        return self.run(x_BTD, carry, known)

    def run(
        self, x_BTD: Tensor, carry: Tensor | None, known: Known | None
    ) -> tuple[Tensor, Tensor]:
        """As ``LinearMap.run``."""
        assert known is None, "a map with an adapter does not come apart"
        handed: list[Tensor] = []
        output = self.wrapped(x_BTD, carry, None, handed=handed, adds_bias=not self.is_read)
        return output, output if self.hands == "output" else handed[0]

    def bias_to_add(self) -> Tensor | None:
        """As of ``LinearMap``: None where PEFT has it added."""
        return self.base.bias_to_add() if self.is_read else None

    def modules(self) -> Any:
        """Those of which forward hooks would be passed over."""
        return self.wrapped.modules()


def as_map(module: Any, is_read: bool) -> Any:
    """What a block calls, of what stands in a map's place."""
    return module if isinstance(module, LinearMap) else AdaptedMap(module, is_read)
