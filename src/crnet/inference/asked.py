"""What an evaluation may be asked for, and what of it would have no effect. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from crnet.errors import ConfigError

Protocol = Literal["rows", "document", "sliding", "compat"]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Of --tasks, and of --protocol compat."""

    num_fewshot: int | None = None
    """tasks: examples before each question; none: as the task has it."""
    limit: int | None = None
    """tasks: most documents of each."""
    batch_size: int | None = None
    """tasks: most rows of a batch; none: as many as 8,192 tokens have room for. compat: rows of a
    batch of one process."""
    processes: int | None = None
    """compat: processes that the figure is made for; none: one."""


COMPAT = ("--batch-size", "--processes")
"""Options of --protocol compat."""


def check_asked(
    protocol: str, has_tasks: bool, task_options: TaskOptions, cuts: Mapping[str, int | None]
) -> None:
    """Raise ``ConfigError`` for what is unknown, would have no effect, or is out of range.

    ``cuts``: --window and --stride.
    """
    options = {f"--{key.replace('_', '-')}": value for key, value in vars(task_options).items()}
    given = {flag: value for flag, value in (options | dict(cuts)).items() if value is not None}
    problems = []
    if protocol not in (known := Protocol.__args__):
        problems.append(f"--protocol is {protocol!r}; known are {', '.join(known)}")
    for flag, value in given.items():
        if flag in (COMPAT if protocol == "compat" else ()) and not has_tasks:
            if value < 1:
                problems.append(f"{flag} is {value}; it must be above zero")
        elif flag == "--processes":
            problems.append("--processes is of --protocol compat; say that, or leave it out")
        elif flag in options and not has_tasks:
            problems.append(f"{flag} is of --tasks; name some, or leave it out")
        elif flag in cuts and not has_tasks and protocol in ("rows", "compat"):
            problems.append(
                f"{flag} has no effect with --protocol {protocol}; say --protocol document or "
                "sliding, or leave it out"
            )
        elif flag == "--stride" and has_tasks:
            problems.append("--stride has no effect on --tasks; leave it out")
        elif flag in options and value < (0 if flag == "--num-fewshot" else 1):
            problems.append(f"{flag} is {value}; it must be above zero")
    if protocol == "compat" and not has_tasks and "--batch-size" not in given:
        problems.append(
            "--protocol compat: say --batch-size, the rows of a batch of one process in the run "
            "whose figure is to be met; the figure hangs on it"
        )
    if has_tasks and protocol != "rows":
        problems.append(f"--protocol {protocol} has no effect on --tasks; leave one of them out")
    if problems:
        raise ConfigError(problems)
