"""One request to a runner and its answer, over a connection of its own.

What an HTTP client for the world does beside it (redirects, cookies, proxies, name resolution, a pool) is of no use on
the way to a child on this machine and costs more than all the rest of a request's way (docs/decisions/0010).
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Final
from urllib.parse import SplitResult, urlsplit

from multidict import CIMultiDict, MultiMapping

from supervisor.gateway.answer import Answer, Broken
from supervisor.gateway.quiet import Quiet

# Loopback answers within a millisecond; a listener whose backlog is full is as good as gone.
CONNECT_TIMEOUT_S: Final = 5.0
# Beyond this the runner has to wait until the client has read: a megabyte for every sixteen clients that stall.
MAX_UNREAD_BYTES: Final = 64 << 10
LOOPBACK: Final = "127.0.0.1"  # where our children listen
HTTP_PORT: Final = 80
HTTPS_PORT: Final = 443
CLOSED: Final = "the connection was closed"


class Upstream(asyncio.Protocol):
    """The connection, which sends what is unsent as soon as it is made. ``close`` has to be called in the end.

    ``answer`` has the answer's head, once ``wait_head`` has returned. ``quiet`` is ended with the first that comes.
    """

    def __init__(self, unsent: bytes, quiet: Quiet | None = None) -> None:
        self.answer = Answer()
        self._unsent = unsent
        self._transport: asyncio.Transport | None = None
        self._error: Broken | None = None
        self._paused = False
        self._quiet = quiet
        self._waiter: asyncio.Future[None] | None = None

    async def wait_head(self) -> None:
        """Return once the answer's head is there. Raises ``Broken``."""
        while not self.answer.has_head:
            await self._wait()

    async def read(self) -> bytes:
        """Return what has come of the body, as soon as there is anything; empty at its end. Raises ``Broken``."""
        while not self.answer.n_unread:
            if self.answer.is_whole:
                return b""
            await self._wait()
        data = self.answer.take()
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def close(self) -> None:
        """Give the connection up. Whoever reads from it learns that it was closed."""
        self._end(CLOSED)
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self, why: str) -> None:
        """Note that no more will come, which is an error unless the answer is whole."""
        if self._error is None and not self.answer.is_whole:
            self._error = Broken(why)
        self._wake()

    def _stir(self) -> None:
        """Be woken for whatever comes from now on."""
        if self._quiet is not None:
            self._quiet.end()
            self._quiet = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send what is left of the request."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream's
        self._transport = transport
        transport.write(self._unsent)
        self._unsent = b""

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        self._stir()
        try:
            self.answer.feed(data)
        except Broken as error:
            self._end(str(error))
            self.close()
        if self.answer.n_unread > MAX_UNREAD_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note how it ended: an answer of no told length ends so."""
        self._stir()
        self._transport = None
        if exc is None and self._error is None:
            self.answer.close()
        self._end(CLOSED if exc is None else str(exc) or type(exc).__name__)


async def send(base_url: str, path: str, headers: CIMultiDict[str], body: bytes) -> Upstream:
    """Connect and send a POST with this body; ``Upstream.wait_head`` waits for the answer. Raises OSError.

    Headers may be none of ``Host``, ``Connection`` and those that frame the body.
    """
    address = urlsplit(base_url)
    message = request_of(address, path, fields_of(headers), body)
    loop, host = asyncio.get_running_loop(), address.hostname or ""
    if is_on_loopback(address):
        connected = connecting(address)
        try:
            # Sent at once, not when the loop comes round: of many requests that come together the runner begins the
            # first while the others are still looked at.
            n_sent = _sent(connected, message)
            if not n_sent:
                await _wait_connected(loop, connected, address)
        except BaseException:
            connected.close()
            raise
        upstream = Upstream(message[n_sent:], Quiet(connected))
        await loop.create_connection(lambda: upstream, sock=connected)
    else:  # a program that is not ours, wherever the operator says that it answers
        is_secure = address.scheme == "https"
        port = address.port or (HTTPS_PORT if is_secure else HTTP_PORT)
        upstream = Upstream(message)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await loop.create_connection(lambda: upstream, host, port, ssl=is_secure or None)
    return upstream


def fields_of(headers: MultiMapping[str]) -> str:
    """Return these headers as lines of a head."""
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def request_of(address: SplitResult, path: str, fields: str, body: bytes) -> bytes:
    """Return a POST to a path of this address, after whose answer the connection ends."""
    head = (
        f"POST {address.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {address.netloc}\r\n{fields}"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("utf-8", "surrogateescape") + body


def is_on_loopback(address: SplitResult) -> bool:
    """Say whether a runner answers at this address as children of ours do: on this machine, unencrypted."""
    return address.scheme == "http" and address.hostname == LOOPBACK


def connecting(address: SplitResult) -> socket.socket:
    """Return a socket on its way to this address on loopback: it has arrived unless a backlog is full. Raises OSError.

    What is sent into one that has not arrived is not taken.
    """
    connected = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with suppress(BlockingIOError):
            connected.connect(_host_and_port(address))
    except BaseException:
        connected.close()
        raise
    return connected


async def _wait_connected(loop: asyncio.AbstractEventLoop, connected: socket.socket, address: SplitResult) -> None:
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        await loop.sock_connect(connected, _host_and_port(address))


def _host_and_port(address: SplitResult) -> tuple[str, int]:
    return LOOPBACK, address.port or HTTP_PORT


def _sent(connected: socket.socket, message: bytes) -> int:
    """Return how many bytes went out at once. Raises OSError where there is no way."""
    with suppress(BlockingIOError):
        return connected.send(message)
    return 0
