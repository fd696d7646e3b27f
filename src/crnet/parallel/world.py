"""The processes that share a run: which one this is, and what they tell each other.

torchrun starts them, and gives each its rank; ``joined`` brings them together. Everything that
several processes agree on goes through a ``World``; the only process of a run has one too
(``ALONE``), in which nothing is sent.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import resource
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from crnet.config.sections import SIZES, ParallelConfig, num_processes
from crnet.errors import ConfigError, ReportedError, TrainingError
from crnet.parallel.ending import leave_alone

T = TypeVar("T")

TIMEOUT_S = 1800
"""That a process waits for the others: reading a corpus and writing a checkpoint lie between."""
BEAT_S = 1.0
"""Between two signs of life of a process."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rank: int = 0
    size: int = 1
    mesh: Any = None
    """torch's ``DeviceMesh``, a dimension for each of ``SIZES``; None: one process."""
    rows: Any = None
    """Group of those that compute different rows with the same part of the model."""
    aside: Any = None
    """Group of all, on the CPU, for what goes on beside training."""
    pipe: Any = None
    """Group of those that compute the same rows with different stages, in the order of these."""
    parts: Any = None
    """Group of those that compute the same rows with different parts of every block."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes, and speaks."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """Which of how many equal shares of every batch this process computes."""
        if self.mesh is None:
            return 0, 1
        return dist.get_rank(self.rows), dist.get_world_size(self.rows)

    @property
    def part(self) -> tuple[int, int]:
        """Which of how many parts of every block this process computes."""
        if self.mesh is None:
            return 0, 1
        return dist.get_rank(self.parts), dist.get_world_size(self.parts)

    @property
    def keeper(self) -> int:
        """Rank of the process that gathers what those that compute other rows have of the same part
        of the model: the first of them."""
        return 0 if self.mesh is None else dist.get_global_rank(self.rows, 0)

    def sum(self, value: Tensor) -> Tensor:
        """Add ``value`` up over the shares of the batch, in place."""
        if self.mesh is not None:
            dist.all_reduce(value, group=self.rows)
        return value

    def any(self, flag: bool) -> bool:
        """Whether it holds on any process."""
        return bool(self.most(float(flag)))

    def most(self, value: float) -> float:
        """The largest value of all processes."""
        if self.size == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def on_first(self, do: Callable[[], T]) -> T:
        """What the first process finds; the others wait for it.

        Raises:
            ConfigError: ``do`` raised one: on the first process that, on all others a
                ``ReportedError``, which says nothing.
        """
        if self.size == 1:
            return do()
        found: list[Any] = [None, None]
        error = None
        if self.is_first:
            try:
                found[0] = do()
            except ConfigError as caught:
                error, found[1] = caught, caught.problems
        dist.broadcast_object_list(found, src=0)
        if error is not None:
            raise error
        if found[1] is not None:
            raise ReportedError(found[1])
        return found[0]

    def check_same(self, facts: Callable[[], dict[str, Any]]) -> None:
        """Raise ``ConfigError`` where a process has other facts than the first one (which, and
        what): a corpus or a version that differs between machines. One process asks for none."""
        if self.size == 1:
            return
        of_all: list[Any] = [None] * self.size
        dist.all_gather_object(of_all, facts())
        wrong = [
            f"process {rank} has {name} {found.get(name)!r}, the first one {wanted!r}; all "
            "processes of a run need the same"
            for rank, found in enumerate(of_all)
            for name, wanted in of_all[0].items()
            if found.get(name) != wanted
        ]
        if wrong:
            raise ConfigError(wrong) if self.is_first else ReportedError(wrong)

    @contextlib.contextmanager
    def naming_the_lost(self, where: Callable[[], str]) -> Iterator[None]:
        """Turn a lost connection into a ``TrainingError`` that names the processes that are gone.

        ``where``: what the run was at (step, last checkpoint).
        """
        if self.size == 1:
            yield
            return
        with _signs_of_life(self) as life:
            try:
                yield
            except RuntimeError as error:  # gloo's and NCCL's own
                if not _is_lost(error):
                    raise
                lost = life.lost()
                names = ", ".join(map(str, lost)) if lost else "unknown"
                reason = str(error).splitlines()[0][:200]
                raise TrainingError(
                    f"rank {names} of {self.size} is gone at {where()} ({reason}); go on with "
                    "--resume"
                ) from error


ALONE = World()


@contextlib.contextmanager
def joined(parallel: ParallelConfig) -> Iterator[World]:
    """Bring the processes that torchrun started together, for as long as the run lasts; those that
    the caller has brought together stay so.

    Raises:
        ConfigError: there are more or fewer processes than ``parallel`` shares the run between.
    """
    wanted, given = num_processes(parallel), int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != given:
        error = ConfigError if os.environ.get("RANK", "0") == "0" else ReportedError
        raise error(
            f"--parallel.* shares the run between {wanted} processes, and there "
            f"{'is' if given == 1 else 'are'} {given}; start it with torchrun --nproc-per-node "
            f"{wanted} -m crnet train ..., or let --parallel.* multiply to {given}"
        )
    if wanted == 1:
        yield ALONE
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(local_rank())
    if dist.is_initialized():
        yield _world(parallel, device)
        return
    _gather("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield _world(parallel, device)
    except BaseException:
        leave_alone()  # the others may be gone, and nothing more is agreed with them
        raise
    dist.destroy_process_group()


_gatherings = itertools.count()


def _gather(backend: str) -> None:
    """Bring the processes together, each time under names of its own: torchrun keeps one store, in
    which a process that is started again would find the addresses of those that are gone."""
    # Here: a torch that is built without them trains with one process.
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"start {start}, {next(_gatherings)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _world(parallel: ParallelConfig, device: str) -> World:
    from torch.distributed.device_mesh import init_device_mesh

    sizes = tuple(getattr(parallel, key) for key in SIZES)
    mesh = init_device_mesh(device, sizes, mesh_dim_names=SIZES)
    rows = mesh["data", "shard"]._flatten("rows").get_group()
    aside = dist.new_group(backend="gloo") if parallel.checkpoint == "parts" else None
    pipe = mesh["pipeline"].get_group()
    parts = mesh["tensor"].get_group()
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(parallel, rank, size, mesh, rows, aside, pipe, parts)


def local_rank() -> int:
    """Which process of its machine this one is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has held so far: of a GPU what torch took, else all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class _Life:
    """Signs of life of every process, in the store of the job (torchrun keeps it)."""

    def __init__(self, world: World):
        store: Any = dist.distributed_c10d._get_default_store()
        self.world, self._key = world, "life"
        self._store = store.clone()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        while not self._over.is_set():
            with contextlib.suppress(RuntimeError):  # the store is gone with its machine
                self._store.set(f"{self._key}/{self.world.rank}", str(count))
            count += 1
            self._over.wait(BEAT_S)

    def _counts(self) -> list[bytes | None]:
        keys = [f"{self._key}/{rank}" for rank in range(self.world.size)]
        return [self._store.get(key) if self._store.check([key]) else None for key in keys]

    def lost(self) -> list[int]:
        """The ranks that show no more signs of life. Cost: a few seconds."""
        try:
            before = self._counts()
            threading.Event().wait(3.5 * BEAT_S)
            after = self._counts()
        except RuntimeError:  # the store went with the machine that is gone
            return []
        return [rank for rank in range(self.world.size) if before[rank] == after[rank]]

    def end(self) -> None:
        self._over.set()
        self._thread.join(2 * BEAT_S)


@contextlib.contextmanager
def _signs_of_life(world: World) -> Iterator[_Life]:
    life = _Life(world)
    try:
        yield life
    finally:
        life.end()


def _is_lost(error: RuntimeError) -> bool:
    """Whether an error says that a connection to another process broke."""
    words = ("connection", "closed by peer", "gloo", "nccl", "socket", "timed out", "read error")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
