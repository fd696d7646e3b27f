"""What a resumed run may have otherwise than it began: declared where a key is declared.

``Fixed``: the run keeps it, and another value is refused. ``Free``: another value is applied, and
said. A key is free where a user has a reason to change it midway and every figure that it changes
stands in the record (the rate, the step, the memory); it is fixed where what was trained so far
would silently mean something else. A method's option is fixed unless it says otherwise, and so is
one of a method from outside.
"""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

T = TypeVar("T")


class OnResume(enum.Enum):
    """What becomes of another value when a run goes on."""

    REFUSED = "refused"
    APPLIED = "applied"


Fixed = Annotated[T, OnResume.REFUSED]
"""Type of a key that a resumed run keeps: ``steps: Fixed[int]``."""
Free = Annotated[T, OnResume.APPLIED]
"""Type of a key that a resumed run may have otherwise; that it does is said."""


@dataclass(frozen=True)
class Change:
    """A key that a resumed run has otherwise than it began."""

    flag: str
    was: Any
    now: Any
    rule: OnResume


def declared_rule(cls: type, key: str) -> OnResume | None:
    """What a dataclass declares of one of its keys; None: nothing."""
    hint = typing.get_type_hints(cls, include_extras=True)[key]
    marks = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, OnResume)]
    return marks[-1] if marks else None


def changes(was: Any, now: Any, prefix: str = "--") -> Iterator[Change]:
    """Every key, down to the options of methods, in which two configurations differ.

    Args:
        was, now: instances of one dataclass.
        prefix: what its flags begin with.
    """
    for field in dataclasses.fields(was):
        old, new = getattr(was, field.name), getattr(now, field.name)
        flag = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(old):
            yield from changes(old, new, f"{flag}.")
        elif old != new:
            rule = declared_rule(type(was), field.name) or OnResume.REFUSED
            yield Change(flag, old, new, rule)
