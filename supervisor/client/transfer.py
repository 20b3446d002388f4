"""A pull as it goes on: one line of progress that is drawn anew on a terminal, a line for each step elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, TextIO

from planner.units import format_size
from supervisor.client.service import ServiceError

CLEAR_LINE: Final = "\r\x1b[K"
BAR: Final = 24  # characters


@dataclass(slots=True)
class Transfer:
    """Shows the steps of a pull or a create. ``parts`` are those under way: bytes there, bytes in all."""

    out: TextIO
    is_terminal: bool
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    shown: str = ""
    begun: set[str] = field(default_factory=set)

    def follow(self, lines: Iterable[str]) -> None:
        """Show each line (an object of Ollama's API) until the last. Raises ServiceError for what ended it."""
        succeeded = False
        for line in lines:
            if not line:
                continue
            step = json.loads(line)
            if "error" in step:
                self._end_line()
                raise ServiceError(step["error"])
            succeeded = step["status"] == "success"
            self.show(step["status"], step.get("digest"), step.get("completed"), step.get("total"))
        self._end_line()
        if not succeeded:
            raise ServiceError("the connection to the service was lost; do it again: what was fetched is kept")

    def show(
        self, status: str, digest: str | None = None, completed: int | None = None, total: int | None = None
    ) -> None:
        """Show one step; one of a part that has a digest moves the bar on."""
        if digest is not None and total:
            self.parts[digest] = (completed or 0, total)
        if digest is not None and self.is_terminal:
            self.out.write(CLEAR_LINE + self._bar())
            self.out.flush()
            self.shown = "bar"
        elif status != self.shown and status not in self.begun:
            if digest is not None:
                self.begun.add(status)  # parts come side by side, and each is told of once
            self._end_line()
            self.out.write(f"{status}\n")
            self.out.flush()
            self.shown = status

    def _bar(self) -> str:
        done, total = (sum(each) for each in zip(*self.parts.values(), strict=True))
        filled = BAR * done // total
        bar = "#" * filled + "." * (BAR - filled)
        return f"[{bar}] {100 * done // total:3} %  {format_size(done)} of {format_size(total)}"

    def _end_line(self) -> None:
        if self.shown == "bar":
            self.out.write("\n")
            self.shown = ""
