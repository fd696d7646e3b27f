"""What the processes of ``test_tensor.py`` do: one start, run after run.

    torchrun ... tensor_runs.py FOLDER

FOLDER/runs.json lists the runs: name, configuration, whether it goes on. Each is trained into
FOLDER/NAME by all processes together; what a process sees of it is in FOLDER/NAME.RANK.json: among
it the bytes of every sum over processes that compute a block in parts, in the last step, a hash of
the weights that each of them has whole, and the bytes of those that it has.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from crnet.config.serialize import from_dict
from crnet.errors import ConfigError
from crnet.parallel.whole import is_split, whole
from crnet.train import run as training
from crnet.train.step import Step

SUMS: list[int] = []
"""Bytes of each sum of the step that is under way, or was the last one."""
HELD = [0]
"""Bytes of the weights that this process has after the latest step. (After an evaluation torch
leaves what is around the blocks whole.)"""
GROUPS: list[Any] = [None]
MODELS: list[Any] = [None]
"""That of the latest step."""


def count_sums() -> None:
    """Note every sum over the processes of ``--parallel.tensor``, step by step."""
    all_reduce, call = dist.all_reduce, Step.__call__

    def counting(tensor: torch.Tensor, *args: Any, group: Any = None, **more: Any) -> Any:
        if group is not None and group is GROUPS[0]:
            SUMS.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, group=group, **more)

    def stepping(self: Step, *args: Any) -> Any:
        GROUPS[0], MODELS[0] = self.world.parts, self.model
        SUMS.clear()
        try:
            return call(self, *args)
        finally:
            GROUPS[0] = None
            HELD[0] = held_bytes()

    dist.all_reduce, Step.__call__ = counting, stepping


def hash_of_whole_weights() -> str:
    """Of the bits of what is no part."""
    model, found = MODELS[0], hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name not in model.spec.split_dims:
            found.update(whole(parameter.detach()).numpy().tobytes())
    return found.hexdigest()


def held_bytes() -> int:
    parameters = MODELS[0].parameters()
    return sum((it.to_local() if is_split(it) else it).nbytes for it in parameters)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    count_sums()
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    for each in json.loads((folder / "runs.json").read_text()):
        name, config = each["name"], from_dict(each["config"])
        try:
            result = training.run(config, folder / name, resume=each["resume"], progress=False)
        except ConfigError as error:
            seen: dict[str, Any] = {"refused": error.problems}
        except Exception:
            traceback.print_exc()
            raise
        else:
            after = result.after
            seen = {"step": result.step, "loss": after and after.loss, "sums": [*SUMS]}
            seen |= {"whole weights": hash_of_whole_weights(), "held": HELD[0]}
        (folder / f"{name}.{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
