"""The errors that a user meets."""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """The configuration, or an input it names, cannot be used. ``problems`` lists every reason."""

    def __init__(self, problems: Iterable[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class TrainingError(RuntimeError):
    """Training cannot go on: a loss or a gradient is no longer a finite number, or a process of the
    run is gone."""


class ReportedError(ConfigError):
    """One that another process of the run has said already."""
