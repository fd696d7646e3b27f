"""Pre-training language models with cross-layer low-rank structure (CR-Net, arXiv:2509.18993).

The names below are the package from Python (docs/python.md). Nothing is imported before it is
asked for: ``import crnet`` costs no torch.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from crnet.api import Loaded as Loaded
    from crnet.api import batches as batches
    from crnet.api import build as build
    from crnet.api import configure as configure
    from crnet.api import cost as cost
    from crnet.api import evaluate as evaluate
    from crnet.api import finetune as finetune
    from crnet.api import generate as generate
    from crnet.api import load as load
    from crnet.api import observe as observe
    from crnet.api import tokenizer as tokenizer
    from crnet.api import train as train
    from crnet.convert import convert_linears as convert_linears
    from crnet.convert import parameter_groups as parameter_groups
    from crnet.errors import ConfigError as ConfigError
    from crnet.errors import TrainingError as TrainingError

_HOMES = {
    **dict.fromkeys(("Loaded", "batches", "build", "configure", "evaluate"), "crnet.api"),
    **dict.fromkeys(("finetune", "generate", "load", "observe", "tokenizer"), "crnet.api"),
    **dict.fromkeys(("convert_linears", "parameter_groups"), "crnet.convert"),
    **dict.fromkeys(("ConfigError", "TrainingError"), "crnet.errors"),
}
"""Public name -> the module that has it."""
_VERBS = ("cost", "train")
"""Public functions of ``crnet.api`` that folders of the package are named like."""

__all__ = [*_HOMES, *_VERBS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _VERBS:
        return importlib.import_module(f"crnet.{name}")
    raise AttributeError(f"module 'crnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Verb(ModuleType):
    """A folder that is named like a function of ``crnet.api``: to call it is to call that.

    Python binds a folder to the package as soon as anything in it is imported; what a name means
    must not hang on that. Refused: another name for the folder or for the function.
    """

    def __call__(self, *args: Any, **keys: Any) -> Any:
        return self._function()(*args, **keys)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function())

    def _function(self) -> Any:
        api = importlib.import_module("crnet.api")
        return getattr(api, self.__name__.rpartition(".")[2])


def make_verb(name: str) -> None:
    """Make the folder of that full name callable; its ``__init__`` asks for it."""
    assert name.rpartition(".")[2] in _VERBS, name
    sys.modules[name].__class__ = _Verb
