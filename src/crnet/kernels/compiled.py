"""Which kernels a device gets: the bodies of ``elementwise`` fused by torch's compiler, or plain.

On a CUDA device every plain operation reads and writes its tensors once, and a norm is a dozen of
them. ``fused`` makes one or two kernels of a body, without Triton code of our own; autograd does
not see it, so that it serves every recomputation policy. On a CPU the bodies run as they stand.

A graph is made for each shape and its configuration is never measured (``deterministic``): what is
computed hangs on the shape alone, not on which shapes came before. Recomputation and a resumed run
therefore rebuild the same bits. Only passes that may be differentiated are compiled: their shapes
are few, those of generation are not.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

Kernels = Literal["auto", "eager"]
"""auto: fused ones on a CUDA device where Triton works; eager: torch's own everywhere."""

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's own switch: its kernels run on a CPU, slowly, to be looked into and tested."""

_chosen: Kernels = "auto"
_everywhere: Any = None
"""Backend of ``compiled_everywhere``; None outside."""


def choose(kernels: Kernels) -> None:
    """From now on, in this process."""
    global _chosen
    _chosen = kernels


@contextlib.contextmanager
def compiled_everywhere(backend: Any = "inductor") -> Iterator[None]:
    """Meanwhile bodies are compiled on every device, by that backend of ``torch.compile``."""
    global _everywhere
    before, _everywhere = _everywhere, backend
    _compiled.cache_clear()
    try:
        yield
    finally:
        _everywhere = before
        _compiled.cache_clear()


def fused_on(device: torch.device) -> bool:
    """Whether tensors of a device are for fused kernels: CUDA, Triton works, ``choose`` allows."""
    return device.type == "cuda" and _chosen == "auto" and TRITON_WORKS


def takes_triton(tensor: Tensor) -> bool:
    """Whether a tensor is for kernels written in Triton."""
    return fused_on(tensor.device) or (INTERPRETED and _chosen == "auto")


def fused(body: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """``body``, compiled where ``tensor`` is for fused kernels.

    Args:
        body: a function of tensors, numbers and dtypes at the top of a module; writes to none of
            its arguments.
        tensor: one of the tensors it will get.
    Cost: the first call of a shape compiles, seconds; a call checks guards, some 20 us.
    """
    if torch.compiler.is_compiling():
        return body  # it becomes part of the graph being made
    plain = type(tensor) in (Tensor, torch.nn.Parameter)  # no fake one, which counts or traces
    if not (plain and (_everywhere or fused_on(tensor.device))):
        return body
    return functools.partial(_call, body)


def _call(body: Callable[..., Any], *arguments: Any) -> Any:
    # Detached, as a graph is also made for whether a tensor is a parameter, or wants a gradient:
    # a recomputation hands the same numbers over as other tensors.
    arguments = tuple(each.detach() if isinstance(each, Tensor) else each for each in arguments)
    return _compiled(body, shapes(arguments))(*arguments)


def shapes(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """A key of what a graph for fixed shapes was made from; numbers stand for themselves."""
    return tuple(
        (each.shape, each.stride(), each.dtype) if isinstance(each, Tensor) else each
        for each in arguments
    )


@functools.cache
def _compiled(body: Callable[..., Any], key: tuple[Any, ...]) -> Callable[..., Any]:
    return compiled(body, fullgraph=True, backend=_everywhere or "inductor")


def compiled(function: Any, *, fullgraph: bool, backend: Any = "inductor") -> Callable[..., Any]:
    """``function`` compiled for fixed shapes, with room for recompilations of its own.

    torch counts recompilations by code object and goes on uncompiled after eight; a copy of the
    code is counted for itself.
    """
    copy = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )
    options = _inductor_options() if backend == "inductor" else None
    return torch.compile(copy, fullgraph=fullgraph, dynamic=False, backend=backend, options=options)


def _inductor_options() -> dict[str, Any]:
    from torch._inductor import config  # takes a second: only where it is used

    return {"deterministic": True} if hasattr(config, "deterministic") else {}


def compiler_problem(device: torch.device) -> str | None:
    """Why ``torch.compile`` cannot work for a device, and the mend; None where it can."""
    if device.type == "cuda":
        return _cuda_problem()
    return _compiler_problem("CXX", ("clang++" if sys.platform == "darwin" else "g++",))


def _cuda_problem() -> str | None:
    if not HAS_TRITON:
        return "torch.compile needs Triton on a CUDA device: pip install triton"
    return _compiler_problem("CC", ("gcc", "clang"))  # for the code that launches a kernel


def _compiler_problem(variable: str, names: tuple[str, ...]) -> str | None:
    chosen = os.environ.get(variable)
    if any(shutil.which(name) for name in ((chosen,) if chosen else names)):
        return None
    sought = f"{variable} names {chosen}, which is not there" if chosen else "there is none"
    return f"torch.compile needs a compiler ({' or '.join(names)}), and {sought}: install one"


TRITON_WORKS = _cuda_problem() is None
"""Triton is installed, and a C compiler for the code that launches its kernels."""
