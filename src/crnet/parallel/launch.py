"""Starting the processes of a run on this machine, by torch's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from crnet.config.sections import ParallelConfig, num_processes
from crnet.parallel.cores import num_cores

PROGRAM = __name__.partition(".")[0]
ENDS = "CRNET_ENDS"
"""Names a folder in which every process that was started here notes that its run has ended well."""
SAVING_S = 300
"""For processes to end after a signal; torch's own half a minute is short for a checkpoint."""


def starts_processes(parallel: ParallelConfig) -> bool:
    """Whether a run wants several processes, and nobody has started them."""
    return num_processes(parallel) > 1 and "WORLD_SIZE" not in os.environ


def launch(words: Sequence[str], parallel: ParallelConfig) -> int:
    """Run the program with ``words`` once for each process, and return the exit code: 0, or that of
    the first process that failed. The others are stopped then, as torchrun does.

    A signal is passed on. Where all of them save and end, that is 0; else this process ends by the
    signal too, as a run of one does that has nothing to save yet.

    Threads are shared out between the processes, unless OMP_NUM_THREADS says otherwise.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What a process says is enough; torch's launcher would say in other words that it ended.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    count = num_processes(parallel)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=SAVING_S,
    )
    with tempfile.TemporaryDirectory() as ends:
        os.environ[ENDS] = ends
        try:
            elastic_launch(config, sys.executable)("-m", PROGRAM, *words)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                print(f"crnet: rank {rank} was ended by {failure.signal_name()}", file=sys.stderr)
                return 1
            return failure.exitcode
        except SignalException as error:  # torch has waited until all of them had ended
            if len(os.listdir(ends)) == count:
                return 0
            received = error.sigval
        else:
            return 0
    if received == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(received, signal.SIG_DFL)
    os.kill(os.getpid(), received)
    return 1  # only where the signal is blocked


def note_end() -> None:
    """Say that the run of this process ended well, to ``launch``, if it started this process."""
    if ENDS in os.environ:
        (Path(os.environ[ENDS]) / os.environ["RANK"]).touch()
