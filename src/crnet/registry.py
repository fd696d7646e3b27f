"""Finding the methods behind a seam: what is in the folder is known, nothing is listed.

Methods also come from outside: from Python files (``load_plugins``) and from installed packages
that have an entry point of the group ``crnet.plugins``, which names a module. Either holds
``METHODS``, a list of instances; each belongs to the seam whose base class it derives from.

A configuration's classes are made from the methods that are known when they are first imported, so
plugins come before that. A plugin that asks for the methods while it is loaded is refused: the
answer would lack its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from crnet.errors import ConfigError

GROUP = "crnet.plugins"
"""Of the entry points of installed packages."""

FILE_PREFIX = "crnet_plugin_"
"""Of the name of a module that was a file; the file's stem follows."""


@dataclass(frozen=True)
class Plugin:
    """Where methods from outside the package came from."""

    name: str
    """Of the module."""
    path: Path
    sha256: str
    """Of the file's bytes."""


_loaded: dict[Plugin, list[Any]] = {}
_loading: list[str] = []  # the plugin that is being executed, if one is


def load_plugins(paths: Sequence[Path]) -> None:
    """Execute Python files and keep the methods that they list. One that is loaded is passed over.

    Raises:
        ConfigError: a file is missing, is no Python, fails, lists no methods, or has the name of
            another plugin; nothing of that file is kept then.
    """
    for path in paths:
        _load_file(path.expanduser().absolute())


def plugins() -> tuple[Plugin, ...]:
    """Every plugin, in the order of loading: those of installed packages last."""
    _load_entry_points()
    return tuple(_loaded)


def plugin_methods(path: Path) -> list[Any]:
    """What ``METHODS`` of a loaded file held."""
    path = path.expanduser().absolute()
    return next(methods for plugin, methods in _loaded.items() if plugin.path == path)


@functools.cache
def discover(package: str, base: type | None = None) -> dict[str, Any]:
    """Every method of a package, by name: the items of ``METHODS`` of each of its modules.

    Modules whose name starts with an underscore are shared parts and passed over. With ``base``,
    the plugins' instances of it follow.

    Raises:
        ConfigError: two methods have one name, an installed package's plugin cannot be loaded,
            or a plugin that is being loaded asks.
    """
    if _loading:
        raise ConfigError(
            f"{_loading[-1]}: imports a module that asks for the methods of {package}, while its "
            "own are not yet known; import it inside the function that needs it"
        )
    found: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def add(method: Any, source: str) -> None:
        if method.name in found:
            raise ConfigError(
                f"{package} has two methods named {method.name!r}: of {sources[method.name]} and "
                f"of {source}; rename one"
            )
        found[method.name] = method
        sources[method.name] = source

    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not info.name.startswith("_"):
            module = f"{package}.{info.name}"
            for method in importlib.import_module(module).METHODS:
                add(method, module)
    if base is not None:
        _load_entry_points()
        for plugin, methods in _loaded.items():
            for method in methods:
                if isinstance(method, base):
                    add(method, str(plugin.path))
    return found


def find(package: str, name: str, base: type | None = None) -> Any:
    """The method of that name. Raises ``ValueError`` with the known names if there is none."""
    known = discover(package, base)
    if name not in known:
        raise ValueError(f"{package} has no {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def _load_file(path: Path) -> None:
    name = FILE_PREFIX + re.sub(r"\W", "_", path.stem)
    if path.suffix != ".py":
        raise ConfigError(f"--plugins {path}: is no Python file; name one that ends in .py")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--plugins {path}: cannot be read ({error.strerror}); check the path"
        ) from error
    plugin = Plugin(name, path, hashlib.sha256(content).hexdigest())
    if plugin in _loaded:
        return
    for other in _loaded:
        if other.name == name:
            raise ConfigError(
                f"--plugins {path}: {other.path} is loaded as {name} already; rename one of them"
                if other.path != path
                else f"--plugins {path}: has changed since it was loaded; start anew"
            )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # Compiled here: these are the bytes whose hash is kept, and no cache of others is read.
        with _executing(f"--plugins {path}"):
            exec(compile(content, str(path), "exec", dont_inherit=True), module.__dict__)
        _keep(plugin, _methods(module, f"--plugins {path}"))
    except BaseException:
        del sys.modules[name]
        raise


@functools.cache
def _load_entry_points() -> None:
    """Once a process. Raises ``ConfigError`` if a package's plugin cannot be used."""
    from importlib import metadata  # slow, and many commands ask for no method

    for entry in metadata.entry_points(group=GROUP):
        distribution = entry.dist.name if entry.dist else "an installed package"
        source = f"the plugin {entry.name} ({entry.value}) of {distribution}"
        with _executing(source):
            module = entry.load()
        if not isinstance(module, ModuleType) or not module.__file__:
            raise ConfigError(
                f"{source}: is no module; name one in its entry point, without a colon"
            )
        path = Path(module.__file__)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        _keep(Plugin(module.__name__, path, digest), _methods(module, source))


@contextlib.contextmanager
def _executing(source: str) -> Iterator[None]:
    _loading.append(source)
    try:
        yield
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"{source}: is not valid Python ({error})") from error
    except (Exception, SystemExit) as error:  # whatever another's code raises
        raise ConfigError(
            f"{source}: fails when it is loaded ({type(error).__name__}: {error}); mend it there"
        ) from error
    finally:
        _loading.pop()


def _methods(module: ModuleType, source: str) -> list[Any]:
    if not hasattr(module, "METHODS"):
        raise ConfigError(f"{source}: has no METHODS; list its methods, METHODS = [MyMethod()]")
    methods = module.METHODS
    if not isinstance(methods, (list, tuple)):
        raise ConfigError(f"{source}: METHODS is {methods!r}; make it a list, [MyMethod()]")
    if not methods:
        raise ConfigError(f"{source}: METHODS is empty; list its methods, METHODS = [MyMethod()]")
    for method in methods:
        if isinstance(method, type):
            raise ConfigError(
                f"{source}: METHODS holds the class {method.__name__}; list an instance, "
                f"{method.__name__}()"
            )
        if not isinstance(getattr(method, "name", None), str):
            raise ConfigError(f"{source}: {method!r} in METHODS has no name; give it one, a str")
    return list(methods)


def _keep(plugin: Plugin, methods: list[Any]) -> None:
    _loaded[plugin] = methods
    discover.cache_clear()
