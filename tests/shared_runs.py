"""What the processes of a test do that trains shared runs: one start, run after run.

FOLDER/runs.json lists the runs (``test_parallel.Run``): name, configuration, whether it goes on,
into which folder; RANK in that is the process's own. Each is trained by all processes together.
What a process sees of it is in FOLDER/NAME.RANK.json: how it ended, or why it was refused.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from crnet.config.serialize import from_dict
from crnet.errors import ConfigError
from crnet.train import run as training

Seen = dict[str, Any]


def train_all(watched: Callable[[str], AbstractContextManager[Seen]]) -> None:
    """Train everything in the folder that the command line names.

    ``watched(name)``: around a run; gives what was seen besides, when it is left at the latest.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    for each in json.loads((folder / "runs.json").read_text()):
        name, config = each["name"], from_dict(each["config"])
        out = folder / each["into"].replace("RANK", rank)
        with watched(name) as seen:
            try:
                result = training.run(config, out, resume=each["resume"], progress=False)
            except ConfigError as error:
                seen["refused"] = error.problems
            except Exception:
                traceback.print_exc()
                raise
            else:
                after = result.after
                seen["told"] = [result.step, result.tokens, after and after.loss]
        (folder / f"{name}.{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()
