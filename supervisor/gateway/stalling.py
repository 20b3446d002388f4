"""Cuts off clients that take a connection and do not use it: no request, half a body, an answer that nobody reads.

aiohttp itself has no such limits but for kept connections. All connections are looked over every few seconds, which
costs nothing while there are none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import structlog
from aiohttp import web

LOOKS: Final = 6  # within the shortest of the limits: a stall is cut a sixth of that later at most

_log = structlog.get_logger("loadmaster.gateway")


@dataclass(slots=True)
class _Seen:
    """What was last seen of one connection. ``amount`` is of body bytes come, or of answer bytes not yet taken."""

    since: float
    had_request: bool = False
    request: web.Request | None = None
    amount: int = 0


@dataclass(slots=True)
class StallWatch:
    """Watches over the connections of one server. ``kept_s`` is how long aiohttp lets a kept connection idle.

    The other limits: see ``GatewayOptions``.
    """

    kept_s: float
    head_timeout_s: float
    stall_timeout_s: float
    _connections: dict[web.RequestHandler, _Seen] = field(default_factory=dict)

    @contextmanager
    def serving(self, request: web.Request) -> Iterator[None]:
        """Mark the request's connection as in use: from here on its body has to come, and its answer to be read."""
        seen = self._seen(request.protocol)
        seen.request, seen.had_request, seen.since, seen.amount = request, True, time.monotonic(), 0
        try:
            yield
        finally:
            seen.request, seen.since = None, time.monotonic()

    async def watch(self, server: web.Server) -> None:
        """Cut off what stalls, for as long as this runs."""
        while True:
            await asyncio.sleep(min(self.head_timeout_s, self.stall_timeout_s) / LOOKS)
            live = server.connections
            self._connections = {connection: self._seen(connection) for connection in live}
            for connection in live:
                if connection.transport is not None and (reason := self._stalled(connection)) is not None:
                    _log.warning("connection.cut", reason=reason)
                    connection.transport.abort()  # to close it would wait until the other side has read

    def _seen(self, connection: web.RequestHandler) -> _Seen:
        return self._connections.setdefault(connection, _Seen(time.monotonic()))

    def _stalled(self, connection: web.RequestHandler) -> str | None:
        """Return why the connection is to be cut, None where it is not."""
        seen, now = self._seen(connection), time.monotonic()
        if seen.request is None:
            allowed = self.head_timeout_s + (self.kept_s if seen.had_request else 0)
            return None if now - seen.since <= allowed else f"no request within {allowed:g} s"
        if not seen.request.content.is_eof():
            amount, what = seen.request.content.total_bytes, "nothing more of the request's body came"
            moved = amount > seen.amount
        else:
            transport = seen.request.transport
            amount, what = 0 if transport is None else transport.get_write_buffer_size(), "the answer was not read"
            moved = amount == 0 or amount < seen.amount
        if moved:
            seen.amount, seen.since = amount, now
        elif amount > seen.amount:  # more of the answer waits now: the clock runs on
            seen.amount = amount
        return None if now - seen.since <= self.stall_timeout_s else f"{what} for {self.stall_timeout_s:g} s"
