"""Cuts off clients that take a connection and do not use it: no request, half a body, an answer that nobody reads.

aiohttp itself has no such limits but for kept connections. All connections are looked over every few seconds, which
costs nothing while there are none.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, Protocol

import structlog

# Of Linux's tcp_info (include/uapi/linux/tcp.h): the connection's state, segments that were sent and not acknowledged,
# bytes acknowledged of all that were ever sent, bytes not sent yet.
TCP_INFO_BYTES: Final = 148
STATE_AT: Final = 0
ESTABLISHED: Final = 1  # include/net/tcp_states.h
UNACKED_AT: Final = 24
BYTES_ACKED_AT: Final = 120
NOTSENT_BYTES_AT: Final = 144
LOOKS: Final = 6  # within the shortest of the limits: a stall is cut a sixth of that later at most

_log = structlog.get_logger("loadmaster.gateway")


class Stage(Enum):
    """What a connection is at: no request is there, one is coming, it is answered; or its client has gone unheard."""

    GONE = auto()
    IDLE = auto()
    ASKING = auto()
    ANSWERING = auto()


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a connection stands: bytes that came of its request, or that the client took of its answer.

    ``waits``: the client is the one that something is waited for.
    """

    stage: Stage
    moved_bytes: int = 0
    waits: bool = True


IDLE: Final = Standing(Stage.IDLE)
GONE: Final = Standing(Stage.GONE)


class Watched(Protocol):
    """A connection that is watched over."""

    def standing(self) -> Standing:
        """Return where it stands."""
        ...

    def cut(self) -> None:
        """End it at once."""
        ...


@dataclass(slots=True)
class _Seen:
    """What was last seen of one connection."""

    since: float
    standing: Standing = IDLE
    had_request: bool = False


@dataclass(slots=True)
class StallWatch:
    """Watches over connections. ``kept_s`` is how long a kept one may idle before it is closed, which is no fault.

    The other limits: see ``GatewayOptions``.
    """

    kept_s: float
    head_timeout_s: float
    stall_timeout_s: float
    _seen: dict[Watched, _Seen] = field(default_factory=dict)

    def restart(self, connection: Watched) -> None:
        """Note that the connection's request begins or has ended: what comes next gets its whole time."""
        seen = self._seen.setdefault(connection, _Seen(time.monotonic()))
        seen.since, seen.had_request = time.monotonic(), True

    async def watch(self, live: Callable[[], Iterable[Watched]]) -> None:
        """Cut off what stalls among these, for as long as this runs."""
        while True:
            await asyncio.sleep(min(self.head_timeout_s, self.stall_timeout_s) / LOOKS)
            now = time.monotonic()
            self._seen = {one: self._seen.get(one) or _Seen(now) for one in live()}
            for connection, seen in tuple(self._seen.items()):
                standing = connection.standing()
                if (reason := self._stalled(seen, standing, now)) is not None:
                    _log.warning("connection.cut", reason=reason)
                if reason is not None or self._is_over(seen, standing, now):
                    connection.cut()

    def _is_over(self, seen: _Seen, standing: Standing, now: float) -> bool:
        """Say whether nothing is to be expected of a connection any more, as happens to all in the end."""
        idles = standing.stage is Stage.IDLE and seen.had_request
        return standing.stage is Stage.GONE or (idles and now - seen.since > self.kept_s)

    def _stalled(self, seen: _Seen, standing: Standing, now: float) -> str | None:
        """Return why the connection is to be cut, None where it is not."""
        before, seen.standing = seen.standing, standing
        if standing.stage is Stage.GONE or (standing.stage is Stage.IDLE and seen.had_request):
            return None
        if standing.stage is Stage.IDLE:
            late = now - seen.since > self.head_timeout_s
            return f"no request within {self.head_timeout_s:g} s" if late else None
        if standing.stage is not before.stage or standing.moved_bytes > before.moved_bytes or not standing.waits:
            seen.since = now
        if now - seen.since <= self.stall_timeout_s:
            return None
        asking = standing.stage is Stage.ASKING
        what = "nothing more of the request's body came" if asking else "the answer was not read"
        return f"{what} for {self.stall_timeout_s:g} s"


def has_left(connection: socket.socket) -> bool:
    """Say whether the other side has closed a connection, or reset it, whatever it has sent before."""
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)[STATE_AT] != ESTABLISHED


def taken(connection: socket.socket, held_bytes: int) -> Standing:
    """Return how much the client's machine has taken of an answer, of which so many bytes are held back here.

    The kernel is asked: it holds megabytes for a client that reads nothing, minutes of a stream.
    """
    told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
    (unacked,) = struct.unpack_from("=I", told, UNACKED_AT)
    (taken_bytes,) = struct.unpack_from("=Q", told, BYTES_ACKED_AT)
    (unsent_bytes,) = struct.unpack_from("=I", told, NOTSENT_BYTES_AT)
    return Standing(Stage.ANSWERING, taken_bytes, waits=bool(unacked or unsent_bytes or held_bytes))
