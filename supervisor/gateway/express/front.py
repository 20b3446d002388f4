"""The door: it accepts connections, and hands over to aiohttp those that bring anything but plain requests."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Collection
from functools import partial
from typing import Final

import structlog

from supervisor.gateway.connection import Server
from supervisor.gateway.express.lane import Lane
from supervisor.gateway.express.visitor import Visitor
from supervisor.gateway.stalling import StallWatch

_log = structlog.get_logger("loadmaster.gateway")

BACKLOG: Final = 128  # as aiohttp's: connections that may wait for a loop that is busy
# A connection that brings nothing for so long is accepted all the same: then it is ours to give up.
ACCEPT_SILENT_S: Final = 1
# In one go; streams that run have their turn between.
ACCEPTED_AT_ONCE: Final = 16
# Where files or memory have run out, and somebody has to give some back first (as asyncio's own servers do).
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
ACCEPT_AGAIN_S: Final = 1.0


class Front:
    """Accepts on one socket, from ``open`` to ``close``; ``end`` sees to it that nobody is left."""

    def __init__(self, listener: socket.socket, lane: Lane, server: Server, stalls: StallWatch) -> None:
        self._listener = listener
        self._lane = lane
        self._server = server
        self._stalls = stalls
        self._loop = asyncio.get_running_loop()
        self._visitors: set[Visitor] = set()
        self._handing_over: set[asyncio.Task[None]] = set()
        self._is_open = False
        self._left: asyncio.Event | None = None

    @property
    def visitors(self) -> Collection[Visitor]:
        """Whoever is connected and was not handed over."""
        return self._visitors

    def open(self) -> None:
        """Listen. What is set here holds for every connection that is accepted (tcp(7))."""
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, ACCEPT_SILENT_S)
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
        self._is_open = True
        self._accept_on()

    def close(self) -> None:
        """Accept nobody any more, and part with everybody as soon as they were answered."""
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._listener)
            self._listener.close()
        self._lane.close()
        for visitor in tuple(self._visitors):
            visitor.part()

    async def end(self, within_s: float) -> None:
        """Return once everybody has been answered, after so many seconds at most; whoever is left then is cut off.

        Nobody is heard any more then.
        """
        self.close()
        self._left = asyncio.Event()
        if self._visitors:
            try:
                async with asyncio.timeout(within_s):
                    await self._left.wait()
            except TimeoutError:
                for visitor in tuple(self._visitors):
                    visitor.cut()
        await asyncio.gather(*self._handing_over, return_exceptions=True)
        self._lane.ready.close()

    def _accept_on(self) -> None:
        if self._is_open:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connected, address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
                _log.error("connections.exhausted", reason=error.strerror, again_in_s=ACCEPT_AGAIN_S)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(ACCEPT_AGAIN_S, self._accept_on)
                return
            connected.setblocking(False)
            visitor = Visitor(connected, address[0], self._lane, self._stalls, self._hand_over, when_gone=self._let_go)
            self._visitors.add(visitor)
            visitor.come()

    def _let_go(self, visitor: Visitor) -> None:
        self._visitors.discard(visitor)
        if self._left is not None and not self._visitors:
            self._left.set()

    def _hand_over(self, connected: socket.socket, seen: bytes) -> None:
        task = self._loop.create_task(self._take_over(connected, seen))
        self._handing_over.add(task)
        task.add_done_callback(self._handing_over.discard)

    async def _take_over(self, connected: socket.socket, seen: bytes) -> None:
        """Let aiohttp serve this connection from here on, as if it had read what was seen itself."""
        try:
            await self._loop.connect_accepted_socket(partial(self._server.continuing, seen), connected)
        except OSError:  # it is gone
            connected.close()
