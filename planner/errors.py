"""What can be wrong with a question to the planner. Each error is one line: what is wrong, where, what to do.

``exit_status`` is what the command line ends with (sysexits' EX_DATAERR for files, 2 for wrong usage).
"""

from __future__ import annotations

from typing import ClassVar


class PlannerError(Exception):
    """An answer cannot be computed, and the text says why. Raised only as one of the two below."""

    exit_status: ClassVar[int] = 1


class ModelFileError(PlannerError):
    """The model's file cannot be read or is not a model that anything here can load."""

    exit_status = 65

    def __init__(self, path: str, problem: str, remedy: str = "") -> None:
        """Compose the line; ``remedy`` is what the user can do about it."""
        super().__init__(f"{path}: {problem}" + (f"; {remedy}" if remedy else ""))
        self.path = path
        self.problem = problem


class InvalidRequest(PlannerError):
    """A flag's value, or flags together, make no sense for any model."""

    exit_status = 2
