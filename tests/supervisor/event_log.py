"""The service's own log as something that a test can wait on."""

from __future__ import annotations

from typing import Any

import anyio
import structlog

WITHIN_S = 30.0  # a bound for two busy cores; nothing takes a second


class EventLog:
    """What was logged, and a way to wait for more of it."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._more = anyio.Event()

    def __call__(self, _logger: object, _method: str, entry: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """Take an entry, as structlog's last processor."""
        self.entries.append(dict(entry))
        self._more.set()
        raise structlog.DropEvent

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return the entries of this event so far."""
        return [entry for entry in self.entries if entry["event"] == event]

    async def wait(self, event: str, count: int = 1) -> dict[str, Any]:
        """Return the entry with which there were so many of this event."""
        with anyio.fail_after(WITHIN_S):
            while len(self.of(event)) < count:
                self._more = anyio.Event()
                await self._more.wait()
        return self.of(event)[count - 1]
