"""One deadline at a time, which may be moved while it is awaited."""

from __future__ import annotations

import math

import anyio


class Alarm:
    """Wakes its one waiter when the deadline last set has passed. Times are those of ``anyio.current_time``."""

    def __init__(self) -> None:
        self._deadline = math.inf
        self._scope: anyio.CancelScope | None = None

    def set(self, deadline: float | None) -> None:
        """Move the deadline; None puts it off until it is set again."""
        self._deadline = math.inf if deadline is None else deadline
        # A later one is seen when this one passes.
        if self._scope is not None and self._deadline < self._scope.deadline:
            self._scope.deadline = self._deadline

    async def wait(self) -> None:
        """Return once the deadline has passed, and put it off until it is set again."""
        while True:
            with anyio.CancelScope(deadline=self._deadline) as self._scope:
                await anyio.sleep_forever()
            self._scope = None
            if anyio.current_time() >= self._deadline:
                break
        self._deadline = math.inf
