"""Finding the methods behind a seam: what is in the folder is known, nothing is listed."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any


@functools.cache
def discover(package: str) -> dict[str, Any]:
    """Every method of a package, by name: the items of ``METHODS`` of each of its modules.

    Raises:
        RuntimeError: two methods have one name.
    """
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        for method in importlib.import_module(f"{package}.{info.name}").METHODS:
            if method.name in found:
                raise RuntimeError(f"two methods of {package} are named {method.name!r}")
            found[method.name] = method
    return found


def find(package: str, name: str) -> Any:
    """The method of that name. Raises ``ValueError`` with the known names if there is none."""
    known = discover(package)
    if name not in known:
        raise ValueError(f"{package} has no {name!r}; known: {', '.join(sorted(known))}")
    return known[name]
