"""Starting the processes of a run on this machine, by torch's own launcher."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from crnet.config.sections import ParallelConfig, num_processes

PROGRAM = __name__.partition(".")[0]


def starts_processes(parallel: ParallelConfig) -> bool:
    """Whether a run wants several processes, and nobody has started them."""
    return num_processes(parallel) > 1 and "WORLD_SIZE" not in os.environ


def launch(words: Sequence[str], parallel: ParallelConfig) -> int:
    """Run the program with ``words`` once for each process, and return the exit code: 0, or that of
    the first process that failed. The others are stopped then, as torchrun does.

    Threads are shared out between the processes, unless OMP_NUM_THREADS says otherwise.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What a process says is enough; torch's launcher would say in other words that it ended.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    count = num_processes(parallel)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", PROGRAM, *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"crnet: rank {rank} was ended by {failure.signal_name()}", file=sys.stderr)
            return 1
        return failure.exitcode
    except SignalException:  # the processes were asked to save and stop, and did
        return 0
    return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
