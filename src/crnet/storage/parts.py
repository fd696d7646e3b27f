"""Tensors that several processes hold parts of, in one folder, by torch's distributed checkpoints.

Every process writes its own parts; what was written by any number of processes, split in any way,
is read by any other number. Only tensors go in. torch keeps their index as a pickle, which can run
code when it is read: take such a checkpoint from nobody you do not trust (a whole one is safe).
"""

from __future__ import annotations

import importlib
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crnet.errors import ConfigError

PART = "part"
"""Key of a dict that stands for a tensor in a state: its name among the parts."""
INDEX, PART_FILE = ".metadata", ".distcp"
"""Name of the index of all parts; what the names of the files that hold them end with."""


def _checkpoints() -> Any:
    return importlib.import_module("torch.distributed.checkpoint")  # half a second


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of all processes into a folder; each process calls this.

    Args:
        tensors: by name. Whole ones that several processes have are written once.
    """
    dcp = _checkpoints()
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder))


def write_later(folder: Path, tensors: Mapping[str, Tensor], group: Any) -> Any:
    """As ``write``, from copies on the CPU, while the caller goes on; returns a future.

    ``group``: of the same processes, which nothing else uses meanwhile.
    """
    dcp = _checkpoints()
    writer = dcp.FileSystemWriter(folder)
    return dcp.async_save(dict(tensors), storage_writer=writer, process_group=group)


def declared(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every whole tensor, by name. Raises ``ConfigError``: it is damaged."""
    dcp = _checkpoints()
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except (OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{folder / INDEX}: cannot be read ({error})") from error
    found = {}
    for name, each in metadata.state_dict_metadata.items():
        if not hasattr(each, "size"):
            raise ConfigError(f"{folder / INDEX}: altered ({name} is no tensor)")
        found[name] = (tuple(each.size), each.properties.dtype)  # type: ignore[union-attr]
    return found


def read(folder: Path, names: list[str] | None = None) -> dict[str, Tensor]:
    """Whole tensors on the CPU, by name; all, or those named. No other process takes part."""
    known = declared(folder)
    wanted = known if names is None else {name: known[name] for name in names}
    found: dict[str, Tensor] = {
        name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items()
    }
    read_into(folder, found)
    return found


def read_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, whole ones or a process's part (DTensor), in place. No other process takes
    part: each reads what it needs."""
    dcp = _checkpoints()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process: it is meant
            dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{folder}: cannot be read ({reason})") from error


def named(state: Any) -> Iterator[str]:
    """The names of tensors that a state names and does not hold."""
    if isinstance(state, Mapping):
        if state.keys() == {PART}:
            yield state[PART]
        else:
            for each in state.values():
                yield from named(each)
    elif isinstance(state, (list, tuple)):
        for each in state:
            yield from named(each)


def put_in(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state with those tensors in the place of their names."""
    if isinstance(state, Mapping):
        if state.keys() == {PART}:
            return tensors[state[PART]]
        return {key: put_in(each, tensors) for key, each in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(put_in(each, tensors) for each in state)
    return state
