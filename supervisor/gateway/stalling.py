"""Cuts off clients that take a connection and do not use it: no request, half a body, an answer that nobody reads.

aiohttp itself has no such limits but for kept connections. All connections are looked over every few seconds, which
costs nothing while there are none.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import structlog
from aiohttp import web

# Of Linux's tcp_info (include/uapi/linux/tcp.h): segments that were sent and not acknowledged, bytes acknowledged of
# all that were ever sent, bytes not sent yet.
TCP_INFO_BYTES: Final = 148
UNACKED_AT: Final = 24
BYTES_ACKED_AT: Final = 120
NOTSENT_BYTES_AT: Final = 144
LOOKS: Final = 6  # within the shortest of the limits: a stall is cut a sixth of that later at most

_log = structlog.get_logger("loadmaster.gateway")


@dataclass(slots=True)
class _Seen:
    """What was last seen of one connection: bytes that came of the request's body, and that the client took."""

    since: float
    had_request: bool = False
    request: web.Request | None = None
    body_bytes: int = 0
    taken_bytes: int = 0


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
        seen.request, seen.had_request, seen.since, seen.body_bytes = request, True, time.monotonic(), 0
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
            before, seen.body_bytes = seen.body_bytes, seen.request.content.total_bytes
            moved, what = seen.body_bytes > before, "nothing more of the request's body came"
        else:
            before = seen.taken_bytes
            seen.taken_bytes, waits = _answered(seen.request)
            moved, what = seen.taken_bytes > before or not waits, "the answer was not read"
        if moved:
            seen.since = now
        return None if now - seen.since <= self.stall_timeout_s else f"{what} for {self.stall_timeout_s:g} s"


def _answered(request: web.Request) -> tuple[int, bool]:
    """Return how many bytes the client's machine has taken over its connection, and whether it has more to take.

    The kernel is asked: it holds megabytes for a client that reads nothing, minutes of a stream.
    """
    transport = request.transport
    connection = None if transport is None else transport.get_extra_info("socket")
    if transport is None or connection is None or transport.is_closing():
        return 0, False
    told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
    (unacked,) = struct.unpack_from("=I", told, UNACKED_AT)
    (taken_bytes,) = struct.unpack_from("=Q", told, BYTES_ACKED_AT)
    (unsent_bytes,) = struct.unpack_from("=I", told, NOTSENT_BYTES_AT)
    return taken_bytes, bool(unacked or unsent_bytes or transport.get_write_buffer_size())
