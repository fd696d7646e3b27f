"""What the processes of ``test_parallel.py`` do: one start, run after run.

    torchrun ... parallel_runs.py FOLDER

FOLDER/runs.json lists the runs: name, configuration, whether it goes on, into which folder; RANK
in that is the process's own. Each is trained by all processes together; what a process sees of it
is in FOLDER/NAME.RANK.json, with the graphs that it compiled and the files that it hashed.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from crnet.config.serialize import from_dict
from crnet.errors import ConfigError
from crnet.storage import checkpoint
from crnet.train import run as training

HASHED: list[Path] = []
"""Files of checkpoints that this process has compared with their checksums in the latest run."""


def noting(path: Path, wanted: Any) -> None:
    HASHED.append(path)
    verify(path, wanted)


verify, checkpoint._verify_file = checkpoint._verify_file, noting


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    for each in json.loads((folder / "runs.json").read_text()):
        name, config = each["name"], from_dict(each["config"])
        out = folder / each["into"].replace("RANK", rank)
        counters.clear()
        HASHED.clear()
        try:
            result = training.run(config, out, resume=each["resume"], progress=False)
        except ConfigError as error:
            seen = {"refused": error.problems}
        except Exception:
            traceback.print_exc()
            raise
        else:
            after = result.after
            seen = {"step": result.step, "tokens": result.tokens, "loss": after and after.loss}
            seen["graphs"] = counters["stats"]["unique_graphs"]
            seen["verified"] = len(HASHED)
        (folder / f"{name}.{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
